"""Reward functions in processes that can be killed: whatever one does, it ends by a deadline and never becomes a number.

A call that hangs, raises, answers with a wrong count, or with what is no finite number, is an abstention: the samples it
was for have no score, and the reason is counted. Past a share of abstentions the call ends with an error.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from posttrain.errors import ConfigError, RewardError
from posttrain.rewards.base import Completion, Score

_START = 60.0  # seconds that importing the function may take


class Fault(RewardError):
    """Why a call gave no score: ``kind`` is one of hung, raised, count, value, died."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass
class Killable:
    """A reward that calls ``package.module:function`` in ``workers`` processes.

    One call has ``together`` completions: ``one`` (then a bad sample spoils no other), ``group`` (all of one prompt) or
    ``all``. A call that takes more than ``seconds`` is killed with its process. ``most_abstained`` is the share of a
    step's completions that may be without a score by a fault; what the function itself leaves out by None isn't counted.
    May be called from any thread. `faults` counts by kind since the beginning.
    """

    function: str
    seconds: float = 10.0
    workers: int = 2
    together: Literal["one", "group", "all"] = "one"
    most_abstained: float = 0.5
    faults: Counter[str] = field(default_factory=Counter[str])

    def __post_init__(self) -> None:
        """Refuse values that can't work."""
        if ":" not in self.function or self.seconds <= 0 or self.workers < 1 or not 0 <= self.most_abstained <= 1:
            raise ConfigError(
                f"got function '{self.function}', {self.seconds} s, {self.workers} workers, most_abstained "
                f"{self.most_abstained}; expected package.module:function, over 0 s, at least 1 worker, a share from 0 to 1"
            )
        self._idle: queue.SimpleQueue[_Process | None] = queue.SimpleQueue()
        for _ in range(self.workers):
            self._idle.put(None)
        self._lock = threading.Lock()
        atexit.register(self.close)

    def __call__(self, completions: Sequence[Completion]) -> list[Score]:
        """One score each, in order.

        Raises:
            RewardError: the share without a score by a fault is over ``most_abstained``; the message counts the kinds.
        """
        calls = self._calls(completions)
        with ThreadPoolExecutor(self.workers) as pool:
            answers = list(pool.map(self._ask, [[completions[i] for i in call] for call in calls]))
        scores: list[Score] = [Score(None)] * len(completions)
        found: Counter[str] = Counter()
        said: dict[str, str] = {}
        for call, answer in zip(calls, answers, strict=True):
            parts = [answer] * len(call) if isinstance(answer, Fault) else answer
            for i, one in zip(call, parts, strict=True):
                if isinstance(one, Fault):
                    found[one.kind] += 1
                    said.setdefault(one.kind, str(one))
                    scores[i] = Score(None, {f"fault/{one.kind}": 1.0})
                else:
                    scores[i] = one
        with self._lock:
            self.faults += found
        if sum(found.values()) > self.most_abstained * len(completions):
            kinds = "; ".join(f"{n} {kind} ({said[kind]})" for kind, n in found.most_common())
            raise RewardError(
                f"reward '{self.function}' gave no score for {sum(found.values())} of {len(completions)} responses, "
                f"more than the share {self.most_abstained:g} that may be without: {kinds}"
            )
        return scores

    def close(self) -> None:
        """Kill the processes; the next call starts new ones."""
        for _ in range(self.workers):
            with suppress(queue.Empty):
                process = self._idle.get_nowait()
                if process is not None:
                    process.kill()
                self._idle.put(None)

    def _calls(self, completions: Sequence[Completion]) -> list[list[int]]:
        """The completions of each call, by position."""
        if self.together == "one":
            return [[i] for i in range(len(completions))]
        groups: dict[int, list[int]] = {}
        for i, c in enumerate(completions):
            groups.setdefault(c.group if self.together == "group" else 0, []).append(i)
        return list(groups.values())

    def _ask(self, completions: Sequence[Completion]) -> Fault | list[Score | Fault]:
        """Scores of one call, or why there are none."""
        process = self._idle.get()
        try:
            process = process or _Process(self.function)
            answer = process.ask([described(c) for c in completions], self.seconds)
        except Fault as fault:
            if process is not None and fault.kind in ("hung", "died"):
                process.kill()
                process = None
            return fault
        finally:
            self._idle.put(process)
        if len(answer) != len(completions):
            return Fault("count", f"{len(answer)} values for {len(completions)} completions")
        return [scored(value) for value in answer]


