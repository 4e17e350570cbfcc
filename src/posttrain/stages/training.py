"""Stages that train a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from posttrain.errors import ConfigError
from posttrain.stages.base import PARAMETERS, TOKENS_A_ROW, History, Overlong, Plan, Stage

KEPT, KEPT_CHECKPOINTED = 1.05e6, 0.1e6
"""Bytes that the default model's layers keep of a token in bf16, and with their inputs alone kept."""


@dataclass(frozen=True, kw_only=True)
class Training(Stage):
    """What every training stage has: where it starts, on which data, how it moves.

    ``model`` is a name, a directory or an earlier stage, and so is ``data``; ``lora_rank`` 0 trains the whole network; ``dtype``
    "auto" is bf16 where the processor multiplies it faster than fp32. ``max_tokens`` is the memory knob. A checkpoint is written every
    ``save_every`` steps and the newest ``keep`` stay. ``skip_bad`` faulty rows of the data are left out and counted.

    ``checkpointing`` computes what layers keep for the backward pass again: less memory, a third more time, equal numbers.

    ``merging`` merges each step of a policy trained whole with what ``model`` had learnt since ``merging_base`` (a name, directory
    or stage): "none", or a rule of `posttrain.train.online_merging`, with the share ``merging_alpha`` of that and the share
    ``merging_keep`` of entries.
    """

    MERGED: ClassVar[bool] = False
    """Whether the stage's work merges its policy's steps."""
    model: str | Stage = "smollm2"
    data: str | Stage = "default"
    lr: float = 1e-5
    schedule: str = "cosine"
    warmup_steps: int = 0
    lora_rank: int = 0
    lora_alpha: int = 32
    merging: str = "none"
    merging_base: str | Stage | None = None
    merging_alpha: float = 1e-7
    merging_keep: float = 0.5
    dtype: str = "auto"
    max_length: int = 2048
    overlong: Overlong = "error"
    max_tokens: int = 1024
    checkpointing: bool = False
    save_every: int = 10
    keep: int = 2
    limit: int | None = None
    skip_bad: int = 0

    def __post_init__(self) -> None:
        """Refuse values that would fail late."""
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ConfigError(f"got dtype '{self.dtype}'; expected auto, float32 or bfloat16")
        if self.lr <= 0 or self.lora_rank < 0 or self.max_tokens < 1:
            raise ConfigError(
                f"got lr={self.lr}, lora_rank={self.lora_rank}, max_tokens={self.max_tokens}; expected lr > 0, rank >= 0, tokens >= 1"
            )

    def check(self) -> None:
        """Also refuse a merging that can't be."""
        if self.merging != "none":
            from posttrain.train.online_merging import check_numbers

            check_numbers(self.merging, self.merging_alpha, self.merging_keep)
            if not self.MERGED or self.lora_rank or self.merging_base is None:
                got = f"lora_rank={self.lora_rank}, merging_base={self.merging_base}"
                raise ConfigError(
                    f"got merging='{self.merging}' with {got} in {type(self).__name__}; it merges steps of a policy that is trained "
                    "whole (lora_rank 0) with what it learnt since merging_base, a model"
                )
        super().check()

    def step_flops(self, tokens: float) -> float:
        """Forward and backward of ``tokens``: 6 operations a parameter, 4.4 when only adapters are trained; 2 to compute again."""
        return ((4.4 if self.lora_rank else 6.0) + 2.0 * self.checkpointing) * PARAMETERS * tokens

    def weights(self) -> float:
        """Bytes of weights, masters and moments."""
        return PARAMETERS * (4.5 if self.lora_rank else 16.0)

    def working(self) -> float:
        """Bytes of a step beyond `weights`: gradients, a chunk of logits, what layers keep of each token of a pass."""
        return 0.9e9 + (KEPT_CHECKPOINTED if self.checkpointing else KEPT) * self.max_tokens


def refuse_uneven(prompts_per_step: int, steps: int, updates_per_rollout: int) -> None:
    """Refuse rollouts that can't be cut into updates of whole prompts, or steps that end within a rollout.

    Raises:
        ConfigError: the updates don't divide both.
    """
    if prompts_per_step % updates_per_rollout or steps % updates_per_rollout:
        raise ConfigError(
            f"got updates_per_rollout={updates_per_rollout} with prompts_per_step={prompts_per_step} and "
            f"steps={steps}; expected it to divide both"
        )


