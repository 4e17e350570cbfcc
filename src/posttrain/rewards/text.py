"""Rewards of an answer's form: length, format, repetition, language. Each is a function that makes a reward."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from math import isfinite

from posttrain.errors import ConfigError
from posttrain.rewards.base import Completion, Reward, Score
from posttrain.rewards.constraints import speaks


def of_text(function: Callable[[Completion], float | None]) -> Reward:
    """A reward of each completion on its own; None abstains."""

    def reward(completions: Sequence[Completion]) -> list[Score]:
        values = [function(c) for c in completions]
        return [Score(v) for v in values]

    return reward


def length(least: int, most: int, *, unit: str = "words") -> Reward:
    """1 from ``least`` to ``most`` words (or ``tokens``), falling linearly to 0 at none and at twice ``most``.

    Raises:
        ConfigError: bounds out of order, or another unit.
    """
    if not 0 <= least <= most or most == 0 or unit not in ("words", "tokens"):
        raise ConfigError(f"got length {least} to {most} {unit}; expected 0 <= least <= most, in words or tokens")

    def score(c: Completion) -> float:
        n = len(c.ids) if unit == "tokens" else len(c.text.split())
        return n / least if n < least else max(0.0, min(1.0, 2 - n / most))

    return of_text(score)


def matches(pattern: str) -> Reward:
    """1 where the whole answer, spaces at its ends apart, has a form (DeepSeek-R1's format reward), else 0.

    The pattern is the configuration's, never the data's: a careless one can take exponential time.
    """
    try:
        form = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(f"got the pattern {pattern!r}, which is no regular expression: {error}") from error
    return of_text(lambda c: float(form.fullmatch(c.text.strip()) is not None))


def repetition(size: int = 3, *, most: float = 1.0) -> Reward:
    """``-most * (1 - distinct / all)`` of an answer's runs of ``size`` words: 0 without a repeated run."""
    if size < 1 or not isfinite(most) or most < 0:
        raise ConfigError(f"got runs of {size} words and a penalty of {most}; expected at least 1, and at least 0")

    def score(c: Completion) -> float:
        words = c.text.lower().split()
        runs = list(zip(*(words[i:] for i in range(size)), strict=False))
        return -most * (1 - len(set(runs)) / len(runs)) if runs else 0.0

    return of_text(score)


def in_language(code: str) -> Reward:
    """1 in the language of an ISO 639 code, 0 in another; abstains where it can't be told."""
    return of_text(lambda c: None if (yes := speaks(c.text, code)) is None else float(yes))
