"""Quark: a policy that learns to write at a level of reward, and the stage that measures whether it does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from posttrain.errors import ConfigError
from posttrain.stages.base import PARAMETERS, Plan, Stage
from posttrain.stages.training import Training


@dataclass(frozen=True, kw_only=True)
class Quark(Training):
    """Learn each sampled response after a token for its bin of reward (Lu et al. 2022, arXiv 2205.13636; sizes of the authors' code).

    Every ``explore_every`` steps each prompt is answered, ``samples_per_prompt`` times: first by the start, then by the policy after
    the best token. Answers join a pool, which is sorted into ``bins`` of equal size. A step learns ``rows_per_step`` of the pool:
    likelihood, ``beta`` times the KL to the start over the vocabulary (``kl_direction`` "reverse" is KL(policy || start)) and
    ``-eta`` times the entropy. ``reward`` is as in `Reinforce`; a response cut by length scores ``cut_score``. The network is trained
    whole. Writes a plain model directory whose tokenizer has the ``bins`` tokens ``<|reward_K|>``, 0 the best, which no
    generation writes, and whose chat template begins with the best: used as it is, the model aims high.
    """

    WORK: ClassVar[str] = "posttrain.work.quark:run"
    FUNCTIONS: ClassVar[bool] = True
    DATA: ClassVar[tuple[str, ...]] = ("prompts",)
    TINY: ClassVar[Mapping[str, Any]] = {
        "model": "small", "data": "smallworld", "lr": 3e-4, "steps": 16, "explore_every": 8, "rows_per_step": 16, "warmup_steps": 2,
        "max_new_tokens": 32,
    }  # fmt: skip
    reward: Stage | str
    bins: int = 5
    beta: float = 0.05
    eta: float = 0.06
    kl_direction: Literal["reverse", "forward"] = "reverse"
    lr: float = 1e-5
    schedule: str = "linear"
    warmup_steps: int = 500
    steps: int = 23500
    explore_every: int = 500
    rows_per_step: int = 128
    samples_per_prompt: int = 1
    max_new_tokens: int = 20
    cut_score: float | None = None
    slots: int = 32

    def __post_init__(self) -> None:
        """Refuse values that would fail late."""
        super().__post_init__()
        if self.bins < 2 or self.rows_per_step < 1 or self.explore_every < 1 or self.steps % self.explore_every:
            raise ConfigError(
                f"got bins={self.bins}, rows_per_step={self.rows_per_step}, explore_every={self.explore_every}, steps={self.steps}; "
                "expected at least 2 bins, 1 row and 1 step, and explorations that divide the steps"
            )
        if self.lora_rank:
            raise ConfigError(f"got lora_rank={self.lora_rank}; the reward tokens' embeddings want a whole network (0)")

    def plan(self) -> Plan:
        """96 prompts sampled in each exploration, then two forward passes and training of every row."""
        sampled = self.steps // self.explore_every * 96 * self.samples_per_prompt
        tokens = self.steps * self.rows_per_step * (30 + 0.7 * self.max_new_tokens)
        new = sampled * (30 + 0.7 * self.max_new_tokens)
        flops = self.step_flops(tokens) + 2 * PARAMETERS * (tokens + 2 * new)
        return Plan(rows=sampled, tokens=int(tokens), flops=flops, memory=2 * self.weights() + self.working())


@dataclass(frozen=True, kw_only=True)
class EvaluateQuark(Stage):
    """Score what a `Quark` policy writes after each of its tokens on held-out prompts, beside its start.

    Writes ``results.json``; ``rank_correlation`` there is Spearman's rho of bin and mean score, 1 where every better token gives the
    better mean.
    """

    WORK: ClassVar[str] = "posttrain.work.quark:evaluate"
    FUNCTIONS: ClassVar[bool] = True
    DATA: ClassVar[tuple[str, ...]] = ("heldout_prompts",)
    TINY: ClassVar[Mapping[str, Any]] = {
        "reference": "small",
        "data": "smallworld",
        "prompts": 16,
        "max_new_tokens": 32,
    }
    policy: Stage
    reference: str | Stage = "smollm2"
    reward: Stage | str
    data: str = "default"
    prompts: int | None = None
    samples: int = 2
    max_new_tokens: int = 64
    dtype: str = "auto"
    max_tokens: int = 1024
    slots: int = 128

    def plan(self) -> Plan:
        """Six policies sampled on 96 prompts."""
        rows = 6 * self.samples * (self.prompts or 96)
        tokens = int(rows * (50 / self.samples + 0.6 * self.max_new_tokens))
        return Plan(rows=rows, tokens=tokens, flops=2 * PARAMETERS * 3 * tokens, memory=PARAMETERS * 8 + 1e9)