class _Process:
    """One worker with the function imported, in a process group of its own, so that its children die with it."""

    def __init__(self, function: str) -> None:
        call = [sys.executable, "-m", "posttrain.rewards.worker", function]
        self._run = subprocess.Popen(
            call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        self._left = b""
        try:
            started = self._line(time.monotonic() + _START)
        except Fault:
            self.kill()
            raise
        if "fault" in started:
            self.kill()
            raise ConfigError(f"reward '{function}' can't be loaded: {started['fault']}")

    def ask(self, rows: list[dict[str, Any]], seconds: float) -> list[Any]:
        """The function's values of some rows."""
        end = time.monotonic() + seconds
        assert self._run.stdin is not None
        try:
            self._write((json.dumps(rows) + "\n").encode(), end)
        except OSError as error:
            raise Fault("died", f"the process ended: {error}") from error
        answer = self._line(end)
        if "fault" in answer:
            raise Fault("raised", answer["fault"])
        return answer["values"]

    def kill(self) -> None:
        """End the process and all it started."""
        with suppress(OSError):
            os.killpg(self._run.pid, signal.SIGKILL)
        self._run.wait()
        for pipe in (self._run.stdin, self._run.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()

    def _write(self, data: bytes, end: float) -> None:
        """Write while the process reads."""
        assert self._run.stdin is not None
        handle = self._run.stdin.fileno()
        os.set_blocking(handle, False)
        while data:
            if not select.select([], [handle], [], max(0.0, end - time.monotonic()))[1]:
                raise Fault("hung", "it didn't read its input by the deadline")
            data = data[os.write(handle, data) :]

    def _line(self, end: float) -> dict[str, Any]:
        """The next line of the process."""
        assert self._run.stdout is not None
        handle = self._run.stdout.fileno()
        while b"\n" not in self._left:
            if not select.select([handle], [], [], max(0.0, end - time.monotonic()))[0]:
                raise Fault("hung", "no answer by the deadline")
            if not (more := os.read(handle, 1 << 16)):
                raise Fault("died", f"the process ended with status {self._run.wait()}")
            self._left += more
        line, _, self._left = self._left.partition(b"\n")
        try:
            return json.loads(line)
        except ValueError as error:
            raise Fault("died", "the process wrote something else than an answer") from error


def described(c: Completion) -> dict[str, Any]:
    """A completion as the function gets it."""
    return {
        "prompt": c.example.prompt[-1].content,
        "completion": c.text,
        "truncated": c.truncated,
        "group": c.group,
        "target": asdict(c.example.target) if c.example.target else None,
        "meta": dict(c.example.meta),
        "turns": [(m.role, m.content) for m in c.turns],
    }


def scored(value: Any) -> Score | Fault:
    """A value as a score: a number, None, or parts whose ``value`` (or, without one, whose sum) is the score."""
    if value is None:
        return Score(None)
    parts: Mapping[str, Any] = value if isinstance(value, Mapping) else {"value": value}
    if not parts or not all(isinstance(v, float) and math.isfinite(v) for v in parts.values()):
        return Fault("value", f"got {str(value)[:100]!r}; expected a finite number, None, or numbers by name")
    total = parts["value"] if "value" in parts else sum(parts.values())
    return Score(total, {k: v for k, v in parts.items() if k != "value"})


def killable(function: str | Callable[..., Any], **options: Any) -> Killable:
    """`Killable` of a function that can be imported, or of its name.

    Raises:
        ConfigError: a function without a name of its own at the top of an importable module.
    """
    if not isinstance(function, str):
        name = f"{function.__module__}:{function.__qualname__}"
        if "<" in name or "." in function.__qualname__ or function.__module__ == "__main__":
            raise ConfigError(
                f"'{name}' can't be imported by another process; move it to the top of a module of its own"
            )
        function = name
    return Killable(function, **options)
