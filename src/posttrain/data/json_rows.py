"""Rows of JSON text, read strictly and piece by piece: one object a line, an array of objects, or objects in sequence."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from posttrain.data.formats.fields import Place, kind_of, shown
from posttrain.data.opened import MAX_ROW
from posttrain.data.strict import LOOSE, MAX_DEPTH, STRICT, Refused, half_pair, too_deep
from posttrain.errors import DataError

Found = dict[str, Any] | DataError
"""A row, or the fault of a row after which reading can go on."""

_PIECE = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]*")
_ROW = "(row)"
_A_LINE = "write one JSON object a line"
_A_ROW = "write each row as one JSON object"


def parse_object(text: str, place: Place) -> dict[str, Any]:
    """Return the JSON object that ``text`` is, or raise the fault that says why it is none."""
    try:
        value = STRICT.decode(text)
    except Refused as refused:
        raise place.fault(*refused.args) from refused
    except (ValueError, RecursionError) as error:
        raise _invalid(error, text, 0, place, _A_LINE) from error
    return _checked(value, text, place, _A_LINE)


def _checked(value: Any, text: str, place: Place, remedy: str) -> dict[str, Any]:
    """Return ``value``, parsed from ``text``, if it is an object not nested too deeply, of text that is Unicode."""
    if not isinstance(value, dict):
        raise place.fault(_ROW, f"found {kind_of(value)}, expected an object", remedy)
    # Whether there is anything to look for is asked first, of text rather than values: most rows have nothing.
    nested = any(type(part) is not str for part in value.values())
    if nested and too_deep(value, text):
        raise _too_deep(place)
    if where := half_pair(value, text):
        raise place.fault(where, "half of a surrogate pair", "remove the broken escape")
    return value


def _too_deep(place: Place) -> DataError:
    return place.fault(_ROW, f"nested deeper than {MAX_DEPTH} levels", "flatten it or remove the row")


def _invalid(error: BaseException, text: str, start: int, place: Place, remedy: str = _A_ROW) -> DataError:
    if isinstance(error, RecursionError):
        return _too_deep(place)
    if isinstance(error, json.JSONDecodeError):
        near = text[error.pos : error.pos + 20].rstrip()
        where = f"at character {error.pos - start}, {shown(near)}" if near else "at its end"
        return place.fault(_ROW, f"invalid JSON {where}", remedy)
    return place.fault(_ROW, "a whole number of more digits than can be read", "write it as text")


def line_rows(lines: Iterable[tuple[int, bytes]], file: str) -> Iterator[tuple[Place, Found]]:
    """Yield the object of each (number, line), or its fault; blank lines are skipped."""
    for number, line in lines:
        if line.isspace():
            continue
        place = Place(file, number)
        try:
            yield place, parse_object(line.decode(), place)
        except UnicodeDecodeError as error:
            yield place, place.fault(_ROW, f"byte {error.start} of the line is not UTF-8", "save the file as UTF-8")
        except DataError as error:
            yield place, error


def value_rows(handle: io.BufferedReader, head: bytes, file: str) -> Iterator[tuple[Place, Found]]:
    """Yield the objects of an array, or of a sequence of objects however they are laid out; rows count from 1.

    ``head`` is what was read of ``handle`` already. A lone object may also hold the rows: see `rows_of_object`.

    Raises:
        DataError: text that is no JSON, after which no further row can be found.
    """
    window = _Window(handle, head, file)
    if window.next() != "[":
        first = window.value(Place(file, 1))
        if isinstance(first, dict) and not window.next():
            yield from rows_of_object(first, file)
            return
        yield Place(file, 1), first
        number = 1
        while window.next():
            number += 1
            yield Place(file, number), window.value(Place(file, number))
        return
    window.at += 1
    number, mark = 0, "," if window.next() != "]" else "]"
    while mark == ",":
        number += 1
        yield Place(file, number), window.value(Place(file, number))
        mark = window.next()
        window.at += mark == ","
    if mark != "]":
        found = f"{shown(mark)} follows row {number}" if mark else f"it ends after row {number}"
        raise DataError(f"{file}: {found}, expected ',' or ']'; a JSON array has to be whole")
    window.at += 1
    if mark := window.next():
        raise DataError(f"{file}: {shown(mark)} follows the array's end; keep one JSON array a file")


class _Window:
    """The part of a text file that is being read: ``text`` from position ``at`` on, with more on demand."""

    def __init__(self, handle: io.BufferedReader, head: bytes, file: str) -> None:
        self._handle, self._file = handle, file
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._bytes = 0
        self.text, self.at, self.ended = "", 0, False
        self._append(head)

    def _append(self, data: bytes) -> None:
        try:
            self.text = self.text[self.at :] + self._decode(data, not data)
        except UnicodeDecodeError as error:
            at = self._bytes + error.start
            raise DataError(f"{self._file}: byte {at} or close by is not UTF-8; save the file as UTF-8") from error
        self._bytes += len(data)
        self.at, self.ended = 0, not data

    def more(self) -> None:
        """Read as much again as is left over, so that the time for a long value grows with its length only."""
        self._append(self._handle.read(max(_PIECE, len(self.text) - self.at)))

    def next(self) -> str:
        """Move to the next character that isn't white space and return it, '' at the end."""
        while True:
            found = _SPACE.match(self.text, self.at)
            self.at = found.end() if found else self.at
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.more()

    def value(self, place: Place) -> Found:
        """Read one object; a fault after which the next one can be found is returned, any other raised."""
        self.next()
        fault: DataError | None = None
        while True:
            try:
                value, end = (LOOSE if fault else STRICT).raw_decode(self.text, self.at)
            except Refused as refused:
                fault = place.fault(*refused.args)
                continue
            except json.JSONDecodeError as error:
                if self.ended or len(self.text) - self.at > MAX_ROW:
                    raise _invalid(error, self.text, self.at, place) from error
                self.more()
                continue
            except (ValueError, RecursionError) as error:
                if fault or isinstance(error, RecursionError):
                    raise _invalid(error, self.text, self.at, place) from error
                fault = _invalid(error, self.text, self.at, place)
                continue
            if end == len(self.text) and not self.ended and not isinstance(value, dict):
                self.more()  # a number may go on
                continue
            text, self.at = self.text[self.at : end], end
            try:
                return fault or _checked(value, text, place, _A_ROW)
            except DataError as error:
                return error


