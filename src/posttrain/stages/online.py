"""Preference optimisation on samples that are made while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from posttrain.errors import ConfigError
from posttrain.stages.base import PARAMETERS, Plan, Stage
from posttrain.stages.training import Training, merged_options


@dataclass(frozen=True, kw_only=True)
class PreferOnline(Training):
    """Any preference loss on fresh samples that a reward puts in order (Guo et al. 2024, online DPO: temperature 0.9).

    Each step reads ``prompts_per_step`` prompts with ``samples_per_prompt`` answers each: pairs are the best over the worst. Losses
    that want an opponent's sample get one policy sample and one of the reference (``xpo``) or of the mixture of both with the
    reference's ``share`` (``nash_md``). ``reward`` is a `TrainReward` stage, the directory that one wrote, a name
    (`posttrain.rewards.named`) or ``module:function``, of (prompt, answer) a score, of (prompt, a, b) the probability that a is
    better. The reference is the model that training starts from. ``loss``, ``beta`` and ``options`` are as in `Prefer`. A rollout serves
    ``max_staleness + 1`` steps. A response cut by length scores ``cut_score``. Writes a plain model directory.
    """

    WORK: ClassVar[str] = "posttrain.work.online:run"
    DATA: ClassVar[tuple[str, ...]] = ("prompts",)
    FUNCTIONS: ClassVar[bool] = True
    MERGED: ClassVar[bool] = True
    TINY: ClassVar[Mapping[str, Any]] = {
        "model": "small", "data": "smallworld", "lora_rank": 0, "lr": 1e-4, "steps": 8, "prompts_per_step": 8, "warmup_steps": 2,
        "max_new_tokens": 32,
    }  # fmt: skip
    reward: Stage | str
    loss: str = "dpo"
    beta: float | None = None
    options: dict[str, float] = field(default_factory=dict[str, float])
    lr: float = 5e-7
    schedule: str = "constant"
    warmup_steps: int = 150
    steps: int = 1000
    prompts_per_step: int = 128
    samples_per_prompt: int = 2
    max_staleness: int = 0
    max_new_tokens: int = 128
    temperature: float = 0.9
    share: float = 0.25
    cut_score: float | None = None
    slots: int = 32

    def __post_init__(self) -> None:
        """Refuse values that would fail late."""
        super().__post_init__()
        if self.samples_per_prompt < 2 or self.max_staleness < 0 or not 0 <= self.share <= 1:
            raise ConfigError(
                f"got samples_per_prompt={self.samples_per_prompt}, max_staleness={self.max_staleness}, share={self.share:g}; "
                "expected at least 2 samples, staleness of at least 0 updates, a share from 0 to 1"
            )

    def loss_options(self) -> dict[str, float]:
        """The loss's keyword arguments that are not left to its defaults."""
        return merged_options(self.options, self.beta)

    def check(self) -> None:
        """Also refuse a loss that is not known or learns from something else, or a number of samples that it can't use."""
        from posttrain.losses import find_loss, valued_losses

        kind = find_loss(self.loss)
        kind.bound(self.loss, self.loss_options())
        if kind is valued_losses:
            raise ConfigError(
                f"'{self.loss}' learns a value network from answers with ratings, not from fresh samples: "
                f"`posttrain train {self.loss} --data FILE`, the stage PreferLabelled"
            )
        if kind.facts(self.loss).get("opponent") and self.samples_per_prompt != 2:
            raise ConfigError(
                f"'{self.loss}' compares one sample with one of its opponent's: got "
                f"samples_per_prompt={self.samples_per_prompt}, expected 2"
            )
        super().check()

    def plan(self) -> Plan:
        """Sampling, scoring, the reference and training of every response."""
        samples = self.steps * self.prompts_per_step * self.samples_per_prompt
        tokens = int(samples * (50 / self.samples_per_prompt + 0.7 * self.max_new_tokens))
        flops = self.step_flops(tokens) + 6 * PARAMETERS * tokens
        return Plan(rows=samples, tokens=tokens, flops=flops, memory=2 * self.weights() + 2e9)
