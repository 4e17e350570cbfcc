"""Supervised fine-tuning."""

from __future__ import annotations

from posttrain.data.collate import demonstration_rows
from posttrain.models.load import load_policy, save_merged
from posttrain.models.lora import Lora
from posttrain.stages import SFT, Context, Training
from posttrain.train.loop import Run, fit
from posttrain.train.noise import with_noise
from posttrain.train.objectives import Supervised
from posttrain.train.online_merging import OnlineMerge
from posttrain.train.optim import Optim
from posttrain.train.sources import demonstration_source
from posttrain.work.inputs import choose_dtype, load_examples, row_weights, start_from
from posttrain.work.online_merging import merged_steps


def run(stage: SFT, ctx: Context) -> None:
    """Train on the demonstrations and write the model."""
    start = start_from(stage.model, ctx)
    examples = load_examples(stage, ctx, "demonstrations")
    rows, report = demonstration_rows(
        start.tokenizer, examples, max_length=stage.max_length, overlong=stage.overlong, history=stage.history
    )
    ctx.console.print(f"demonstrations: {report}", highlight=False)
    weights = row_weights([examples[i] for i in report.index], ctx)
    source = demonstration_source(rows, per_step=stage.prompts_per_step, seed=ctx.seed, weights=weights)
    model = load_policy(
        start.path, dtype=choose_dtype(stage.dtype, start.path), lora=adapters(stage), train=True, seed=ctx.seed
    )
    source = with_noise(source, model, stage.noise, ctx.seed)
    run = training_run(stage, ctx, round(stage.epochs * source.steps_per_epoch), "sft")
    optim = optimiser(stage, merged_steps(stage, ctx, start, model))
    fit({"policy": model}, Supervised(), source, optim=optim, run=run)
    save_merged(model, start.path, ctx.dir, start.tokenizer)


def adapters(stage: Training) -> Lora | None:
    """The stage's LoRA shape, None to train the whole network."""
    return Lora(rank=stage.lora_rank, alpha=stage.lora_alpha) if stage.lora_rank else None


def optimiser(stage: Training, merge: OnlineMerge | None = None) -> Optim:
    """The stage's optimiser."""
    return Optim(lr=stage.lr, schedule=stage.schedule, warmup_steps=stage.warmup_steps, merge=merge)


def training_run(stage: Training, ctx: Context, steps: int, title: str) -> Run:
    """The stage's run: its directory, length and memory knob."""
    return Run(
        directory=ctx.dir,
        steps=steps,
        max_tokens=stage.max_tokens,
        checkpointing=stage.checkpointing,
        save_every=stage.save_every,
        keep=stage.keep,
        console=ctx.console,
        title=title,
    )
