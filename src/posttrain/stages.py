"""Stages of a recipe: what each reads, does and writes. Defaults are the numbers of the paper each stage names.

This file imports no torch, so that a recipe can be listed and forecast at once; the work is in `posttrain.work`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from rich.console import Console

from posttrain.errors import ConfigError

Overlong = Literal["error", "drop", "truncate_prompt_left", "truncate_completion"]
PARAMETERS = 134.5e6  # of the default model, for forecasts made before any model is looked for
TOKENS_A_ROW = 110  # prompt and answer of the default data, in tokens


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a stage will cost, known before anything is loaded.

    ``rows`` of data or prompts, ``tokens`` computed, ``flops``, peak ``memory`` in bytes.
    """

    rows: int = 0
    tokens: int = 0
    flops: float = 0.0
    memory: float = 0.0
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Context:
    """Where a stage runs: its directory, and each input's by field name (``field.0`` in a tuple)."""

    dir: Path
    inputs: dict[str, Path]
    console: Console
    seed: int = 0
    tiny: bool = False


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of a recipe; a field whose value is a stage (or a tuple of stages) is an input.

    ``WORK`` names the function ``(stage, context)`` that does it; ``TINY`` what changes at the size of the small world;
    ``DATA`` the names of the data it reads.
    """

    WORK: ClassVar[str] = ""
    TINY: ClassVar[Mapping[str, Any]] = {}
    DATA: ClassVar[tuple[str, ...]] = ()

    def run(self, ctx: Context) -> None:
        """Do the work, writing into ``ctx.dir``; on a second call, continue from the last checkpoint."""
        module, _, function = self.WORK.partition(":")
        getattr(importlib.import_module(module), function)(self.sized(ctx.tiny), ctx)

    def sized(self, tiny: bool) -> Any:
        """Return the stage as it will run: itself, or with the fields of ``TINY``."""
        return (
            replace(self, **{k: v for k, v in self.TINY.items() if not isinstance(getattr(self, k), Stage)})
            if tiny
            else self
        )

    def plan(self) -> Plan:
        """Forecast the work without loading anything."""
        return Plan()

    def files(self) -> list[Path]:
        """Return the data files and model weights the stage reads; their contents are part of its key."""
        from posttrain.work.inputs import stage_files

        return stage_files(self)

    def check(self) -> None:
        """Raise `ConfigError` if the model or data can't be found; called before any stage runs."""
        self.files()


@dataclass(frozen=True)
class Recipe:
    """A published system: its stages by name, in run order."""

    name: str
    stages: dict[str, Stage]
    summary: str = ""


