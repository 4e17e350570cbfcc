"""JSON text read strictly: no doubled keys, no NaN, no numbers beyond all bounds, no deep nesting, no half characters."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

MAX_DEPTH = 100
"""Levels of lists and objects a row may nest: what later walks over a row must not exhaust the stack."""

_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # an escape that may be half of a surrogate pair
_ROW = "(row)"


class Refused(Exception):
    """A value that no row may have; carries field, problem and remedy."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise Refused(twice[:40], "the key stands twice in one object", "keep one")
    return found


def _constant(name: str) -> None:
    raise Refused(_ROW, f"{name} is no JSON value", "write a finite number or null")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise Refused(_ROW, f"the number {digits[:20]} is too large", "write a smaller one, or text")
    return number


STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_constant, parse_float=_finite)
LOOSE = json.JSONDecoder(parse_int=str, parse_float=str)  # only finds where a refused value ends


def too_deep(value: Any, text: str) -> bool:
    """Whether the value of ``text`` nests deeper than `MAX_DEPTH`."""
    return text.count("{") + text.count("[") > MAX_DEPTH and _deeper(value, MAX_DEPTH)


def half_pair(value: Any, text: str) -> str:
    """Return where the value of ``text`` holds half of a surrogate pair, which is no character; '' if nowhere."""
    if "\\" not in text or not _HALF.search(text):
        return ""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return next((path for path, leaf in leaves(value) if _halved(leaf)), _ROW)
    return ""


def _halved(leaf: Any) -> bool:
    return isinstance(leaf, str) and any("\ud800" <= char <= "\udfff" for char in leaf)


def leaves(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield (path, value) for every key and every value that is no container; the path is as faults name fields."""
    stack: list[tuple[str, Any]] = [("", value)]
    while stack:
        path, item = stack.pop()
        if isinstance(item, dict):
            yield from ((path or _ROW, key) for key in item)
            stack += [(f"{path}.{key}" if path else str(key), part) for key, part in item.items()]
        elif isinstance(item, list):
            stack += [(f"{path}[{i}]", part) for i, part in enumerate(item)]
        else:
            yield path, item


def _deeper(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            part
            for item in level
            for part in (item.values() if isinstance(item, dict) else item)
            if isinstance(part, (dict, list))
        ]
        if not level:
            return False
    return True
