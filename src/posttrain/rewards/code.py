"""Code against tests, in a sandbox, as a reward."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from posttrain.rewards import harness
from posttrain.rewards.base import Completion, Reward, Score
from posttrain.rewards.sandbox import Limits, run_confined

_FENCE = re.compile(r"```[ \t]*(?:python|py|Python|python3)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


def code_tests(*, share: bool = False, limits: Limits | None = None, unconfined: bool = False) -> Reward:
    """1 where a response's program passes every test of its target, else 0; with ``share`` the part that it passes.

    Abstains where the target has no tests. Tests that were not reached by the deadline are not passed.

    Raises (when called):
        ConfigError: programs can't be confined here (`posttrain.rewards.sandbox`).
    """

    def one(c: Completion) -> Score:
        tests = c.example.target.tests if c.example.target and c.example.target.kind == "code" else ()
        if not tests:
            return Score(None)
        passed = count_passed(program_of(c.text), tests, limits, unconfined=unconfined) / len(tests)
        return Score(passed if share else float(passed == 1), {"tests": passed})

    def reward(completions: Sequence[Completion]) -> list[Score]:
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            return list(pool.map(one, completions))

    return reward


def count_passed(program: str, tests: Sequence[str], limits: Limits | None = None, *, unconfined: bool = False) -> int:
    """How many of the tests, statements that raise where they fail, a program passes."""
    if not tests:
        return 0
    call = f"\n\nmain({program!r}, {list(tests)!r})\n"
    ended = run_confined(inspect.getsource(harness) + call, limits, unconfined=unconfined)
    return len(re.findall(r"(?m)^\d+ passed$", ended.output))


def program_of(text: str) -> str:
    """The program in an answer: its last fenced block, else the whole text."""
    found = _FENCE.findall(text)
    return found[-1] if found else text
