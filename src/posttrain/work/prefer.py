"""Preference optimisation on rankings, and what its implicit reward is worth on held-out ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from posttrain.data.collate import ranking_rows
from posttrain.data.views import fault, rankings, scored_as_rankings
from posttrain.evals import results as sections
from posttrain.evals import reward as rewards
from posttrain.forest import Row
from posttrain.losses.games import win_rates
from posttrain.models.load import cache_dir, load_policy, save_merged
from posttrain.models.policy import Model
from posttrain.rewards.comparing import WIN_RATE
from posttrain.stages import Context, EvaluatePreference, Prefer
from posttrain.train.loop import fit
from posttrain.train.noise import with_noise
from posttrain.train.objectives import objective_of
from posttrain.train.progress import progress
from posttrain.train.reference import reference_logp, row_logp
from posttrain.train.sources import ranking_source
from posttrain.types import Example
from posttrain.work.heldout import baseline_scores, fitting, machine, stage_seconds
from posttrain.work.inputs import Start, choose_dtype, load_examples, read_part, row_weights, start_from, test_file
from posttrain.work.online_merging import merged_steps
from posttrain.work.supervised import adapters, optimiser, training_run

MARGIN = {torch.float32: 1e-3, torch.bfloat16: 2.0}
"""Nats a pair by which rounding alone moves the margin of a policy from its reference: 0 but for how tokens are packed."""


def run(stage: Prefer, ctx: Context) -> None:
    """Ask the start model what the loss reads of a reference, train away from it, and write the model."""
    start = start_from(stage.model, ctx)
    dtype = choose_dtype(stage.dtype, start.path)
    objective = objective_of(stage.loss, stage.loss_options(), MARGIN[dtype])
    examples = ranked(load_examples(stage, ctx, "rankings"), objective, ctx)
    rows, report = ranking_rows(start.tokenizer, examples, max_length=stage.max_length, overlong=stage.overlong)
    ctx.console.print(f"rankings: {report}", highlight=False)
    kept = [examples[i] for i in report.index]
    policy = load_policy(start.path, dtype=dtype, lora=adapters(stage), train=True, seed=ctx.seed)
    against = "reference" in objective.facts.get("needs", ("reference",))
    source = ranking_source(
        rows,
        [[r.rank or 0 for r in e.responses] for e in kept],
        per_step=stage.prompts_per_step,
        seed=ctx.seed,
        weights=row_weights(kept, ctx),
        ref_logp=start_logp(policy, rows, stage.max_tokens, ctx) if against else None,
        columns=score_columns(objective, kept),
        tokens=token_columns(objective, policy, rows, start, stage.max_tokens),
    )
    source = with_noise(source, policy, stage.noise, ctx.seed)
    run = training_run(stage, ctx, round(stage.epochs * source.steps_per_epoch), ctx.dir.name)
    models = {"policy": policy} | reference_role(objective, policy, start, dtype)
    optim = optimiser(stage, merged_steps(stage, ctx, start, policy))
    fit(models, objective, source, optim=optim, run=run)
    save_merged(policy, start.path, ctx.dir, start.tokenizer)


def ranked(examples: list[Example], objective: Any, ctx: Context) -> list[Example]:
    """The examples; where the loss reads scores and there are no ranks, ranked by them, and that ties are left out is said."""
    ranks = any(r.rank is not None for e in examples for r in e.responses)
    if ranks or objective.facts.get("scores", "rank") == "rank":
        return examples
    found, ties = scored_as_rankings(examples)
    if ties:
        ctx.console.print(f"{ties} of {len(examples)} rows order nothing: all their scores are equal", highlight=False)
    return found


def score_columns(objective: Any, examples: Sequence[Example]) -> dict[str, list[list[float]]]:
    """Scores of responses as the loss means them: their own, or the probability to beat the others, or by rank alone.

    Where all responses are rated by a ``win_rate``, against more samples than stand in the data, it is that one.

    Raises:
        DataError: a response without a score that the loss reads.
    """
    meaning = objective.facts.get("scores")
    if meaning is None:
        return {}
    if meaning == "rank":
        return {"score": [[-float(r.rank or 0) for r in e.responses] for e in examples]}
    for i, e in enumerate(examples):
        for k, r in enumerate(e.responses):
            if r.score is None:
                raise fault(e, i, "score", f"response {k} (from 0) has none, which this loss reads", "score it")
    scores = [[float(r.score or 0.0) for r in e.responses] for e in examples]
    rated = [[r.attributes.get(WIN_RATE) for r in e.responses] for e in examples]
    if meaning == "win rate" and all(x is not None for row in rated for x in row):
        return {"score": [[float(x or 0.0) for x in row] for row in rated]}
    if meaning == "win rate":
        each = [torch.tensor(s, dtype=torch.float64) for s in scores]
        scores = [win_rates(s, torch.zeros(len(s), dtype=torch.long)).tolist() for s in each]
    return {"score": scores}


def token_columns(
    objective: Any, policy: Model, rows: Sequence[Row], start: Start, max_tokens: int
) -> dict[str, list[torch.Tensor]]:
    """What the loss reads of tokens that is known before training: the start model's entropies, and which are no format."""
    wanted, out = objective.facts.get("reads", ()), dict[str, list[torch.Tensor]]()
    if "ref_entropy" in wanted:
        reference = replace(policy, adapter=None, trained=False)
        largest = math.log(policy.head.weight.shape[0])
        out["ref_entropy"] = [x / largest for x in row_logp(reference, rows, max_tokens=max_tokens, stat="entropy")]
    if "written" in wanted:
        control = set(start.tokenizer.all_special_ids) | start.stop_ids
        out["written"] = [torch.tensor([i not in control for b in row.branches for i in b.ids]) for row in rows]
    return out


def reference_role(objective: Any, policy: Model, start: Start, dtype: torch.dtype) -> dict[str, Model]:
    """The frozen reference, where the loss reads a divergence from it: the policy without its adapter, or a second network."""
    if "kl" not in objective.facts.get("reads", ()):
        return {}
    if policy.adapter:
        return {"reference": replace(policy, adapter=None, trained=False)}
    return {"reference": load_policy(start.path, dtype=dtype)}


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
