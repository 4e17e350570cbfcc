"""Stages that train a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from posttrain.errors import ConfigError
from posttrain.stages.base import PARAMETERS, TOKENS_A_ROW, History, Overlong, Plan, Stage
from posttrain.train.algorithms import Algorithm, check_penalty, find_algorithm

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
        return dict(self.options) | ({} if self.beta is None else {"beta": self.beta})

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
            raise ConfigError(f"'{self.loss}' does not learn from {self.DATA[0]}; use the stage {other}")
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

    ``loss`` is a name in `posttrain.losses.unpaired_losses`, or in ``valued_losses``: then rewards are scaled to mean 0 and
    deviation 1 over the data, and a value network with a head from zero learns at ``value_lr``.
    """

    WORK: ClassVar[str] = "posttrain.work.labelled:run"
    DATA: ClassVar[tuple[str, ...]] = ("labelled",)
    TINY: ClassVar[Mapping[str, Any]] = {"model": "small", "lora_rank": 0, "lr": 1e-4, "epochs": 1.0}
    loss: str = "kto"
    lr: float = 5e-7
    value_lr: float = 1e-4
    prompts_per_step: int = 32


@dataclass(frozen=True, kw_only=True)
class Reinforce(Training):
    """Policy gradients against a reward model; sizes are InstructGPT's (Ouyang et al. 2022, section 3.5 and appendix C.4).

    ``algorithm`` is a row of `posttrain.train.algorithms`, ``options`` keyword arguments of its loss (``clip`` is one of
    PPO's). ``penalty`` is where the KL to the start stands and which estimator of it, ``kl`` its coefficient; None: the
    algorithm's own. ``reward`` is a `TrainReward` stage, the directory that one wrote, a name (`posttrain.rewards.named`) or
    ``module:function`` of (prompt, answer). ``lr`` is the policy's and ``value_lr`` the critic's learning rate. The critic, where
    the algorithm has one, starts as the reward model, or, where there is none, as the policy does with a head of zeros; with
    ``value_rank`` 0 and adapters elsewhere only its head is trained. A response cut by length scores ``cut_score``, and
    with ``mask_cut`` is no part of the loss; ``overlong_share`` is the last share of the length over which scores fall by
    1. With ``rounds`` above 1, prompts whose responses all score the same are replaced by others. ``kl_target`` steers a
    penalty in the reward to so many nats a sequence. ``mismatch`` is the weight of tokens where the sampler is not the
    trainer (`posttrain.losses.shaping`). Where the KL of a rollout exceeds ``max_kl`` (nats a sequence) the stage stops,
    says why, and keeps the last checkpoint below it. Writes the policy (an adapter for peft, or a model directory).
    """

    WORK: ClassVar[str] = "posttrain.work.reinforce:run"
    FUNCTIONS: ClassVar[bool] = True
    MERGED: ClassVar[bool] = True
    DATA: ClassVar[tuple[str, ...]] = ("prompts",)
    TINY: ClassVar[Mapping[str, Any]] = {
        "model": "small", "data": "smallworld", "lora_rank": 8, "lr": 1e-3, "steps": 12, "prompts_per_step": 8, "samples_per_prompt": 2,
        "updates_per_rollout": 1, "max_new_tokens": 32,
    }  # fmt: skip
    reward: Stage | str
    algorithm: str = "ppo"
    options: dict[str, float] = field(default_factory=dict[str, float])
    penalty: str | None = None
    lr: float = 9e-6
    schedule: str = "constant"
    warmup_steps: int = 10
    value_lr: float = 9e-6
    value_rank: int = 0
    steps: int = 4000
    prompts_per_step: int = 512
    samples_per_prompt: int = 1
    updates_per_rollout: int = 8
    max_new_tokens: int = 128
    temperature: float = 1.0
    kl: float | None = None
    kl_target: float | None = None
    clip: float | None = None
    value_clip: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False
    cut_score: float | None = None
    mask_cut: bool = False
    overlong_share: float | None = None
    rounds: int | None = None
    mismatch: str | None = None
    max_kl: float | None = None
    slots: int = 32

    def __post_init__(self) -> None:
        """Refuse values that would fail late."""
        super().__post_init__()
        if self.prompts_per_step % self.updates_per_rollout or self.steps % self.updates_per_rollout:
            raise ConfigError(
                f"got updates_per_rollout={self.updates_per_rollout} with prompts_per_step={self.prompts_per_step} and "
                f"steps={self.steps}; expected it to divide both"
            )
        row, samples = self.row(), self.samples_per_prompt
        if ("groups" in row.needs and samples < 2) or ("pairs" in row.needs and samples != 2):
            wanted = "2" if "pairs" in row.needs else "at least 2"
            raise ConfigError(
                f"{self.algorithm} compares the responses to one prompt: got samples_per_prompt={samples}, expected {wanted}"
            )
        if self.kl_target is not None and not row.penalty.startswith("reward"):
            raise ConfigError(
                f"got kl_target={self.kl_target:g}, which moves a penalty in the reward; {self.algorithm} has '{row.penalty}'"
            )

    def row(self) -> Algorithm:
        """The algorithm with what this stage changes of it: penalty, its coefficient, options of the loss.

        Raises:
            ConfigError: a penalty that can't be, or a coefficient without a penalty.
        """
        row = find_algorithm(self.algorithm)
        penalty = row.penalty if self.penalty is None else self.penalty
        check_penalty(penalty)
        if penalty == "none" and self.kl:
            raise ConfigError(
                f"got kl={self.kl:g} but {self.algorithm} has no KL penalty; give one, such as penalty='loss:k2', or kl 0"
            )
        numbers = {"kl": 0.0, "rounds": 1, "overlong_share": 0.0, **row.numbers}
        numbers |= {k: v for k in ("kl", "rounds", "overlong_share") if (v := getattr(self, k)) is not None}
        options = {**row.options, **self.options} | ({} if self.clip is None else {"clip": self.clip})
        return replace(row, penalty=penalty, numbers=numbers, options=options)

    def check(self) -> None:
        """Also refuse what the algorithm's loss or advantage does not read, or the reward can't give."""
        from posttrain.losses.advantages import advantages
        from posttrain.losses.policy import policy_losses
        from posttrain.losses.shaping import mismatch_weights
        from posttrain.registry import keyword_defaults

        row = self.row()
        policy_losses.bound(row.loss, row.options)
        if self.mismatch is not None:
            mismatch_weights.bound(self.mismatch, {})
        known = keyword_defaults(advantages[row.advantage])
        for name, usual in (("gamma", 1.0), ("lam", 0.95)):
            if getattr(self, name) != usual and name not in known and "critic" not in row.needs:
                raise ConfigError(
                    f"{self.algorithm} has no {name}: its advantage is '{row.advantage}'; leave it at {usual}"
                )
        if "steps" in row.needs:
            raise ConfigError(
                f"{self.algorithm} reads scores of steps of reasoning, which a reward model of whole responses does not give; "
                "use posttrain.train.rollouts.RolloutSource with a reward that does, or another algorithm"
            )
        super().check()

    def plan(self) -> Plan:
        """Sampling, three forward passes and training for every response."""
        rollouts = self.steps // self.updates_per_rollout
        samples = rollouts * self.prompts_per_step * self.samples_per_prompt
        tokens = int(samples * (50 / self.samples_per_prompt + 0.7 * self.max_new_tokens))
        critic = 2.0 if self.lora_rank and not self.value_rank else 4.4
        flops = self.step_flops(tokens) + (2 * 3 + critic) * PARAMETERS * tokens
        return Plan(rows=samples, tokens=tokens, flops=flops, memory=2 * self.weights() + self.working())
