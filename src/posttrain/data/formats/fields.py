"""Reading one field of a row: each function returns a value of the right type or raises a fault that names the field."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from posttrain.errors import DataError, UselessRow
from posttrain.types import Example

Row = Mapping[str, Any]

COMMON = frozenset({"weight", "kind"})
"""Columns that every format reads where a row has them."""

_NUMBER = re.compile(r"\s*[+-]?\d{1,30}(\.\d{1,30})?\s*")
_SHOWN = 40


class Place(NamedTuple):
    """Where a row stands, and how its columns are read.

    ``names`` says what a column of ours is called in the file; ``used`` are the columns that don't go to ``meta``.
    """

    file: str
    row: int
    names: Mapping[str, str] = {}
    used: frozenset[str] = frozenset()

    def fault(self, field: str, problem: str, remedy: str) -> DataError:
        """Return the standard error for one of the row's fields."""
        return DataError.at(self.file, self.row, self.named(field), problem, remedy)

    def useless(self, reason: str, field: str, problem: str, remedy: str) -> UselessRow:
        """Return the error of a well-formed row that teaches nothing; ``reason`` is what it is counted under."""
        return UselessRow(str(self.fault(field, problem, remedy)), reason)

    def named(self, field: str) -> str:
        """Return a field's path with its column called as in the file."""
        column = field if field in self.names else re.split(r"[\[. ]", field, maxsplit=1)[0]
        return self.names.get(column, column) + field[len(column) :]


def kind_of(value: Any) -> str:
    """Return what a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number")


def shown(value: Any) -> str:
    """Return a short escaped piece of a value for a message."""
    if not isinstance(value, str):
        return kind_of(value) if isinstance(value, (dict, list)) else json.dumps(value)[:_SHOWN]
    return repr(value[:_SHOWN]) + (" ..." if len(value) > _SHOWN else "")


def doubled(names: Iterable[str]) -> list[str]:
    """Return the names that stand more than once, in the order of their first place."""
    return [name for name, count in Counter(names).items() if count > 1]


def build(row: Row, place: Place, *, kind: str = "", meta: Mapping[str, Any] | None = None, **fields: Any) -> Example:
    """Return the example of a row: its columns ``kind`` and ``weight`` are read, columns nobody reads go to ``meta``."""
    found = row.get("kind")
    if found is not None and not isinstance(found, str):
        raise place.fault("kind", f"found {kind_of(found)}, expected a string", "quote it or leave it out")
    rest = {k: v for k, v in row.items() if k not in place.used}
    meta = meta or {}
    for name in sorted(rest.keys() & meta.keys()):
        if rest[name] != meta[name]:
            raise place.fault(name, "this format keeps something else under that name", "rename the column")
    return Example(
        kind=found if found is not None else kind,
        weight=weight(row["weight"], place) if "weight" in row else 1.0,
        meta={**rest, **meta} if meta else rest,
        file=place.file,
        row=place.row,
        **fields,
    )


def weight(value: Any, place: Place) -> float:
    """Return a row's weight: a finite number that isn't negative."""
    found = number(value, "weight", place)
    if found < 0:
        raise place.fault("weight", f"found {found:g}, expected at least 0", "correct it or leave it out (1)")
    return found


def text(value: Any, field: str, place: Place, *, empty: bool = False) -> str:
    """Return text that can be written as UTF-8 and, unless ``empty`` may be, says something."""
    if not isinstance(value, str):
        raise place.fault(field, f"found {kind_of(value)}, expected text", "write a string")
    if not empty and not value.strip():
        raise place.fault(field, "empty text", "fill it in or remove the row")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            found = f"half of a surrogate pair at character {error.start}"
            raise place.fault(field, found, "remove the broken escape") from error
    return value


def number(value: Any, field: str, place: Place) -> float:
    """Return a finite number; a plain decimal in text counts, since CSV has no other way to write one."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        found = shown(value) if isinstance(value, str) else kind_of(value)
        raise place.fault(field, f"found {found}, expected a number", "write a number or remove the row")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise place.fault(field, "the number isn't finite", "write a finite number or remove the row")
    return found


def number_list(value: Any, field: str, place: Place) -> list[float]:
    """Return a list of numbers; one number is a list of one."""
    if not isinstance(value, list):
        return [number(value, field, place)]
    if not value:
        raise place.fault(
            field, f"found {kind_of(value)} without entries, expected scores", "add them or remove the row"
        )
    return [number(item, f"{field}[{i}]", place) for i, item in enumerate(value)]


def whole(value: Any, field: str, place: Place, allowed: Sequence[int] | None = None) -> int:
    """Return a whole number, one of ``allowed`` where that is given."""
    found = number(value, field, place)
    exact = found.is_integer() and abs(found) <= 1 << 53  # beyond that, whole numbers can't be told apart
    if not exact or (allowed is not None and int(found) not in allowed):
        wanted = "a whole number" if allowed is None else f"one of {_listed(allowed)}"
        raise place.fault(field, f"found {found:g}, expected {wanted}", "correct it or remove the row")
    return int(found)


def _listed(allowed: Sequence[int]) -> str:
    if isinstance(allowed, range):
        return f"{allowed.start} to {allowed.stop - 1}"
    return ", ".join(map(str, allowed))


def flag(value: Any, field: str, place: Place) -> bool:
    """Return true or false; the words in text count, since CSV has no other way to write them. 0 and 1 don't."""
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    if not isinstance(value, bool):
        found = shown(value) if isinstance(value, (str, int, float)) else kind_of(value)
        raise place.fault(field, f"found {found}, expected true or false", "write true or false")
    return value


def entries(value: Any, field: str, place: Place, *, least: int = 0, most: int | None = None) -> list[Any]:
    """Return a list with ``least`` to ``most`` entries."""
    if not isinstance(value, list):
        raise place.fault(field, f"found {kind_of(value)}, expected a list", "write [...]")
    if len(value) < least or (most is not None and len(value) > most):
        wanted = f"{least}" if least == most else f"at least {least}" if most is None else f"{least} to {most}"
        raise place.fault(field, f"found {len(value)} entries, expected {wanted}", "correct it or remove the row")
    return value


def fields_of(value: Any, field: str, place: Place, needed: Sequence[str] = ()) -> Mapping[str, Any]:
    """Return an object that has the keys ``needed``."""
    if not isinstance(value, Mapping):
        raise place.fault(field, f"found {kind_of(value)}, expected an object", "write {...}")
    for key in needed:
        if key not in value:
            keys = ", ".join(f"'{k}'" for k in list(value)[:8]) or "none"
            raise place.fault(f"{field}.{key}", f"missing (found keys {keys})", "add it or remove the row")
    return value


def texts(value: Any, field: str, place: Place, *, least: int = 0, most: int | None = None) -> list[str]:
    """Return a list of texts that say something."""
    items = entries(value, field, place, least=least, most=most)
    return [text(item, f"{field}[{i}]", place) for i, item in enumerate(items)]


def optional_text(row: Row, column: str, place: Place) -> str:
    """Return a text column that may be absent, null or empty, which all mean that nothing is said: ''."""
    value = row.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        return ""
    return text(value, column, place)


def plain_number(value: float) -> str:
    """Return a number as people write it: 51 for 51.0, 0.5 for 0.5."""
    return str(int(value)) if float(value).is_integer() else repr(float(value))
