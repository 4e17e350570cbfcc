"""Read feedback files (JSON lines) into `Example` records; every fault names file, row, field and remedy."""

from __future__ import annotations

import difflib
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posttrain.data.formats import Place, kind_of, parse_row
from posttrain.errors import ConfigError, DataError, suggest
from posttrain.types import Example

NAMES = ("demonstrations", "rankings", "prompts", "heldout_rankings", "heldout_prompts")
"""Names under which a directory holds its files (NAME.jsonl or NAME.jsonl.gz)."""

DEFAULT_DIR = Path(__file__).parent / "default"

_SHOWN_FAULTS = 5


def read_jsonl(path: str | Path, limit: int | None = None, *, faults: list[DataError] | None = None) -> list[Example]:
    """Read a .jsonl or .jsonl.gz file; the formats are told apart by columns.

    Columns of no format are kept in ``Example.meta``. Rows count from 1, with blank lines, which are skipped.

    Args:
        path: the file.
        limit: how many examples to return at most; None = all.
        faults: None raises one error listing the faulty rows; a list instead collects one error a faulty row,
            and the rows are left out, so that the caller can count them.

    Raises:
        DataError: faulty rows (unless collected), bytes that aren't gzip, a file without rows.
        ConfigError: no such file, another kind of file, a limit below 1.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}, expected at least 1; leave it out to read the whole file")
    found: list[DataError] = []
    examples: list[Example] = []
    for number, line in _lines(path):
        if limit is not None and len(examples) >= limit:
            break
        place = Place(str(path), number)
        try:
            examples.append(parse_row(_json_object(line, place), place.file, place.row))
        except DataError as error:
            found.append(error)
    if faults is not None:
        faults.extend(found)
    elif found:
        raise _listed(found)
    if not examples and not found:
        raise DataError(f"{path}: no rows; expected one JSON object a line")
    return examples


def resolve_data(name: str | Path) -> dict[str, Path]:
    """Return name to file for ``default``, a directory of NAME.jsonl(.gz) files, or one file.

    A lone file that bears none of `NAMES` counts as rankings, demonstrations or prompts by its first row.

    Raises:
        ConfigError: an unknown name, a directory without data, a misspelt or doubled file.
    """
    path = DEFAULT_DIR if str(name) == "default" else Path(name)
    if path.is_dir():
        return _directory(path)
    if path.is_file():
        if (stem := _stem(path)) in NAMES:
            return {stem: path}
        answers = len(read_jsonl(path, limit=1)[0].responses)
        return {("prompts", "demonstrations", "rankings")[min(answers, 2)]: path}
    near = [str(p) for p in path.parent.glob("*.jsonl*")] if path.parent.is_dir() else []
    near = difflib.get_close_matches(str(path), near, n=1, cutoff=0.8)
    hint = suggest(str(name), ["default", *near])
    raise ConfigError(f"unknown data '{name}': neither a name, a directory nor a file; {hint}")


def file_hash(path: str | Path) -> str:
    """Return the first 16 hex digits of SHA-256 over the file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()[:16]


def _stem(path: Path) -> str:
    return re.sub(r"\.jsonl(\.gz)?$", "", path.name)


def _directory(path: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for file in sorted(p for p in path.iterdir() if p.name.endswith((".jsonl", ".jsonl.gz"))):
        stem = _stem(file)
        if stem in files:
            raise ConfigError(f"'{path}' has both '{files[stem].name}' and '{file.name}'; keep one")
        files[stem] = file
    if not files:
        raise ConfigError(f"'{path}' has no .jsonl or .jsonl.gz file; expected some of {', '.join(NAMES)}")
    for stem in files.keys() - set(NAMES):
        near = difflib.get_close_matches(stem, [n for n in NAMES if n not in files], n=1, cutoff=0.8)
        if near:
            raise ConfigError(f"'{files[stem]}' is none of the known names; did you mean '{near[0]}'? Rename it")
    return files


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (row from 1, bytes) of the lines that aren't blank."""
    if not path.is_file():
        raise ConfigError(f"no file '{path}'; expected a .jsonl or .jsonl.gz file")
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise ConfigError(f"'{path}' is of another kind; expected .jsonl or .jsonl.gz (one JSON object a line)")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as handle:
            for number, line in enumerate(handle, 1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    yield number, line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a whole gzip file ({error}); compress it again or drop the .gz") from error


def _json_object(line: bytes, place: Place) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [k for k, _ in pairs]
        if len(set(keys)) < len(keys):
            twice = next(k for k in keys if keys.count(k) > 1)
            raise place.fault(twice, "the key stands twice in one object", "keep one")
        return dict(pairs)

    try:
        value = json.loads(line.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise place.fault("(line)", f"byte {error.start} is not UTF-8", "save the file as UTF-8") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise place.fault("(line)", f"invalid JSON ({error})", "write one JSON object a line") from error
    if not isinstance(value, dict):
        raise place.fault("(line)", f"found {kind_of(value)}, expected an object", "write one JSON object a line")
    return value


def _listed(found: list[DataError]) -> DataError:
    """One error for all faulty rows: the first few in full, the rest counted."""
    if len(found) == 1:
        return found[0]
    more = len(found) - _SHOWN_FAULTS
    lines = [str(e) for e in found[:_SHOWN_FAULTS]] + ([f"and {more} more"] if more > 0 else [])
    return DataError(f"{len(found)} faulty rows:\n" + "\n".join(lines))
