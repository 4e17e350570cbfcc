"""The next rows of a reward model: where a judge disagrees with it on fresh samples, and patches against hacks."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from typing import Any, cast

import torch

from posttrain.errors import ConfigError
from posttrain.registry import load_object
from posttrain.rewards.comparing import Comparison, from_scores
from posttrain.rewards.hacks import patch_pairs, preference, risen
from posttrain.rewards.panel import load_panel
from posttrain.rewards.refine import agreement, disagreements, next_rows, responses_of
from posttrain.rewards.trained import RECORD, load_reward
from posttrain.stages import Context, Stage
from posttrain.stages.refining import Patch, Refine
from posttrain.train.checkpoint import write_json
from posttrain.types import Example, Message
from posttrain.work.generate import write_part
from posttrain.work.inputs import choose_dtype, load_examples, made_files, read_part, stage_dir

CANDIDATES = 8  # phrases that rose most, of which the judge is asked


def refine(stage: Refine, ctx: Context) -> None:
    """Ask the judge about pairs of samples, keep the most surprising, and write them after the data's rankings."""
    before, samples = load_examples(stage, ctx, "rankings"), samples_of(ctx, "samples")
    place = stage_dir(stage.reward, ctx, "reward")
    panel = load_panel(str(place), dtype=choose_dtype(stage.dtype, str(place)), max_tokens=stage.max_tokens)
    found = [row.scores for row in panel.score(samples)]
    scores = [[0.0 if s is None else s for s in row] for row in found]
    judge = judge_of(stage.judge, ctx, dtype=stage.dtype, max_tokens=stage.max_tokens)
    asked = disagreements(samples, scores, judge, pairs_per_prompt=stage.pairs_per_prompt)
    rows = next_rows(samples, asked, stage.count, agreeing=stage.agreeing)
    record = {
        "asked": len(asked),
        "decided": sum(c.judge != 0.5 for c in asked),
        "agreement": agreement(samples, asked) if any(c.judge != 0.5 for c in asked) else None,
        "disagree": sum(not c.agrees for c in asked),
        "new": len(rows),
        "before": len(before),
    }
    ctx.console.print(
        f"judge asked of {record['asked']} pairs, the model is wrong on {record['disagree']}; {len(rows)} rows are new",
        highlight=False,
    )
    write_part(ctx, "rankings", [*before, *rows])
    write_json(ctx.dir / "results.json", record)


def patch(stage: Patch, ctx: Context) -> None:
    """Find the phrase that rose and that the judge does not want; write pairs against it after the data's rankings."""
    before, early, late = load_examples(stage, ctx, "rankings"), samples_of(ctx, "early"), samples_of(ctx, "late")
    judge = judge_of(stage.judge, ctx, dtype=stage.dtype, max_tokens=stage.max_tokens)
    texts = [[r.text for e in examples for r in e.responses] for examples in (early, late)]
    candidates = risen(*texts, longest=stage.longest, least=stage.least)[:CANDIDATES]
    asked = [(item, preference(late, item.phrase, judge)) for item in candidates]
    bad = [(item, value) for item, value in asked if value is not None and value > 0.5]
    hack = max(bad, key=lambda pair: pair[0].late - pair[0].early)[0] if bad else None
    rows = patch_pairs(late, early, hack.phrase, judge, stage.count) if hack else []
    said = (
        f"hack '{hack.phrase}': {hack.early:.0%} of answers had it, now {hack.late:.0%}"
        if hack
        else "no hack was found"
    )
    ctx.console.print(f"{said}; {len(rows)} patch pairs", markup=False, highlight=False)
    write_part(ctx, "rankings", [*before, *rows])
    found = [vars(item) | {"better_without": value} for item, value in asked]
    write_json(
        ctx.dir / "results.json",
        {"hack": vars(hack) if hack else None, "asked": found, "new": len(rows), "before": len(before)},
    )


def samples_of(ctx: Context, field: str) -> list[Example]:
    """The samples that an earlier stage wrote.

    Raises:
        ConfigError: it wrote none.
    """
    files = made_files(ctx.inputs[field])
    if "samples" not in files:
        raise ConfigError(f"'{ctx.inputs[field].name}' made no samples; expected a stage Generate or Label as {field}")
    return read_part(files["samples"], ctx, None)


def judge_of(judge: Stage | str, ctx: Context, *, dtype: str, max_tokens: int) -> Comparison:
    """The comparison that a judge is: a function's own, or a reward model's probability.

    A pairwise model compares; of any other the probability is ``sigmoid(score(a) - score(b))``. A model reads the last turn
    of a prompt alone, as a function does.
    """
    if isinstance(judge, str) and ":" in judge:
        function: Any = load_object(judge)
        return function if len(inspect.signature(function).parameters) == 3 else from_scores(function)
    place = stage_dir(judge, ctx, "judge")
    kind = choose_dtype(dtype, str(place)) if dtype != "float32" else torch.float32
    if json.loads((place / RECORD).read_text()).get("form") == "pairs":
        scorer = load_reward(place, dtype=kind, max_tokens=max_tokens)
        return lambda prompt, a, b: scorer.prefer([told(prompt, (a, b))])[0][0][1]
    panel = load_panel(str(place), dtype=kind, max_tokens=max_tokens)
    return from_scores(lambda prompt, answer: cast(float, panel.score([told(prompt, (answer,))])[0].scores[0]))


def told(prompt: str, answers: Sequence[str]) -> Example:
    """A prompt of one turn with answers."""
    return Example(prompt=(Message(role="user", content=prompt),), responses=responses_of(answers))
