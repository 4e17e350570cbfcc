"""Stages that look after a reward model while policies learn from it: rows where it errs, patches against hacks, an auto-rater.

A judge is a `TrainReward` or `TrainScorer` stage (one of kind pairwise compares, others score), the directory that one wrote, or
``module:function`` of (prompt, a, b), the probability that answer a is the better one, or of (prompt, answer), a score.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from posttrain.errors import ConfigError
from posttrain.stages.base import PARAMETERS, Overlong, Plan, Stage


@dataclass(frozen=True, kw_only=True)
class _Judged(Stage):
    """What stages with a judge have."""

    judge: Stage | str

    def files(self) -> list[Path]:
        """Also the files that decide what the judge says."""
        from posttrain.work.inputs import reward_files

        own = reward_files(self.judge, functions=True) if isinstance(self.judge, str) else []
        return [*super().files(), *own]

    def plan(self) -> Plan:
        """A few hundred comparisons."""
        tokens = 4 * 96 * 200
        return Plan(rows=4 * 96, tokens=tokens, flops=2 * PARAMETERS * tokens, memory=PARAMETERS * 4 + 1e9)


@dataclass(frozen=True, kw_only=True)
class Refine(_Judged):
    """Pairs of a policy's samples on which a reward model and a judge disagree, after the rankings of ``data``.

    Of each prompt of ``samples`` the judge sees up to ``pairs_per_prompt`` pairs, of which ``count`` become rows: those where the model
    is most wrong if the judge is right, and a share ``agreeing`` on which both agree (`posttrain.rewards.refine`). ``limit``
    cuts ``data``. Writes ``data/rankings.jsonl``, which the next round's stage takes as ``data``, and ``results.json`` with the share
    of pairs on which both agree.
    """

    WORK: ClassVar[str] = "posttrain.work.refining:refine"
    DATA: ClassVar[tuple[str, ...]] = ("rankings",)
    TINY: ClassVar[Mapping[str, Any]] = {"data": "smallworld"}
    data: str | Stage = "default"
    samples: Stage
    reward: Stage | str
    count: int = 96
    pairs_per_prompt: int = 4
    agreeing: float = 0.25
    limit: int | None = None
    skip_bad: int = 0
    dtype: str = "auto"
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        """Refuse numbers that ask for nothing."""
        if self.count < 1 or self.pairs_per_prompt < 1 or not 0 <= self.agreeing <= 1:
            raise ConfigError(
                f"got count={self.count}, pairs_per_prompt={self.pairs_per_prompt}, agreeing={self.agreeing:g}; expected at least 1, "
                "at least 1, a share from 0 to 1"
            )


@dataclass(frozen=True, kw_only=True)
class Patch(_Judged):
    """Pairs against what a policy found out about its reward model, after the rankings of ``data`` (InternLM2's fast path).

    A hack is a phrase of up to ``longest`` words that at least ``least`` more of the ``late`` samples have than of the ``early`` ones, and
    without which the judge finds answers better. ``count`` pairs (20 to 100 in InternLM2) put answers without it over the
    same answers with it. Where no phrase is a hack, ``data`` stays as it is. Writes ``data/rankings.jsonl`` and ``results.json``.
    """

    WORK: ClassVar[str] = "posttrain.work.refining:patch"
    DATA: ClassVar[tuple[str, ...]] = ("rankings",)
    TINY: ClassVar[Mapping[str, Any]] = {"data": "smallworld"}
    data: str | Stage = "default"
    early: Stage
    late: Stage
    count: int = 50
    longest: int = 4
    least: float = 0.1
    limit: int | None = None
    skip_bad: int = 0
    dtype: str = "auto"
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        """Refuse numbers that ask for nothing."""
        if self.count < 1 or self.longest < 1 or not 0 < self.least <= 1:
            raise ConfigError(
                f"got count={self.count}, longest={self.longest}, least={self.least:g}; expected at least 1, at least 1, above 0 to 1"
            )


@dataclass(frozen=True, kw_only=True)
class Converse(Stage):
    """Conversations of several turns out of single ones: every row of ``data`` after ``turns - 1`` of its demonstrations.

    Earlier turns are not trained; which ones stand before a row follows from the seed and the row. Each part of the data that has
    prompts is written to ``data/PART.jsonl``.
    """

    WORK: ClassVar[str] = "posttrain.work.converse:run"
    DATA: ClassVar[tuple[str, ...]] = ("demonstrations", "rankings", "prompts", "heldout_rankings", "heldout_prompts")
    TINY: ClassVar[Mapping[str, Any]] = {"data": "smallworld"}
    data: str = "default"
    turns: int = 2
    skip_bad: int = 0

    def __post_init__(self) -> None:
        """Refuse what would be no conversation."""
        if self.turns < 2:
            raise ConfigError(f"got turns={self.turns}; expected at least 2")


@dataclass(frozen=True, kw_only=True)
class AutoRate(_Judged):
    """Rate policies side by side with ``baseline`` by a judge, pick the best, and see whether the reward is being hacked.

    Each answers ``prompts`` prompts of ``part`` ``samples`` times. ``policies`` differ in how far they followed ``reward``; where over
    them and the baseline the judge's win rate falls as the reward rises (Kendall's tau below 0), that is a hack, and said so.
    Writes ``results.json``: reward and win rate of each, ``picked``, ``tau``, ``hacked``.
    """

    WORK: ClassVar[str] = "posttrain.work.autorate:run"
    FUNCTIONS: ClassVar[bool] = True
    DATA: ClassVar[tuple[str, ...]] = ("heldout_prompts",)
    TINY: ClassVar[Mapping[str, Any]] = {"data": "smallworld", "prompts": 16, "max_new_tokens": 32}
    policies: tuple[Stage, ...]
    baseline: Stage
    reward: Stage | str
    data: str | Stage = "default"
    prompts: int = 48
    samples: int = 2
    temperature: float = 1.0
    max_new_tokens: int = 128
    max_length: int = 2048
    overlong: Overlong = "error"
    skip_bad: int = 0
    dtype: str = "auto"
    max_tokens: int = 1024
    slots: int = 64

    def __post_init__(self) -> None:
        """Refuse too few policies to see a trend."""
        if len(self.policies) < 2:
            raise ConfigError(f"got {len(self.policies)} policies; expected at least 2 beside the baseline")
