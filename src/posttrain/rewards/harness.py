"""Tests of a program by a process that the program can't reach: it is prepended to the call ``main(source, tests)``.

The program's functions run in a child with its outputs closed; the tests run here and call them through a pipe that
carries literals only. So a program can't print a verdict, end the process early, or answer with an object that equals
everything: what a test compares are numbers, texts and containers made here. Arguments arrive as copies.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO


def main(source: str, tests: list[str]) -> None:  # noqa: D103 (what it does stands above)
    down, up = os.pipe(), os.pipe()
    if os.fork() == 0:
        os.close(down[1])
        os.close(up[0])
        serve(source, os.fdopen(down[0], "r", encoding="utf-8"), os.fdopen(up[1], "w", encoding="utf-8"))
        os._exit(0)
    os.close(down[0])
    os.close(up[1])
    ask, answers = os.fdopen(down[1], "w", encoding="utf-8"), os.fdopen(up[0], "r", encoding="utf-8")

    def call(name: str) -> Callable[..., Any]:
        def remote(*given: Any, **named: Any) -> Any:
            ask.write(repr((name, given, named)).replace("\n", "\\n") + "\n")
            ask.flush()
            line = answers.readline()
            kind, value = ast.literal_eval(line) if line else ("gone", None)
            if kind != "value":
                raise RuntimeError(f"{name}: {kind} {value}")
            return value

        return remote

    line = answers.readline()
    names = ast.literal_eval(line) if line else []
    space: dict[str, Any] = {"__name__": "tests"}
    space.update({name: call(name) for name in names if isinstance(name, str) and name.isidentifier()})
    for i, test in enumerate(tests):
        try:
            exec(compile(test, f"test {i}", "exec"), space)
            said = "passed"
        except BaseException as error:
            said = f"failed {type(error).__name__}: {error}"[:200].replace("\n", " ")
        sys.stdout.write(f"{i} {said}\n")
        sys.stdout.flush()


def serve(source: str, asked: TextIO, answers: TextIO) -> None:
    """Define the program's functions and call them as asked."""
    null = os.open("/dev/null", os.O_RDWR)
    for handle in (0, 1, 2):
        os.dup2(null, handle)
    space: dict[str, Any] = {"__name__": "program"}

    def tell(value: str) -> None:
        answers.write(value.replace("\n", "\\n") + "\n")
        answers.flush()

    try:
        exec(compile(source, "program", "exec"), space)
    except BaseException:
        tell("[]")
        return
    tell(repr([name for name, value in space.items() if callable(value) and not name.startswith("__")]))
    for line in asked:
        name, given, named = ast.literal_eval(line)
        try:
            value = space[name](*given, **named)
            said = repr(("value", value))
            ast.literal_eval(said)
        except BaseException as error:
            said = repr(("raised", f"{type(error).__name__}: {error}"[:200]))
        tell(said)
