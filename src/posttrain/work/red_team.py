"""Looking for the prompts on which a policy does most harm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from posttrain.data.collate import prompt_ids
from posttrain.models.load import load_policy
from posttrain.rewards.builders import is_sampled
from posttrain.rollout.local import LocalEngine
from posttrain.stages import Context
from posttrain.stages.safety import RedTeam
from posttrain.types import Example
from posttrain.work.generate import sampled, write_part
from posttrain.work.inputs import choose_dtype, load_examples, start_from
from posttrain.work.label import completions_of
from posttrain.work.safe import judge_of

FOUND = "red_team"
"""Of a prompt's ``meta``: the mean cost of the policy's answers to it, and the share of them that are unsafe."""


def run(stage: RedTeam, ctx: Context) -> None:
    """Sample, score, keep the worst; what was found is said."""
    start = start_from(stage.model, ctx)
    dtype = choose_dtype(stage.dtype, start.path)
    judge = judge_of(stage.cost, "cost", ctx, start, dtype, stage.max_tokens)
    examples = load_examples(stage, ctx, stage.part)
    examples = examples if stage.rows is None else examples[stage.rows[0] : stage.rows[1]]
    ids, report = prompt_ids(start.tokenizer, examples, max_length=stage.max_length, overlong=stage.overlong)
    ctx.console.print(f"prompts: {report}", highlight=False)
    engine = LocalEngine(load_policy(start.path, dtype=dtype), start.stop_ids, stage.slots)
    asked = [replace(examples[i], responses=(), preferences=()) for i in report.index]
    answered = [
        replace(e, responses=tuple(r for r in e.responses if is_sampled(r)))
        for e in sampled(stage, ctx, start, engine, asked, ids)
    ]
    scores = iter(judge.score(completions_of(start.tokenizer, answered)))
    costs = [[next(scores).value for _ in e.responses] for e in answered]
    found = worst([replace(e, responses=()) for e in answered], costs, stage.keep)
    every, kept = ([x for row in rows for x in row if x is not None] for rows in (costs, [c for _, c in found]))
    means = ", ".join(
        f"{name} {sum(x) / max(len(x), 1):+.3f} (unsafe {sum(c > 0 for c in x) / max(len(x), 1):.0%})"
        for name, x in (("all", every), ("kept", kept))
    )
    ctx.console.print(f"mean cost: {means}; {len(found)} of {len(answered)} prompts kept", highlight=False)
    write_part(ctx, "prompts", (told(e, c) for e, c in found))


def worst(
    examples: Sequence[Example], costs: Sequence[Sequence[float | None]], keep: float
) -> list[tuple[Example, Sequence[float | None]]]:
    """The share ``keep`` of examples (at least one) whose responses cost most on average, in their own order; ties to the earlier.

    A response without a cost counts for nothing, an example without any comes last.
    """
    known = [[c for c in row if c is not None] for row in costs]
    mean = [sum(row) / len(row) if row else float("-inf") for row in known]
    order = sorted(range(len(examples)), key=lambda i: (-mean[i], i))
    chosen = sorted(order[: max(1, round(keep * len(examples)))])
    return [(examples[i], costs[i]) for i in chosen]


def told(example: Example, costs: Sequence[float | None]) -> Example:
    """The prompt with what was found of it."""
    known = [c for c in costs if c is not None]
    about: dict[str, Any] = {"samples": len(costs)}
    if known:
        about |= {"cost": sum(known) / len(known), "unsafe": sum(c > 0 for c in known) / len(known)}
    return replace(example, meta={**example.meta, FOUND: about})
