"""Rows of any source, one at a time and in bounded memory: files of every kind, shards, data sets by name or in hand."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from posttrain.data.formats.fields import Place, doubled, kind_of, shown
from posttrain.data.json_rows import Found, line_rows, parse_object, rows_of_object, value_rows
from posttrain.data.opened import MAX_ROW, PARQUET, READABLE, SUFFIXES, kind_by_name, opened, refuse_foreign
from posttrain.data.strict import MAX_DEPTH, leaves
from posttrain.errors import ConfigError, DataError

Numbered = Iterator[tuple[int, bytes]]

_BOM = b"\xef\xbb\xbf"
_PIECE = 1 << 20
_BESIDE = re.compile(r"[._].*|(readme|licen[cs]e|changelog|sha256sums).*|.*\.(md|lock|check\.json)", re.IGNORECASE)


def records(source: Any) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Yield (place, row) of every row; the first fault stops.

    ``source`` is a file (JSON lines, a JSON array or objects, CSV, TSV, YAML, each also as .gz or .zst; Parquet), a
    directory of numbered shards or one that ``save_to_disk`` wrote, ``hf:ORG/NAME[:CONFIG][/SPLIT]``, or a `datasets`
    object. Rows count from 1: in JSON lines and CSV they are lines, blank ones included.

    Raises:
        DataError: a row or file that can't be read.
        ConfigError: no such source, or one of another kind.
    """
    for place, row in found_rows(source):
        if isinstance(row, DataError):
            raise row
        yield place, row


def found_rows(source: Any) -> Iterator[tuple[Place, Found]]:
    """Yield what `records` does, but a fault after which reading can go on takes the place of its row."""
    if not isinstance(source, (str, Path)):
        if not type(source).__module__.startswith("datasets."):
            raise ConfigError(f"can't read rows of {type(source).__name__}; expected a path, a name or a data set")
        from posttrain.data.arrow import dataset_rows

        return dataset_rows(source)
    if str(source).startswith("hf:"):
        from posttrain.data.arrow import hub_rows

        return hub_rows(str(source))
    path = Path(source)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        from posttrain.data.arrow import saved_rows

        return saved_rows(path)
    if path.is_dir():
        return chain.from_iterable(map(_file_rows, shards(path)))
    if not path.is_file():
        raise ConfigError(f"no file '{path}'; expected {READABLE}, or a directory of such files")
    return _file_rows(path)


def shards(directory: Path) -> list[Path]:
    """Return the data files of a directory, which have to be numbered parts of one set, in order.

    Raises:
        ConfigError: no data file, files of several kinds or sets, or something that is no data.
    """
    entries = sorted(item for item in directory.iterdir() if not _BESIDE.fullmatch(item.name))
    other = [item.name for item in entries if not item.is_file() or not kind_by_name(item)]
    if other or not entries:
        found = f"holds '{other[0]}'" if other else "holds no data file"
        raise ConfigError(f"directory '{directory}' {found}; expected only data files ({', '.join(SUFFIXES)})")
    first = entries[0].name
    for item in entries[1:]:
        if re.sub(r"\d+", "0", item.name) != re.sub(r"\d+", "0", first):
            raise ConfigError(
                f"'{first}' and '{item.name}' in '{directory}' aren't numbered parts of one set; name one file, "
                "or keep the parts of one set in a directory of their own"
            )
    return sorted(entries, key=lambda item: [int(digits) for digits in re.findall(r"\d+", item.name)])


def _file_rows(path: Path) -> Iterator[tuple[Place, Found]]:
    """Rows of one file, of the kind that its contents say, or, where they don't, its name."""
    file, kind = str(path), kind_by_name(path)
    with opened(path) as handle:
        head = handle.peek(64)[:64]
        refuse_foreign(head, file)
        if not head.startswith(PARQUET):
            if kind == "parquet":
                what = f"starts with {shown(head[:8].decode('latin-1'))}" if head else "is empty"
                raise DataError(f"{file}: not a Parquet file ({what}); write it again or rename it")
            yield from _text_rows(handle, file, kind)
            return
        if path.suffix.lower() in (".gz", ".zst"):
            raise DataError(f"{file}: Parquet inside {path.suffix}; unpack it, Parquet packs its columns itself")
    from posttrain.data.arrow import parquet_rows

    yield from parquet_rows(path)


