"""Preference optimisation on rankings, and what its implicit reward is worth on held-out ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from posttrain.data.collate import ranking_rows
from posttrain.data.views import rankings
from posttrain.evals import results as sections
from posttrain.evals import reward as rewards
from posttrain.forest import Row
from posttrain.models.load import cache_dir, load_policy, save_merged
from posttrain.models.policy import Model
from posttrain.stages import Context, EvaluatePreference, Prefer
from posttrain.train.loop import fit
from posttrain.train.objectives import Preference
from posttrain.train.progress import progress
from posttrain.train.reference import reference_logp, row_logp
from posttrain.train.sources import ranking_source
from posttrain.work.heldout import baseline_scores, fitting, machine, stage_seconds
from posttrain.work.inputs import choose_dtype, load_examples, read_part, row_weights, start_from, test_file
from posttrain.work.supervised import adapters, optimiser, training_run

MARGIN = {torch.float32: 1e-3, torch.bfloat16: 2.0}
"""Nats a pair by which rounding alone moves the margin of a policy from its reference: 0 but for how tokens are packed."""


def run(stage: Prefer, ctx: Context) -> None:
    """Ask the start model for its log-probabilities, train away from it, and write the model."""
    start = start_from(stage.model, ctx)
    examples = load_examples(stage, ctx, "rankings")
    rows, report = ranking_rows(start.tokenizer, examples, max_length=stage.max_length, overlong=stage.overlong)
    ctx.console.print(f"rankings: {report}", highlight=False)
    kept = [examples[i] for i in report.index]
    dtype = choose_dtype(stage.dtype, start.path)
    policy = load_policy(start.path, dtype=dtype, lora=adapters(stage), train=True, seed=ctx.seed)
    source = ranking_source(
        rows,
        [[r.rank or 0 for r in e.responses] for e in kept],
        per_step=stage.prompts_per_step,
        seed=ctx.seed,
        weights=row_weights(kept, ctx),
        ref_logp=start_logp(policy, rows, stage.max_tokens, ctx),
    )
    objective = Preference(stage.loss, stage.loss_options(), tolerance=MARGIN[dtype])
    run = training_run(stage, ctx, round(stage.epochs * source.steps_per_epoch), ctx.dir.name)
    fit({"policy": policy}, objective, source, optim=optimiser(stage), run=run)
    save_merged(policy, start.path, ctx.dir, start.tokenizer)


def start_logp(policy: Model, rows: Sequence[Row], max_tokens: int, ctx: Context) -> list[torch.Tensor]:
    """The reference's log-probabilities, from the policy before it is trained: its adapter off, or its weights as loaded.

    So no second network is held; a run that goes on asks before it restores its own weights.
    """
    reference = replace(policy, adapter=None, trained=False)
    with counting(ctx, "reference", rows) as update:
        return reference_logp(
            reference,
            rows,
            max_tokens=max_tokens,
            cache=cache_dir() / "reference",
            say=lambda line: ctx.console.print(f"[yellow]{line}[/]", highlight=False),
            seed=ctx.seed,
            on_done=update,
        )


@contextmanager
def counting(ctx: Context, title: str, rows: Sequence[Row]) -> Iterator[Callable[[int], None]]:
    """A bar over the responses of some rows."""
    with progress(ctx.console, title, sum(len(row.branches) for row in rows)) as update:
        yield lambda done: update(done, "")


def evaluate(stage: EvaluatePreference, ctx: Context) -> None:
    """Measure the implicit reward on training and held-out rankings; write ``results.json``."""
    start = start_from(stage.reference, ctx, "reference")
    dtype = choose_dtype(stage.dtype, start.path)
    train = rankings(load_examples(stage, ctx, "rankings"))
    test = rankings(read_part(test_file(stage), ctx, stage.test_limit, stage.skip_bad))
    kept = {
        name: fitting(start.tokenizer, examples, stage, ctx, f"{name} rankings")
        for name, examples in (("train", train), ("test", test))
    }
    policy = load_policy(str(ctx.inputs["policy"]), dtype=dtype)
    reference = load_policy(start.path, dtype=dtype)
    scores = {name: implicit_rewards(policy, reference, rows, stage, ctx, name) for name, (rows, _) in kept.items()}
    outcomes = {
        name: {
            key: rewards.pair_outcomes(s, rewards.ranking_ranks(kept[name][1]), rewards.ranking_failures(kept[name][1]))
            for key, s in scores[name].items()
        }
        for name in kept
    }
    direction, baselines = baseline_scores(kept["train"][1], kept["test"][1])
    ranks, failures = rewards.ranking_ranks(kept["test"][1]), rewards.ranking_failures(kept["test"][1])
    held = outcomes["test"] | {key: rewards.pair_outcomes(s, ranks, failures) for key, s in baselines.items()}
    learnt = {key: rewards.accuracy(pairs).mean for key, pairs in outcomes["train"].items()}
    results = sections.closing_results(
        machine=machine(),
        reward_accuracy=sections.reward_section(held, length_direction=direction),
        reward_comparisons=sections.compare_rewards(held, baselines=("start_logp", *baselines)),
        stages=stage_seconds(ctx),
    )
    sections.write_results(results | {"training_accuracy": learnt}, ctx.dir / "results.json")
    pairs = ", ".join(f"{key} {share:.3f}" for key, share in learnt.items())
    ctx.console.print(f"training pairs in the right order: {pairs}", highlight=False)


def implicit_rewards(
    policy: Model, reference: Model, rows: list[Row], stage: EvaluatePreference, ctx: Context, name: str
) -> dict[str, list[list[float]]]:
    """Scores of every response: the log-ratio of policy to reference, and each one's own log-probability, in nats."""
    sums: dict[str, list[list[float]]] = {}
    for key, model in (("policy_logp", policy), ("start_logp", reference)):
        with counting(ctx, f"{name} {key}", rows) as update:
            found = row_logp(model, rows, max_tokens=stage.max_tokens, on_done=update)
        sums[key] = [
            [float(part.double().sum()) for part in x.split([len(b.ids) for b in row.branches])]
            for x, row in zip(found, rows, strict=True)
        ]
    ratio = [[p - q for p, q in zip(a, b, strict=True)] for a, b in zip(*sums.values(), strict=True)]
    return {"implicit_reward": ratio} | sums