@dataclass(frozen=True, kw_only=True)
class Pretrain(Training):
    """Train the small model from nothing on the small world's documents and dialogues, its tokenizer first.

    ``documents`` counts each of the two kinds. Writes a plain model directory.
    """

    WORK: ClassVar[str] = "posttrain.work.pretrain:run"
    lr: float = 3e-3
    schedule: str = "linear"
    dtype: str = "float32"
    documents: int = 34000
    rows_per_step: int = 16

    def plan(self) -> Plan:
        """1.8M parameters, 32 tokens a document."""
        tokens = 2 * self.documents * 32
        return Plan(rows=2 * self.documents, tokens=tokens, flops=6 * 1.8e6 * tokens, memory=1e9)

    def files(self) -> list[Path]:
        """Nothing is read: the documents are generated."""
        return []


@dataclass(frozen=True, kw_only=True)
class SFT(Training):
    """Supervised fine-tuning on demonstrations (Ouyang et al. 2022, section 3.5: 16 epochs, cosine, batch 32 for 1.3B).

    ``history`` says what to do where the template rewrites earlier turns (thinking that it strips): refuse, train the last
    turn only, or make each trained turn a row of its own, after the history as it read then. ``noise`` is NEFTune's alpha, 0
    for none. Writes a plain model directory (``model.safetensors``, config, tokenizer with its chat template).
    """

    WORK: ClassVar[str] = "posttrain.work.supervised:run"
    MERGED: ClassVar[bool] = True
    DATA: ClassVar[tuple[str, ...]] = ("demonstrations",)
    TINY: ClassVar[Mapping[str, Any]] = {
        "model": "small-base",
        "data": "smallworld",
        "lora_rank": 0,
        "lr": 1e-3,
        "epochs": 2.0,
    }
    epochs: float = 16.0
    prompts_per_step: int = 32
    history: History = "refuse"
    noise: float = 0.0

    def plan(self) -> Plan:
        """96 demonstrations, unless limited."""
        rows = min(self.limit or 96, 96)
        tokens = int(rows * TOKENS_A_ROW * self.epochs)
        return Plan(rows=rows, tokens=tokens, flops=self.step_flops(tokens), memory=self.weights() + self.working())


@dataclass(frozen=True, kw_only=True)
class TrainReward(Training):
    """A Bradley-Terry reward model on rankings (Ouyang et al. 2022, section 3.4: 1 epoch, 64 prompts a batch, lr 9e-6 cosine).

    ``rows`` picks a slice of the rankings, so that two models can learn from different prompts; ``head_seed`` starts the
    head. Writes a ``ForSequenceClassification`` directory and ``reward.json`` with the mean score of demonstrations.
    """

    WORK: ClassVar[str] = "posttrain.work.reward:run"
    DATA: ClassVar[tuple[str, ...]] = ("rankings", "demonstrations")
    TINY: ClassVar[Mapping[str, Any]] = {
        "model": "small",
        "data": "smallworld",
        "lora_rank": 0,
        "lr": 1e-3,
        "epochs": 3.0,
    }
    epochs: float = 1.0
    prompts_per_step: int = 64
    rows: tuple[int, int] | None = None
    head_seed: int = 0

    def plan(self) -> Plan:
        """128 rankings of four, the prompt of each computed once."""
        rows = self.rows[1] - self.rows[0] if self.rows else min(self.limit or 128, 128)
        tokens = int(rows * 230 * self.epochs)
        return Plan(rows=rows, tokens=tokens, flops=self.step_flops(tokens), memory=self.weights() + self.working())


def merged_options(options: Mapping[str, float], beta: float | None) -> dict[str, float]:
    """A loss's options with its scale, which has a field of its own; refuses one that is given in both places."""
    if beta is not None and "beta" in options:
        raise ConfigError(
            f"got beta={beta:g} and beta={options['beta']:g} among the loss's options; give it once, as beta"
        )
    return dict(options) | ({} if beta is None else {"beta": beta})


