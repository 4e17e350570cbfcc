"""Preference optimisation on single answers: labelled good or bad, or rated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from posttrain.data.collate import demonstration_rows
from posttrain.data.views import labelled, rated
from posttrain.errors import DataError
from posttrain.forest import Row
from posttrain.losses import find_loss, valued_losses
from posttrain.models.load import load_policy, new_reward, save_merged
from posttrain.stages import Context, PreferLabelled
from posttrain.train.loop import fit
from posttrain.train.objectives import objective_of
from posttrain.train.optim import Optim
from posttrain.train.sources import response_source, with_mismatched
from posttrain.types import Example
from posttrain.work.inputs import choose_dtype, load_examples, row_weights, start_from
from posttrain.work.online_merging import merged_steps
from posttrain.work.prefer import MARGIN, reference_role, start_logp
from posttrain.work.supervised import adapters, training_run


def run(stage: PreferLabelled, ctx: Context) -> None:
    """Train on the answers against the start model, and write the model."""
    start = start_from(stage.model, ctx)
    dtype = choose_dtype(stage.dtype, start.path)
    objective = objective_of(stage.loss, stage.loss_options(), MARGIN[dtype])
    valued = find_loss(stage.loss) is valued_losses
    read = load_examples(stage, ctx, "labelled")
    examples = rated(read) if valued else labelled(read)
    rows, report = demonstration_rows(
        start.tokenizer, unjudged(examples), max_length=stage.max_length, overlong=stage.overlong
    )
    ctx.console.print(f"answers: {report}", highlight=False)
    kept = [examples[i] for i in report.index]
    if objective.facts.get("mismatched"):
        rows = with_mismatched(rows, max_length=stage.max_length, seed=ctx.seed)
        alone = sum(len(row.branches) == 1 for row in rows)
        said = f", {alone} have none that fits max_length" if alone else ""
        ctx.console.print(f"answers to other prompts: {len(rows) - alone} rows have one{said}", highlight=False)
    policy = load_policy(start.path, dtype=dtype, lora=adapters(stage), train=True, seed=ctx.seed)
    source = response_source(
        rows,
        {"reward": [[r] for r in standardised(kept)]} if valued else label_columns(rows, kept),
        {"ref_logp": start_logp(policy, rows, stage.max_tokens, ctx)},
        per_step=stage.prompts_per_step,
        seed=ctx.seed,
        weights=row_weights(kept, ctx),
    )
    models = {"policy": policy} | reference_role(objective, policy, start, dtype)
    if valued:
        models["value"] = new_reward(start.path, dtype=dtype, seed=ctx.seed + 1, lora=adapters(stage))
    optim = Optim(
        lr=stage.lr,
        role_lr={"value": stage.value_lr} if valued else {},
        schedule=stage.schedule,
        warmup_steps=stage.warmup_steps,
        merge=merged_steps(stage, ctx, start, policy),
    )
    run = training_run(stage, ctx, round(stage.epochs * source.steps_per_epoch), ctx.dir.name)
    fit(models, objective, source, optim=optim, run=run)
    save_merged(policy, start.path, ctx.dir, start.tokenizer)


def unjudged(examples: Sequence[Example]) -> list[Example]:
    """The answers without what was said of them, to be put into tokens: bad ones are no demonstrations, but are read here."""
    return [
        replace(e, responses=tuple(replace(r, label=None, score=None, failure=None) for r in e.responses))
        for e in examples
    ]


def label_columns(rows: Sequence[Row], examples: Sequence[Example]) -> dict[str, list[list[int]]]:
    """Of every response whether it is good, and whether it answers its own prompt."""
    good = [int(bool(e.responses[0].label)) for e in examples]
    return {
        "label": [[x, *(0 for _ in row.branches[1:])] for x, row in zip(good, rows, strict=True)],
        "matched": [[1, *(0 for _ in row.branches[1:])] for row in rows],
    }


def standardised(examples: Sequence[Example]) -> list[float]:
    """Scores less their mean, over their deviation, over the whole data.

    Raises:
        DataError: all scores are equal.
    """
    scores = torch.tensor([e.responses[0].score or 0.0 for e in examples], dtype=torch.float64)
    deviation = float(scores.std(correction=0))
    if not deviation > 0 or not math.isfinite(deviation):
        raise DataError(f"all {len(scores)} scores are {float(scores[0]):g}; expected better and worse answers")
    return ((scores - scores.mean()) / deviation).tolist()
