"""Stages for prompts whose answers can be checked: what policies score on held-out ones, and several rewards as one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from posttrain.errors import ConfigError, suggest
from posttrain.stages.base import PARAMETERS, Overlong, Plan, Stage

WHERE = ("all", "checked", "open")
"""The prompts that a part of `MixRewards` is for: all, those whose answers a program can check, or the others."""


@dataclass(frozen=True, kw_only=True)
class EvaluateTask(Stage):
    """What policies score by a reward on prompts that were not trained on, in order of training, with each part of the score.

    ``samples`` answers a prompt are drawn at ``temperature``, the same draws for every policy; with an ``environment``
    (`posttrain.rollout.environment`) conversations. Writes ``results.json``.
    """

    WORK: ClassVar[str] = "posttrain.work.evaluate_task:run"
    FUNCTIONS: ClassVar[bool] = True
    DATA: ClassVar[tuple[str, ...]] = ("heldout_prompts",)
    TINY: ClassVar[Mapping[str, Any]] = {"max_new_tokens": 64, "prompts": 8, "samples": 2}
    policies: tuple[Stage, ...]
    reward: Stage | str
    data: str = "sums"
    environment: str | None = None
    prompts: int | None = None
    samples: int = 4
    temperature: float = 1.0
    max_new_tokens: int = 128
    max_length: int = 2048
    overlong: Overlong = "error"
    skip_bad: int = 0
    dtype: str = "auto"
    max_tokens: int = 1024
    slots: int = 128

    def plan(self) -> Plan:
        """Each policy sampled on 48 prompts."""
        rows = len(self.policies) * self.samples * (self.prompts or 48)
        tokens = int(rows * (50 / self.samples + 0.7 * self.max_new_tokens))
        return Plan(rows=rows, tokens=tokens, flops=2 * PARAMETERS * tokens, memory=PARAMETERS * 4 + 1e9)


@dataclass(frozen=True, kw_only=True)
class MixRewards(Stage):
    """Several rewards as one: ``sum of weight * reward`` over those that a prompt is for; other stages take it as ``reward``.

    ``rewards`` are stages that trained a reward model, ``named`` names or ``module:function``; ``weights`` and ``where`` (of
    `WHERE`; none = all) follow them in that order. A response has no score where a part that its prompt is for gives none.
    Parts are logged. Writes ``reward.json``.
    """

    WORK: ClassVar[str] = "posttrain.work.mix_rewards:run"
    rewards: tuple[Stage, ...] = ()
    named: tuple[str, ...] = ()
    weights: tuple[float, ...]
    where: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse weights and places that are not one a reward."""
        count = len(self.rewards) + len(self.named)
        if not count or len(self.weights) != count or len(self.where) not in (0, count):
            raise ConfigError(
                f"got {count} rewards, {len(self.weights)} weights, {len(self.where)} places; expected one of each a reward"
            )
        for place in self.where:
            if place not in WHERE:
                raise ConfigError(f"got where '{place}'; {suggest(place, WHERE)}")

    def check(self) -> None:
        """Also refuse a name that is no reward."""
        from posttrain.work.inputs import reward_files

        for name in self.named:
            reward_files(name, functions=True)
        super().check()