@dataclass(frozen=True, kw_only=True)
class Training(Stage):
    """What every training stage has: where it starts, on which data, how it moves.

    ``model`` is a name, a directory or an earlier stage; ``lora_rank`` 0 trains the whole network; ``dtype`` "auto" is
    bf16 where the processor multiplies it faster than fp32. ``max_tokens`` is the memory knob. ``skip_bad`` faulty rows of
    the data are left out and counted.
    """

    model: str | Stage = "smollm2"
    data: str = "default"
    lr: float = 1e-5
    schedule: str = "cosine"
    warmup_steps: int = 0
    lora_rank: int = 0
    lora_alpha: int = 32
    dtype: str = "auto"
    max_length: int = 2048
    overlong: Overlong = "error"
    max_tokens: int = 1024
    save_every: int = 10
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

    def step_flops(self, tokens: float) -> float:
        """Forward and backward of ``tokens``: 6 operations a parameter, 4.4 when only adapters are trained."""
        return (4.4 if self.lora_rank else 6.0) * PARAMETERS * tokens

    def weights(self) -> float:
        """Bytes of weights, masters and moments."""
        return PARAMETERS * (4.5 if self.lora_rank else 16.0)


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

    Writes a plain model directory (``model.safetensors``, config, tokenizer with its chat template).
    """

    WORK: ClassVar[str] = "posttrain.work.supervised:run"
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

    def plan(self) -> Plan:
        """96 demonstrations, unless limited."""
        rows = min(self.limit or 96, 96)
        tokens = int(rows * TOKENS_A_ROW * self.epochs)
        return Plan(rows=rows, tokens=tokens, flops=self.step_flops(tokens), memory=self.weights() + 2e9)


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
        return Plan(rows=rows, tokens=tokens, flops=self.step_flops(tokens), memory=self.weights() + 2e9)


@dataclass(frozen=True, kw_only=True)
class Reinforce(Training):
    """PPO against a reward model, with a KL penalty to the start (Ouyang et al. 2022, section 3.5 and appendix C.4).

    ``kl`` is the penalty's coefficient, ``lr`` the policy's and ``value_lr`` the critic's learning rate. The critic starts
    as the reward model; with ``value_rank`` 0 and adapters elsewhere only its head is trained. A response cut by length
    scores ``cut_score``. Writes the policy (an adapter for peft, or a model directory).
    """

    WORK: ClassVar[str] = "posttrain.work.reinforce:run"
    DATA: ClassVar[tuple[str, ...]] = ("prompts",)
    TINY: ClassVar[Mapping[str, Any]] = {
        "model": "small", "data": "smallworld", "lora_rank": 8, "lr": 1e-3, "steps": 12, "prompts_per_step": 8, "samples_per_prompt": 2,
        "updates_per_rollout": 1, "max_new_tokens": 32,
    }  # fmt: skip
    reward: Stage
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
    kl: float = 0.02
    clip: float = 0.2
    value_clip: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False
    cut_score: float | None = None
    slots: int = 32

    def __post_init__(self) -> None:
        """Refuse values that would fail late."""
        super().__post_init__()
        if self.prompts_per_step % self.updates_per_rollout or self.steps % self.updates_per_rollout:
            raise ConfigError(
                f"got updates_per_rollout={self.updates_per_rollout} with prompts_per_step={self.prompts_per_step} and "
                f"steps={self.steps}; expected it to divide both"
            )

    def plan(self) -> Plan:
        """Sampling, three forward passes and training for every response."""
        rollouts = self.steps // self.updates_per_rollout
        samples = rollouts * self.prompts_per_step * self.samples_per_prompt
        tokens = int(samples * (50 / self.samples_per_prompt + 0.7 * self.max_new_tokens))
        critic = 2.0 if self.lora_rank and not self.value_rank else 4.4
        flops = self.step_flops(tokens) + (2 * 3 + critic) * PARAMETERS * tokens
        return Plan(rows=samples, tokens=tokens, flops=flops, memory=2 * self.weights() + 2e9)


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
    slots: int = 32

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
class EvaluateReward(Stage):
    """Accuracy of a reward model on held-out rankings, beside three baselines fitted to its training rankings.

    ``test`` names the held-out data; ``limit`` and ``test_limit`` cut both, so as training was cut,
    and ``skip_bad`` faulty rows of each are left out. Writes ``results.json``.
    """

    WORK: ClassVar[str] = "posttrain.work.evaluate_reward:run"
    DATA: ClassVar[tuple[str, ...]] = ("rankings",)
    TINY: ClassVar[Mapping[str, Any]] = {"base": "small", "data": "smallworld", "test": "smallworld"}
    base: str = "smollm2"
    reward: Stage
    data: str = "default"
    test: str = "default"
    limit: int | None = None
    test_limit: int | None = None
    skip_bad: int = 0
    max_length: int = 1024
    overlong: Overlong = "error"
    dtype: str = "auto"
    max_tokens: int = 1024

    def plan(self) -> Plan:
        """48 rankings, and the training rankings once for the frozen baseline."""
        tokens = 230 * (2 * (self.test_limit or 48) + (self.limit or 128))
        return Plan(
            rows=self.test_limit or 48, tokens=tokens, flops=2 * PARAMETERS * tokens, memory=PARAMETERS * 4 + 1e9
        )


@dataclass(frozen=True, kw_only=True)
class Merge(Stage):
    """Write a policy as one plain model directory: its adapter merged into the weights of the stage it started from."""

    WORK: ClassVar[str] = "posttrain.work.merge:run"
    policy: Stage
    base: Stage
    after: Stage | None = None  # only so that this directory is the last one written

    def plan(self) -> Plan:
        """Reading and writing weights."""
        return Plan(memory=PARAMETERS * 8)


def stage_model(stage: Stage) -> str | None:
    """The name of the model a stage loads itself, None if it comes from an input."""
    for field in fields(stage):
        if field.name in ("model", "base") and isinstance(getattr(stage, field.name), str):
            return getattr(stage, field.name)
    return None
