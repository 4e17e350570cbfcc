"""The process in which a reward function runs: ``python -m posttrain.rewards.worker package.module:function``.

It reads one JSON line a call, a list of completions, and answers with one line: ``{"values": [...]}`` or
``{"fault": "..."}``. What the function prints goes to standard error. Nothing but JSON crosses between the processes.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

Row = dict[str, Any]
"""A completion: ``prompt``, ``completion``, ``truncated``, ``group``, ``target`` (or None), ``meta``, ``turns``."""


def main() -> None:
    """Import the function, say so, and answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.path.insert(0, os.getcwd())

    def tell(message: Row) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    from posttrain.registry import load_object

    try:
        call = caller(load_object(sys.argv[1]))
    except Exception as error:
        tell({"fault": f"{type(error).__name__}: {error}"})
        return
    tell({"ready": True})
    for line in sys.stdin:
        rows = json.loads(line)
        try:
            tell({"values": [plain(v) for v in call(rows)]})
        except Exception as error:
            tell({"fault": f"{type(error).__name__}: {error}"[:500]})


def caller(function: Callable[..., Any]) -> Callable[[list[Row]], list[Any]]:
    """A call of a function with rows: as a list where it has a parameter ``completions``, else one at a time.

    It is given, by name, the columns that it asks for; with ``**kwargs`` all of them. A function of lists gets
    ``prompts``, ``completions`` and each other column under its own name (TRL's convention).

    Raises:
        TypeError: it has neither ``completion`` nor ``completions``.
    """
    names = inspect.signature(function).parameters
    every = any(p.kind is p.VAR_KEYWORD for p in names.values())
    if "completions" not in names and "completion" not in names:
        raise TypeError(
            f"a reward function has a parameter 'completion' (one text) or 'completions'; this has {list(names)}"
        )

    def one(row: Row) -> Any:
        return function(**{k: v for k, v in row.items() if every or k in names})

    def whole(rows: list[Row]) -> list[Any]:
        columns = {f"{k}s" if k in ("prompt", "completion") else k: [r[k] for r in rows] for k in rows[0]}
        return list(function(**{k: v for k, v in columns.items() if every or k in names}))

    return whole if "completions" in names else lambda rows: [one(r) for r in rows]


def plain(value: Any) -> Any:
    """A value as JSON has it: numbers of any library as float, parts by name; what is neither by its repr, as a fault."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    try:
        return float(value)
    except (TypeError, ValueError):
        return repr(value)[:200]


if __name__ == "__main__":
    main()
