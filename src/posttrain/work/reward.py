"""Training a reward model on rankings."""

from __future__ import annotations

from posttrain.data.collate import demonstration_rows, ranking_rows
from posttrain.data.views import label_correlation
from posttrain.forest import Row
from posttrain.models.load import new_reward, save_merged
from posttrain.models.policy import Model
from posttrain.rewards.model import score_rows
from posttrain.stages import Context, TrainReward
from posttrain.train.checkpoint import write_json
from posttrain.train.loop import fit
from posttrain.train.objectives import RewardModel
from posttrain.train.sources import ranking_source
from posttrain.types import Example
from posttrain.work.inputs import Start, choose_dtype, load_examples, row_weights, start_from
from posttrain.work.supervised import adapters, optimiser, training_run


def run(stage: TrainReward, ctx: Context) -> None:
    """Train, measure the mean score of demonstrations, and write the model."""
    start = start_from(stage.model, ctx)
    examples = slice_rows(load_examples(stage, ctx, "rankings"), stage.rows)
    rows, report = ranking_rows(start.tokenizer, examples, max_length=stage.max_length, overlong=stage.overlong)
    tau = label_correlation(examples)
    ctx.console.print(
        f"rankings: {report}; better answers are the longer ones in {tau.longer_better:.0%} of {tau.pairs} pairs "
        f"(tau {tau.tau:+.2f})",
        highlight=False,
    )
    ranks = [[r.rank or 0 for r in examples[i].responses] for i in report.index]
    weights = row_weights([examples[i] for i in report.index], ctx)
    seed = ctx.seed + stage.head_seed
    source = ranking_source(rows, ranks, per_step=stage.prompts_per_step, seed=seed, weights=weights)
    model = new_reward(start.path, dtype=choose_dtype(stage.dtype, start.path), lora=adapters(stage), seed=seed)
    run = training_run(stage, ctx, round(stage.epochs * source.steps_per_epoch), ctx.dir.name)
    fit({"reward": model}, RewardModel(), source, optim=optimiser(stage), run=run)
    save_merged(model, start.path, ctx.dir, start.tokenizer)
    mean, reference = reference_score(stage, ctx, start, model, rows)
    write_json(ctx.dir / "reward.json", {"mean": mean, "reference": reference, "rankings": len(rows)})


def slice_rows(examples: list[Example], rows: tuple[int, int] | None) -> list[Example]:
    """The slice of a data set that a stage names."""
    return examples if rows is None else examples[rows[0] : rows[1]]


def reference_score(
    stage: TrainReward, ctx: Context, start: Start, model: Model, rankings: list[Row]
) -> tuple[float, str]:
    """The mean score of 64 demonstrations at most, or of as many best-ranked responses where there are none."""
    try:
        examples = load_examples(stage, ctx, "demonstrations")[:64]
    except ValueError:
        rows, name = [Row(r.prompt, r.branches[:1]) for r in rankings[:64]], "best-ranked responses"
    else:
        rows, name = (
            demonstration_rows(start.tokenizer, examples, max_length=stage.max_length, overlong=stage.overlong)[0],
            "demonstrations",
        )
    scores = [s for row in score_rows(model, rows, max_tokens=stage.max_tokens) for s in row]
    return sum(scores) / len(scores), name