def rows_of_object(value: dict[str, Any], file: str) -> Iterator[tuple[Place, Found]]:
    """Yield the rows of a file that is one object.

    An object of objects is a mapping from names to rows, each of which gets its name as column ``key``; an object
    whose only value is a list of objects is that list; any other is one row.

    Raises:
        DataError: the list of rows stands beside something else.
    """
    listed = [key for key, part in value.items() if _is_table(part)]
    if value and all(isinstance(part, dict) for part in value.values()):
        for number, (key, row) in enumerate(value.items(), 1):
            place = Place(file, number)
            named = {"key": key, **row}
            yield place, place.fault("key", "the row's name has no column left", "rename it") if "key" in row else named
    elif listed and len(value) == 1:
        yield from ((Place(file, number), row) for number, row in enumerate(value[listed[0]], 1))
    elif listed and listed[0] in ("data", "rows", "examples", "instances", "train", "test"):
        keys = ", ".join(shown(key) for key in list(value)[:8])
        raise DataError(f"{file}: one object with the keys {keys}; write the list under '{listed[0]}' alone")
    else:
        yield Place(file, 1), value


def _is_table(value: Any) -> bool:
    """Whether a value is a list of objects, and not of the turns of a conversation."""
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        return False
    return not {"role", "from", "content"} & value[0].keys()