def _text_rows(handle: io.BufferedReader, file: str, kind: str) -> Iterator[tuple[Place, Found]]:
    """Rows of a text file, told apart by its first character that isn't white space, then by ``kind``."""
    number, head = 0, b"\n"
    while head.isspace():
        number += 1
        head = handle.readline(_PIECE)
        head = head.removeprefix(_BOM) if number == 1 else head
    opening = head.lstrip()[:1]
    if kind == "yaml":
        yield from _yaml_rows(handle, head, file)
        return
    if opening == b"[" and kind in ("json", "jsonl", ""):
        yield from value_rows(handle, head, file)
        return
    head += handle.readline(MAX_ROW + 1) if not head.endswith(b"\n") else b""
    lines = chain([(number, head)] if head else [], _lines(handle, file, number))
    whole = opening == b"{" and _whole(head)
    if kind == "jsonl" or (whole and kind != "json"):
        yield from line_rows(_measured(lines, file), file)
    elif kind in ("csv", "tsv"):
        yield from _csv_rows(_measured(lines, file), file, "\t" if kind == "tsv" else ",")
    elif whole:
        yield from _line_rows_or_object(lines, file)
    elif opening == b"{":
        yield from value_rows(handle, head, file)
    elif kind == "json" and opening:
        raise DataError(
            f"{file}: starts with {shown(_start(head))}, expected '[' or '{{'; write JSON rows or rename it"
        )
    elif opening:
        raise ConfigError(f"'{file}' is of another kind (starts with {shown(_start(head))}); expected {READABLE}")


def _start(head: bytes) -> str:
    return head[:20].decode("latin-1").strip()


def _whole(line: bytes) -> bool:
    """Whether a line is an object by itself, faulty or not, rather than the beginning of one."""
    try:
        return isinstance(json.loads(line.decode()), dict)
    except (ValueError, RecursionError):
        return False


def _line_rows_or_object(lines: Iterable[tuple[int, bytes]], file: str) -> Iterator[tuple[Place, Found]]:
    """Rows of JSON lines, unless the first line is all there is: then rows of that object."""
    filled = ((number, line) for number, line in lines if not line.isspace())
    first = next(filled)
    second = next(filled, None)
    if second is not None:
        yield from line_rows(_measured(chain([first, second], filled), file), file)
        return
    for place, row in line_rows(_measured([first], file), file):
        yield from [(place, row)] if isinstance(row, DataError) else rows_of_object(row, file)


def _lines(handle: io.BufferedReader, file: str, before: int) -> Numbered:
    """(number, line) of the lines that follow ``before`` others; no line is read beyond `MAX_ROW`."""
    return enumerate(iter(partial(handle.readline, MAX_ROW + 1), b""), before + 1)


def _measured(lines: Iterable[tuple[int, bytes]], file: str) -> Numbered:
    for number, line in lines:
        if len(line) > MAX_ROW:
            problem = f"the line is longer than {MAX_ROW >> 20} MiB"
            raise Place(file, number).fault("(row)", problem, "write one row a line, or split it")
        yield number, line


# ---------------------------------------------------------------------------- CSV


