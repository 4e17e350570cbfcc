"""Stages that make data out of a policy and judgements: sampled answers, their scores, pairs and demonstrations out of those.

Each writes ``data/PART.jsonl`` in its directory, which a later stage reads as ``data``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from posttrain.errors import ConfigError
from posttrain.stages.base import PARAMETERS, Overlong, Plan, Stage


@dataclass(frozen=True, kw_only=True)
class Generate(Stage):
    """Sample ``samples`` answers of a policy to every prompt; writes ``data/samples.jsonl``.

    ``part`` of the data is read, and answers that are there stay, before the samples. ``temperature``, ``top_k`` and ``top_p``
    say how tokens are drawn, ``limit`` or the slice ``rows`` which prompts are used. What a sample's tokens were, their
    log-probabilities under the distribution that was sampled and whether it stopped by itself is kept in its ``meta``. Prompts
    are sampled ``at_once`` a time, each such lot journalled.
    """

    WORK: ClassVar[str] = "posttrain.work.generate:run"
    DATA: ClassVar[tuple[str, ...]] = ("prompts",)
    TINY: ClassVar[Mapping[str, Any]] = {"model": "small", "data": "smallworld", "max_new_tokens": 32}
    model: str | Stage = "smollm2"
    data: str | Stage = "default"
    part: str = "prompts"
    samples: int = 4
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    max_new_tokens: int = 128
    limit: int | None = None
    rows: tuple[int, int] | None = None
    skip_bad: int = 0
    max_length: int = 2048
    overlong: Overlong = "error"
    dtype: str = "auto"
    slots: int = 32
    at_once: int = 32

    def __post_init__(self) -> None:
        """Refuse values that would fail late."""
        if self.samples < 1 or self.at_once < 1 or self.max_new_tokens < 1:
            raise ConfigError(
                f"got samples={self.samples}, at_once={self.at_once}, max_new_tokens={self.max_new_tokens}; "
                "expected at least 1 of each"
            )

    def plan(self) -> Plan:
        """Prompts are computed once, 7 tokens of 10 that an answer may have are sampled."""
        prompts = min(self.limit or 96, self.rows[1] - self.rows[0] if self.rows else 96)
        tokens = int(prompts * (50 + 0.7 * self.samples * self.max_new_tokens))
        return Plan(
            rows=prompts * self.samples, tokens=tokens, flops=2 * PARAMETERS * tokens, memory=PARAMETERS * 4 + 1e9
        )


@dataclass(frozen=True, kw_only=True)
class MakePrompts(Stage):
    """Sample ``count`` different prompts that a chat model writes itself, as the user; writes ``data/prompts.jsonl``.

    The model goes on from where its template lets a user begin, up to its stop token (Xu et al. 2024, Magpie, arXiv
    2406.08464). Those without end, empty ones and repetitions are left out and counted; draws are made ``at_once`` a time,
    each such lot journalled, at most ``tries`` a prompt.
    """

    WORK: ClassVar[str] = "posttrain.work.make_prompts:run"
    TINY: ClassVar[Mapping[str, Any]] = {"model": "small-base", "count": 16}
    model: str | Stage = "smollm2"
    count: int = 96
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 64
    tries: int = 20
    dtype: str = "auto"
    slots: int = 32
    at_once: int = 64

    def __post_init__(self) -> None:
        """Refuse values that would fail late."""
        if min(self.count, self.tries, self.at_once, self.max_new_tokens) < 1:
            raise ConfigError(
                f"got count={self.count}, tries={self.tries}, at_once={self.at_once}, max_new_tokens={self.max_new_tokens}; "
                "expected at least 1 of each"
            )

    def plan(self) -> Plan:
        """Two draws a prompt."""
        tokens = int(2 * self.count * 0.5 * self.max_new_tokens)
        return Plan(rows=self.count, tokens=tokens, flops=2 * PARAMETERS * tokens, memory=PARAMETERS * 4 + 1e9)


@dataclass(frozen=True, kw_only=True)
class Label(Stage):
    """Score every answer to every prompt; writes ``data/samples.jsonl`` with scores, ranks and win rates.

    ``reward`` is a `TrainReward` stage, the directory that one wrote, a name (`posttrain.rewards.named`) or
    ``module:function``: of ``(prompt, answer)`` it is a score, of ``(prompt, a, b)`` the probability that a is better. Of a
    score the win rate is the mean of ``sigmoid(s_i - s_j)`` over all answers to the prompt; of a comparison, which is kept
    too, the score is the mean probability to beat each of the others. An answer cut by length scores ``cut_score``; answers
    that read the same have one score. ``part`` names the part of the data where it has several.
    """

    WORK: ClassVar[str] = "posttrain.work.label:run"
    FUNCTIONS: ClassVar[bool] = True
    data: str | Stage
    reward: Stage | str
    part: str | None = None
    cut_score: float | None = None
    limit: int | None = None
    skip_bad: int = 0
    dtype: str = "auto"
    max_tokens: int = 1024
    at_once: int = 32

    def plan(self) -> Plan:
        """A pass over eight answers to each of 96 prompts."""
        tokens = 8 * 96 * 100
        return Plan(rows=8 * 96, tokens=tokens, flops=2 * PARAMETERS * tokens, memory=PARAMETERS * 4 + 1e9)


@dataclass(frozen=True, kw_only=True)
class Select(Stage):
    """Make pairs, rankings or demonstrations of answers by a builder (`posttrain.rewards.builders`); writes ``data/PART.jsonl``.

    ``options`` are the builder's. ``data`` may be several stages, whose examples follow each other. ``chunk`` (k, n) takes the
    k-th (from 0) of n runs of the examples.
    """

    WORK: ClassVar[str] = "posttrain.work.select:run"
    TINY: ClassVar[Mapping[str, Any]] = {"data": "smallworld"}
    data: str | Stage | tuple[Stage, ...]
    builder: str
    options: dict[str, float] = field(default_factory=dict[str, float])
    part: str | None = None
    chunk: tuple[int, int] | None = None
    limit: int | None = None
    skip_bad: int = 0

    def sized(self, tiny: bool, typed: Collection[str] = ()) -> Any:
        """The stage as it will run: data that stages make stays at every size."""
        return super().sized(tiny, typed) if isinstance(self.data, str) else self

    def __post_init__(self) -> None:
        """Refuse a chunk that is not there."""
        if self.chunk is not None and not 0 <= self.chunk[0] < self.chunk[1]:
            raise ConfigError(f"got chunk={self.chunk}; expected (k, n) with k from 0 to n - 1")

    def check(self) -> None:
        """Also refuse a builder that is not known, or an option that it does not have."""
        from posttrain.rewards.builders import builders

        builders.bound(self.builder, self.options)
        super().check()
