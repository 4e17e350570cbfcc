"""Write examples as JSON lines, so that reading gives the same examples back code point for code point."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

from posttrain.data.formats.example import example_row
from posttrain.data.formats.fields import Place
from posttrain.data.json_rows import parse_object
from posttrain.data.opened import kind_by_name
from posttrain.errors import ConfigError
from posttrain.types import Example, Message, Preference, Response, Step, Target, ToolCall

_RENAMED = {"call_id": "tool_call_id"}
_ALWAYS = ("prompt", "responses", "role", "content", "messages", "name", "arguments", "text", "a", "b", "better")


def row_of(example: Example) -> dict[str, Any]:
    """Return an example as one row of JSON values, in the columns of the format ``example``; defaults are left out."""
    row = _plain(example)
    row.pop("file", None)
    row.pop("row", None)
    return row


def _plain(value: Any) -> Any:
    if not isinstance(value, (Example, Response, Message, ToolCall, Step, Preference, Target)):
        return [_plain(item) for item in value] if isinstance(value, tuple) else value
    found: dict[str, Any] = {}
    for field in fields(value):
        item = getattr(value, field.name)
        if field.name in _ALWAYS and not (field.name == "name" and item == ""):
            found[field.name] = _plain(item)
        elif item is not None and item != field.default and item not in ("", (), {}):
            found[_RENAMED.get(field.name, field.name)] = _plain(item)
    return found


def write_jsonl(path: str | Path, examples: Iterable[Example]) -> int:
    """Write one example a line, packed if the name ends in .gz or .zst, and return how many there are.

    The bytes depend on the examples only. The file appears under its name when it is whole. Each line is read back
    before the next is written.

    Raises:
        ConfigError: a name that doesn't end in .jsonl or .ndjson (and .gz or .zst).
        DataError: an example that could not be read back as it is.
    """
    path = Path(path)
    if kind_by_name(path) != "jsonl":
        raise ConfigError(f"can't write '{path}'; expected a name ending in .jsonl, .jsonl.gz or .jsonl.zst")
    count = 0
    with _replacing(path) as file, _packed(file, path) as out:
        for count, example in enumerate(examples, 1):
            out.write(_line(example, Place(str(path), count)))
    return count


def _line(example: Example, place: Place) -> bytes:
    try:
        text = json.dumps(row_of(example), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        line = text.encode()
    except UnicodeEncodeError as error:
        raise place.fault("(row)", "half of a surrogate pair", "remove it from the example's text") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise place.fault(
            "(row)", f"not JSON values ({str(error)[:60]})", "keep text, finite numbers, lists"
        ) from error
    (same,) = example_row(parse_object(text, place), place)
    if same != replace(example, file=place.file, row=place.row):
        names = [f.name for f in fields(same) if getattr(same, f.name) != getattr(example, f.name)]
        field = next(name for name in names if name not in ("file", "row"))
        raise place.fault(field, "would not be read back as it is", "keep JSON values: lists, text keys, no tuples")
    return line + b"\n"


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file beside ``path`` that takes its name when all is written, or goes away."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        file = partial.open("wb")
    except OSError as error:
        raise ConfigError(f"can't write '{path}': {error.strerror}; check the directory") from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _packed(file: BinaryIO, path: Path) -> Iterator[BinaryIO]:
    if path.suffix == ".gz":
        with gzip.GzipFile("", "wb", compresslevel=6, fileobj=file, mtime=0) as out:
            yield cast(BinaryIO, out)
    elif path.suffix == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise ConfigError(f"'{path}' needs the extra zst: pip install 'posttrain[zst]'") from error
        with zstandard.ZstdCompressor(level=3, write_checksum=True).stream_writer(file, closefd=False) as out:
            yield cast(BinaryIO, out)
    else:
        yield file