def _csv_rows(lines: Numbered, file: str, delimiter: str) -> Iterator[tuple[Place, Found]]:
    """Rows of a table with a header; a row's number is that of the line it starts on, and all values are text."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW))  # of the process; larger harms nobody
    at = 0

    def decoded(numbered: tuple[int, bytes]) -> str:
        nonlocal at
        at = numbered[0]
        return numbered[1].decode()

    reader = csv.reader(map(decoded, lines), strict=True, delimiter=delimiter)
    header: list[str] = []
    while True:
        before = reader.line_num
        place = Place(file, at + 1)
        try:
            cells = next(reader, None)
        except UnicodeDecodeError as error:
            yield place, place.fault("(row)", f"byte {error.start} of line {at} is not UTF-8", "save the file as UTF-8")
            continue
        except csv.Error as error:
            yield place, place.fault("(row)", f"invalid CSV ({error})", 'quote the cell, and write a quote in it as ""')
            continue
        if cells is None:
            return
        if not cells:  # a blank line
            continue
        place = Place(file, at - (reader.line_num - before) + 1)
        if not header:
            header = _header(cells, place)
        elif len(cells) != len(header):
            found = (
                f"found {len(cells)} of {len(header)} cells"
                if len(cells) < len(header)
                else f"found {len(cells)} cells, expected {len(header)}"
            )
            yield place, place.fault("(row)", found, "quote cells that hold separators or line breaks")
        else:
            yield place, dict(zip(header, cells, strict=True))


def _header(names: list[str], place: Place) -> list[str]:
    for i, name in enumerate(names):
        if not name.strip():
            raise place.fault("(header)", f"column {i + 1} has no name", "name it (a table written with its index?)")
    if twice := doubled(names):
        raise place.fault("(header)", f"two columns are named {shown(twice[0])}", "rename one")
    return names


# ---------------------------------------------------------------------------- YAML


def _yaml_rows(handle: io.BufferedReader, head: bytes, file: str) -> Iterator[tuple[Place, Found]]:
    """Rows of a YAML list, or of a mapping as in a JSON object; values have to be JSON's."""
    import yaml

    data = head + handle.read(MAX_ROW + 1 - len(head))
    if len(data) > MAX_ROW:
        raise DataError(f"{file}: more than {MAX_ROW >> 20} MiB of YAML, which is read whole; write JSON lines")
    try:
        value = _yaml_loader()(data.decode()).get_single_data()
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    except RecursionError as error:
        raise DataError(f"{file}: nested deeper than {MAX_DEPTH} levels; flatten it") from error
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise DataError(f"{file}: invalid YAML ({line}{str(error.problem)[:80]}); correct it") from error
    except (yaml.YAMLError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
        # All but the first are what the parsers of numbers, dates and tagged values raise on nonsense.
        raise DataError(f"{file}: invalid YAML (a number, date or tag that can't be read); correct it") from error
    if value is None:
        return
    if isinstance(value, dict):
        rows: Iterable[tuple[Place, Any]] = rows_of_object(value, file)
    elif isinstance(value, list):
        rows = ((Place(file, number), row) for number, row in enumerate(value, 1))
    else:
        raise DataError(f"{file}: found {kind_of(value)}, expected a list of rows; write '- prompt: ...'")
    for place, row in rows:
        try:
            yield place, row if isinstance(row, DataError) else _json_value(row, place)
        except DataError as error:
            yield place, error


def _json_value(row: Any, place: Place) -> dict[str, Any]:
    """A YAML row with values that JSON has too; dates, sets and NaN have to be written otherwise."""
    for path, leaf in leaves(row):
        if not isinstance(leaf, (str, int, float, type(None))) or leaf != leaf or leaf in (float("inf"), -float("inf")):
            found = f"found {str(leaf)[:20]} ({type(leaf).__name__})"
            raise place.fault(path or "(row)", found, "quote it, so that it is text")
    try:
        return parse_object(json.dumps(row), place)  # which joins pairs of surrogates, as JSON does
    except RecursionError as error:
        raise place.fault("(row)", f"nested deeper than {MAX_DEPTH} levels", "flatten it") from error


def _yaml_loader() -> type[Any]:
    """PyYAML's safe loader, in Python (the one in C recurses without bound), without aliases and doubled keys."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                mark = self.peek_event().start_mark  # a few lines of aliases can stand for gigabytes
                raise yaml.MarkedYAMLError(problem="an alias (*name) is not read; write it out", problem_mark=mark)
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := doubled(keys):
                mark = node.start_mark
                raise yaml.MarkedYAMLError(problem=f"the key {shown(twice[0])} stands twice", problem_mark=mark)
            found = super().construct_mapping(node, deep)
            odd = [key for key in found if not isinstance(key, str)]
            if odd:
                problem = f"the key {str(odd[0])[:40]} is not text; quote it"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
            return found

    return Loader
