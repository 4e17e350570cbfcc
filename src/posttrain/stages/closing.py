"""Stages that measure what was trained, and the one that writes it as a plain model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from posttrain.stages.base import PARAMETERS, Overlong, Plan, Stage


@dataclass(frozen=True, kw_only=True)
class Evaluate(Stage):
    """Measure everything at the end: reward models on held-out rankings, and policies on held-out prompts.

    ``base`` is what the supervised stage started from. Writes ``results.json``.
    """

    WORK: ClassVar[str] = "posttrain.work.evaluate:run"
    DATA: ClassVar[tuple[str, ...]] = ("rankings", "heldout_rankings", "heldout_prompts")
    TINY: ClassVar[Mapping[str, Any]] = {
        "base": "small-base",
        "data": "smallworld",
        "prompts": 16,
        "max_new_tokens": 32,
    }
    base: str = "smollm2"
    sft: Stage
    policy: Stage
    reward: Stage
    unseen: Stage
    data: str = "default"
    rows: tuple[int, int] | None = None
    prompts: int | None = None
    samples: int = 2
    temperature: float = 1.0
    max_new_tokens: int = 128
    dtype: str = "auto"
    max_tokens: int = 1024
    slots: int = 128  # a wide step costs little more than a narrow one; the cache takes 23 kB a token

    def plan(self) -> Plan:
        """Three policies sampled on 96 prompts, scored twice; 48 rankings scored three times."""
        rows = 3 * self.samples * (self.prompts or 96)
        tokens = int(rows * (50 / self.samples + 0.6 * self.max_new_tokens))
        return Plan(
            rows=rows,
            tokens=tokens,
            flops=2 * PARAMETERS * (4 * tokens + 5 * 48 * 230),
            memory=PARAMETERS * 8 + 1e9,
        )


@dataclass(frozen=True, kw_only=True)
class HeldOut(Stage):
    """What stages that measure on held-out rankings have: ``data`` that was trained on, and ``test`` data that was not.

    ``limit`` and ``test_limit`` cut both, so as training was cut, and ``skip_bad`` faulty rows of each are left out.
    A subclass names a second base with what it measures: fields are listed from the last base to the first, so
    that options begin with it.
    """

    DATA: ClassVar[tuple[str, ...]] = ("rankings",)
    data: str = "default"
    test: str = "default"
    limit: int | None = None
    test_limit: int | None = None
    skip_bad: int = 0
    max_length: int = 1024
    overlong: Overlong = "error"
    dtype: str = "auto"
    max_tokens: int = 1024


@dataclass(frozen=True, kw_only=True)
class _TrainedReward(Stage):
    base: str = "smollm2"
    reward: Stage


@dataclass(frozen=True, kw_only=True)
class _TrainedPolicy(Stage):
    policy: Stage
    reference: str | Stage = "smollm2"


@dataclass(frozen=True, kw_only=True)
class EvaluateReward(HeldOut, _TrainedReward):
    """Accuracy of a reward model on held-out rankings, beside three baselines fitted to its training rankings.

    ``base`` is what it was trained from. Writes ``results.json``.
    """

    WORK: ClassVar[str] = "posttrain.work.evaluate_reward:run"
    TINY: ClassVar[Mapping[str, Any]] = {"base": "small", "data": "smallworld", "test": "smallworld"}

    def plan(self) -> Plan:
        """48 rankings, and the training rankings once for the frozen baseline."""
        tokens = 230 * (2 * (self.test_limit or 48) + (self.limit or 128))
        return Plan(
            rows=self.test_limit or 48, tokens=tokens, flops=2 * PARAMETERS * tokens, memory=PARAMETERS * 4 + 1e9
        )


@dataclass(frozen=True, kw_only=True)
class EvaluatePreference(HeldOut, _TrainedPolicy):
    """Share of pairs that a policy's implicit reward (its log-ratio to the reference) orders right, beside baselines.

    ``reference`` is what the policy started from. Writes ``results.json``.
    """

    WORK: ClassVar[str] = "posttrain.work.prefer:evaluate"
    TINY: ClassVar[Mapping[str, Any]] = {"reference": "small", "data": "smallworld", "test": "smallworld"}

    def plan(self) -> Plan:
        """Two models over 48 held-out and all training rankings."""
        rows = (self.test_limit or 48) + min(self.limit or 128, 128)
        return Plan(rows=rows, tokens=2 * 230 * rows, flops=4 * PARAMETERS * 230 * rows, memory=PARAMETERS * 8 + 1e9)


@dataclass(frozen=True, kw_only=True)
class MeasurePreference(HeldOut, _TrainedPolicy):
    """What training on preferences did to a policy: margins on held-out rankings, and KL and length of its own answers.

    ``reference`` is what the policy started from; both are sampled ``samples`` times a held-out prompt. Writes
    ``results.json``.
    """

    WORK: ClassVar[str] = "posttrain.work.measure:run"
    TINY: ClassVar[Mapping[str, Any]] = {
        "reference": "small", "data": "smallworld", "test": "smallworld", "max_new_tokens": 32,
    }  # fmt: skip
    samples: int = 1
    max_new_tokens: int = 64

    def plan(self) -> Plan:
        """Two models over 48 held-out rankings, and their answers to the prompts."""
        rows = self.test_limit or 48
        tokens = 2 * rows * (230 + self.samples * (50 + self.max_new_tokens))
        return Plan(rows=rows, tokens=tokens, flops=4 * PARAMETERS * tokens, memory=PARAMETERS * 8 + 1e9)


@dataclass(frozen=True, kw_only=True)
class Merge(Stage):
    """Write one plain model directory: a policy, its adapter added to ``base`` at full precision, or several merged.

    ``others`` are merged with ``policy`` by ``method`` (`posttrain.models.merge`) with ``weights`` (equal ones if none are given)
    and the method's ``options``. ``base`` is also what task vectors are measured from. Nothing is written unless the result
    computes what it should on 16 prompts.
    """

    WORK: ClassVar[str] = "posttrain.work.merge:run"
    policy: Stage
    base: Stage | str
    others: tuple[Stage, ...] = ()
    method: str = "average"
    weights: tuple[float, ...] = ()
    options: dict[str, float] = field(default_factory=dict[str, float])
    after: Stage | None = None  # only so that this directory is the last one written

    def check(self) -> None:
        """Also refuse a method, an option or weights that can't be."""
        from posttrain.models.merge import checked_weights, merges

        merges.bound(self.method, self.options)
        taken = merges.facts(self.method).get("weights", True)
        checked_weights(self.method, 1 + len(self.others), self.weights or None, taken)
        super().check()

    def plan(self) -> Plan:
        """Reading and writing weights; the check holds two models in fp32."""
        return Plan(memory=PARAMETERS * 8)
