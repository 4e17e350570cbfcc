"""Reward under a limit on cost: the stage that trains, the one that looks for prompts that go wrong, the one that measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from posttrain.errors import ConfigError
from posttrain.stages.base import PARAMETERS, Plan, Stage
from posttrain.stages.making import Generate
from posttrain.stages.training import Training, refuse_uneven


def cost_files(cost: Stage | str) -> list[Path]:
    """Files that decide what a cost gives, of one that is a directory or ``module:function``."""
    from posttrain.work.inputs import reward_files

    return reward_files(cost, functions=True) if isinstance(cost, str) else []


@dataclass(frozen=True, kw_only=True)
class ReinforceSafely(Training):
    """PPO for a reward while the mean cost is held at ``cost_limit`` (Dai et al. 2023, Safe RLHF, arXiv 2310.12773, appendix B).

    ``reward`` is as in `Reinforce`; ``cost`` is a stage that trained a reward model of kind "cost", its directory, or
    ``module:function`` of (prompt, answer), above 0 where the answer does harm. Each has a critic, which learns at ``value_lr``.
    A Lagrange multiplier weighs cost against reward (`posttrain.train.safe.Constraint`): it starts at ``multiplier``, moves once a
    rollout by ``multiplier_rate``, and is at most ``multiplier_most``, by the mean cost of the newest ``window`` responses;
    0 never moves: reward alone. ``kl`` is the coefficient of the penalty in both rewards, whose tokens are clipped at
    ``token_clip``. A response cut by length scores ``cut_score``; its cost stays. Writes a plain model directory.
    """

    WORK: ClassVar[str] = "posttrain.work.safe:run"
    FUNCTIONS: ClassVar[bool] = True
    DATA: ClassVar[tuple[str, ...]] = ("prompts",)
    TINY: ClassVar[Mapping[str, Any]] = {
        "model": "small", "data": "smallworld", "lora_rank": 8, "lr": 1e-3, "steps": 8, "prompts_per_step": 8, "samples_per_prompt": 2,
        "updates_per_rollout": 1, "max_new_tokens": 32,
    }  # fmt: skip
    reward: Stage | str
    cost: Stage | str
    cost_limit: float = 0.0
    multiplier: float = 1.0
    multiplier_rate: float = 0.1
    multiplier_most: float = 5.0
    window: int = 128
    lr: float = 1e-5
    value_lr: float = 5e-6
    value_rank: int = 0
    steps: int = 1000
    prompts_per_step: int = 128
    samples_per_prompt: int = 1
    updates_per_rollout: int = 1
    max_new_tokens: int = 512
    temperature: float = 1.0
    kl: float = 0.01
    clip: float = 0.2
    value_clip: float = 5.0
    token_clip: float = 50.0
    gamma: float = 1.0
    lam: float = 0.95
    cut_score: float | None = None
    slots: int = 32

    def __post_init__(self) -> None:
        """Refuse values that would fail late."""
        super().__post_init__()
        refuse_uneven(self.prompts_per_step, self.steps, self.updates_per_rollout)
        if self.token_clip <= 0 or self.kl < 0:
            raise ConfigError(f"got token_clip={self.token_clip:g}, kl={self.kl:g}; expected above 0, and at least 0")

    def files(self) -> list[Path]:
        """Also the cost's."""
        return [*super().files(), *cost_files(self.cost)]

    def plan(self) -> Plan:
        """Sampling, passes of policy, reference, two scorers and two critics, and training for every response."""
        samples = self.steps // self.updates_per_rollout * self.prompts_per_step * self.samples_per_prompt
        tokens = int(samples * (50 / self.samples_per_prompt + 0.7 * self.max_new_tokens))
        critics = 2 * (2.0 if self.lora_rank and not self.value_rank else 4.4)
        flops = self.step_flops(tokens) + (2 * 5 + critics) * PARAMETERS * tokens
        return Plan(rows=samples, tokens=tokens, flops=flops, memory=3 * self.weights() + self.working())


@dataclass(frozen=True, kw_only=True)
class RedTeam(Generate):
    """Find the prompts on which a policy does most harm; writes ``data/prompts.jsonl``, in the order of the data.

    Of every prompt ``samples`` answers are sampled and their costs averaged; the share ``keep`` of prompts with the highest
    mean stays, with mean cost and share of unsafe answers under ``red_team`` in its meta. ``cost`` is as in
    `ReinforceSafely`, which trains on what this finds.
    """

    WORK: ClassVar[str] = "posttrain.work.red_team:run"
    TINY: ClassVar[Mapping[str, Any]] = {**Generate.TINY, "samples": 2}
    cost: Stage | str
    keep: float = 0.5
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        """Refuse values that would fail late."""
        super().__post_init__()
        if not 0 < self.keep <= 1:
            raise ConfigError(f"got keep={self.keep:g}; expected a share of the prompts, above 0 and at most 1")

    def files(self) -> list[Path]:
        """Also the cost's."""
        return [*super().files(), *cost_files(self.cost)]


@dataclass(frozen=True, kw_only=True)
class EvaluateSafety(Stage):
    """Reward, cost and share of unsafe answers of several policies on held-out prompts, each beside the first.

    ``policies`` are stages that wrote model directories, in order of training; KL is to the first. ``harms`` is data with the
    attribute safe (builder "harmlessness") on which the cost model's order and sign are measured. Writes ``results.json``.
    """

    WORK: ClassVar[str] = "posttrain.work.evaluate_safety:run"
    DATA: ClassVar[tuple[str, ...]] = ("heldout_prompts",)
    TINY: ClassVar[Mapping[str, Any]] = {"data": "smallworld", "prompts": 16, "max_new_tokens": 32}
    policies: tuple[Stage, ...]
    reward: Stage
    cost: Stage
    harms: Stage | None = None
    data: str = "default"
    prompts: int | None = None
    samples: int = 2
    temperature: float = 1.0
    max_new_tokens: int = 128
    dtype: str = "auto"
    max_tokens: int = 1024
    slots: int = 128

    def plan(self) -> Plan:
        """Every policy sampled on 96 prompts, scored twice."""
        rows = len(self.policies) * self.samples * (self.prompts or 96)
        tokens = int(rows * (50 / self.samples + 0.6 * self.max_new_tokens))
        return Plan(rows=rows, tokens=tokens, flops=2 * PARAMETERS * 4 * tokens, memory=PARAMETERS * 12 + 1e9)