@dataclass(frozen=True, kw_only=True)
class Prefer(Training):
    """Preference optimisation on pairs or rankings (Rafailov et al. 2023, appendix B: batch 64, lr 1e-6, 150 steps of warm-up).

    The reference is the model it starts from: with LoRA the base with its adapter off, else a frozen snapshot. ``loss``
    is a name out of `posttrain.losses` (or ``module:function``), ``beta`` its scale (None: the loss's own default),
    ``options`` its other keyword arguments. A loss that reads scores wants them in the data. ``noise`` is NEFTune's alpha
    on the policy's embeddings, 0 for none; the reference has none. Writes a plain model directory, the adapter merged.
    """

    WORK: ClassVar[str] = "posttrain.work.prefer:run"
    MERGED: ClassVar[bool] = True
    DATA: ClassVar[tuple[str, ...]] = ("rankings",)
    TINY: ClassVar[Mapping[str, Any]] = {
        "model": "small", "data": "smallworld", "lora_rank": 0, "lr": 1e-4, "epochs": 1.0, "prompts_per_step": 8, "warmup_steps": 2,
    }  # fmt: skip
    loss: str = "dpo"
    beta: float | None = None
    options: dict[str, float] = field(default_factory=dict[str, float])
    noise: float = 0.0
    lr: float = 1e-6
    schedule: str = "constant"
    warmup_steps: int = 150
    epochs: float = 1.0
    prompts_per_step: int = 64

    def loss_options(self) -> dict[str, float]:
        """The loss's keyword arguments that are not left to its defaults."""
        return merged_options(self.options, self.beta)

    def check(self) -> None:
        """Also refuse a loss that is not known or learns from other data, or an option that it does not have."""
        from posttrain.losses import explored_losses, find_loss, unpaired_losses, valued_losses

        kind = find_loss(self.loss)
        kind.bound(self.loss, self.loss_options())
        if self.noise and (kind.facts(self.loss).get("coupled") or self.DATA[0] == "labelled"):
            raise ConfigError(
                f"got noise={self.noise:g}; losses that couple a whole step, or of single answers, take none"
            )
        if kind is explored_losses:
            raise ConfigError(f"'{self.loss}' learns from samples made while it runs, which this stage does not make")
        if (kind in (unpaired_losses, valued_losses)) != (self.DATA[0] == "labelled"):
            other = "PreferLabelled" if self.DATA[0] != "labelled" else "Prefer"
            way = f"`posttrain train {self.loss}`, the stage {other}"
            raise ConfigError(f"'{self.loss}' does not learn from {self.DATA[0]}; use {way}")
        super().check()

    def plan(self) -> Plan:
        """128 rankings of four, the prompt of each computed once; the reference's pass is a third of a step's forward and backward."""
        rows = min(self.limit or 128, 128)
        tokens = int(rows * 230 * self.epochs)
        flops = self.step_flops(tokens) + 2 * PARAMETERS * rows * 230
        return Plan(rows=rows, tokens=tokens, flops=flops, memory=self.weights() + self.working())


@dataclass(frozen=True, kw_only=True)
class PreferLabelled(Prefer):
    """Preference optimisation on single answers, each labelled good or bad or rated (Ethayarajh et al. 2024: batch 32, lr 5e-7).

    Of pairs and rankings the best answer is a good one and the worst a bad one (rated 1 and 0, unless they have scores).
    ``loss`` is a name in `posttrain.losses.unpaired_losses`, or in ``valued_losses``: then rewards are scaled to mean 0 and
    deviation 1 over the data, and a value network with a head from zero learns at ``value_lr``.
    """

    WORK: ClassVar[str] = "posttrain.work.labelled:run"
    DATA: ClassVar[tuple[str, ...]] = ("labelled",)
    TINY: ClassVar[Mapping[str, Any]] = {
        "model": "small", "data": "smallworld", "lora_rank": 0, "lr": 1e-4, "epochs": 1.0, "warmup_steps": 2,
    }  # fmt: skip
    loss: str = "kto"
    lr: float = 5e-7
    value_lr: float = 1e-4
    prompts_per_step: int = 32
