"""Training an ensemble of reward models: one member after the other, each in a directory of its own."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from posttrain.models.members import save_member
from posttrain.rewards.panel import ENSEMBLE
from posttrain.rewards.trained import RECORD
from posttrain.stages import Context, TrainEnsemble, TrainScorer
from posttrain.train.checkpoint import write_json
from posttrain.work.reward_kinds import trained, write_scorer
from posttrain.work.supervised import adapters


def run(stage: TrainEnsemble, ctx: Context) -> None:
    """Train the members that are not finished, and write down how their scores are joined."""
    names = [f"member{k}" for k in range(stage.members)]
    for k, name in enumerate(names):
        if (ctx.dir / name / RECORD).exists():
            ctx.console.print(f"{name} is finished", highlight=False)
        else:
            train_member(stage, replace(ctx, dir=ctx.dir / name), k)
    joined = {"members": names, "rule": stage.rule, "penalty": stage.penalty}
    write_json(ctx.dir / RECORD, {"kind": stage.kind, "form": ENSEMBLE, "sign": 1, "mean": 0.0, **joined})


def train_member(stage: TrainEnsemble, ctx: Context, number: int) -> None:
    """Train one member; its record is written last."""
    given: dict[str, Any] = {f.name: getattr(stage, f.name) for f in fields(TrainScorer)}
    given["head_seed"] += number
    alone = TrainScorer(**given)
    ctx.dir.mkdir(parents=True, exist_ok=True)
    model, start, record = trained(alone, ctx)
    if not stage.share:
        write_scorer(model, start, ctx.dir, record)
        return
    lora = adapters(stage)
    assert lora is not None  # the stage was checked
    save_member(model, start.path, ctx.dir, lora)
    write_json(ctx.dir / RECORD, record)
