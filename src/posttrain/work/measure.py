"""What training on preferences did to a policy: on held-out rankings, and in what it writes itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from posttrain.data.views import rankings
from posttrain.evals import results as sections
from posttrain.forest import Batch, Branch, Row, build_forest, split
from posttrain.models.load import load_policy
from posttrain.models.policy import Model, forward_stats
from posttrain.ops.masked import segment_sum
from posttrain.rollout.engine import Request, Rollout, Sampling
from posttrain.rollout.local import LocalEngine
from posttrain.stages import Context, MeasurePreference
from posttrain.train.reference import row_logp
from posttrain.work.heldout import fitting, machine, stage_seconds
from posttrain.work.inputs import choose_dtype, read_part, start_from, test_file

SHOWN = ("accuracy", "margin", "chosen", "rejected")
"""Numbers of held-out rankings that tables of a run show, with intervals; its results have the others as ``rankings``."""

Sums = list[list[float]]
"""Of every row and response the summed log-probability of its trained tokens, in nats."""


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """Held-out rankings and what the start says of them: ``ranks`` 0 = best, ``start`` in nats, ``lengths`` in tokens."""

    rows: Sequence[Row]
    ranks: Sequence[Sequence[int]]
    start: Sums
    lengths: list[list[int]]


def ranked(start: Model, rows: Sequence[Row], ranks: Sequence[Sequence[int]], max_tokens: int) -> Ranked:
    """Rows with the start's log-probabilities."""
    lengths = [[sum(b.masks["loss"]) for b in row.branches] for row in rows]
    return Ranked(rows=rows, ranks=ranks, start=row_sums(start, rows, max_tokens), lengths=lengths)


def row_sums(model: Model, rows: Sequence[Row], max_tokens: int) -> Sums:
    """A model's summed log-probability of every response, in nats."""
    found = row_logp(model, rows, max_tokens=max_tokens)
    parts = (x.double().split([len(b.ids) for b in row.branches]) for x, row in zip(found, rows, strict=True))
    return [[float(part.sum()) for part in row] for row in parts]


def on_rankings(policy: Sums, held: Ranked) -> dict[str, list[float]]:
    """Numbers of each ranking, averaged over its pairs of different rank.

    ``margin``: by how much more log-probability the better response gained over the start, in nats; ``margin_token``: the
    same a token of each; ``gap`` and ``gap_token``: by how much it is the more probable one, whatever the start said.
    ``accuracy`` and so on: share of pairs where that is above 0, a half where it is 0. ``chosen`` and ``rejected``:
    log-probabilities of the best response and, on average, of those below it, in nats.
    """
    out: dict[str, list[float]] = {}
    for logp, start, ranks, lengths in zip(policy, held.start, held.ranks, held.lengths, strict=True):
        gained = [p - q for p, q in zip(logp, start, strict=True)]
        values = {"": gained, "_token": _over(gained, lengths), "gap": logp, "gap_token": _over(logp, lengths)}
        order = sorted(range(len(ranks)), key=lambda k: ranks[k])
        pairs = [(a, b) for a, b in combinations(order, 2) if ranks[a] < ranks[b]]
        found = {"chosen": [logp[k] for k in order if ranks[k] == min(ranks)]}
        found["rejected"] = [logp[k] for k in order if ranks[k] > min(ranks)]
        for name, each in values.items():
            gaps = [each[a] - each[b] for a, b in pairs]
            gap = name if name.startswith("gap") else f"margin{name}"
            found |= {f"accuracy{name.replace('gap', '_gap')}": _share(gaps), gap: gaps}
        for name, numbers in found.items():
            out.setdefault(name, []).append(float(np.mean(numbers)))
    return {name: out[name] for name in sorted(out)}


def _over(values: Sequence[float], lengths: Sequence[int]) -> list[float]:
    """Values a token; an empty response counts as one token."""
    return [value / max(1, length) for value, length in zip(values, lengths, strict=True)]


def _share(gaps: Sequence[float]) -> list[float]:
    """1 where a gap is above 0, 1/2 at 0, else 0."""
    return [float(gap > 0) + 0.5 * float(gap == 0) for gap in gaps]


def answers(
    policy: Model,
    prompts: Sequence[Sequence[int]],
    stop_ids: frozenset[int],
    *,
    seed: int,
    samples: int = 1,
    max_new_tokens: int = 64,
    slots: int = 128,
) -> list[list[Rollout]]:
    """Samples of a policy for every prompt at temperature 1; equal seeds give every policy the same draws."""
    requests = [Request(tuple(ids), (seed, "measure", i, k)) for i, ids in enumerate(prompts) for k in range(samples)]
    flat = LocalEngine(policy, stop_ids, slots).generate(requests, Sampling(max_new_tokens=max_new_tokens))
    return [flat[i : i + samples] for i in range(0, len(flat), samples)]


def divergence(
    policy: Model, reference: Model, rollouts: Sequence[Sequence[Rollout]], max_tokens: int
) -> NDArray[np.float64]:
    """``sum_t KL(policy || reference)`` over the vocabulary at each token of the policy's answers: nats, ``[prompts, samples]``.

    Its mean is the KL of whole answers, with less noise than log-ratios of the tokens that happened to be drawn.
    """
    rows = [Row(row[0].request.ids, [Branch(r.ids, {}) for r in row]) for row in rollouts]
    batch = Batch(build_forest(rows), {}, {}, {})
    want = frozenset({"kl_to_other"})
    with torch.no_grad():
        parts = split(batch, max_tokens, whole_groups=False)
        apart = torch.cat([forward_stats(policy, p.forest, want, other=reference)["kl_to_other"] for p in parts])
    sums = segment_sum(apart.double(), batch.forest.branch, len(batch.forest.end))
    return sums.reshape(len(rows), -1).numpy()


def run(stage: MeasurePreference, ctx: Context) -> None:
    """Measure the policy beside its start and write ``results.json``."""
    start = start_from(stage.reference, ctx, "reference")
    dtype = choose_dtype(stage.dtype, start.path)
    test = rankings(read_part(test_file(stage), ctx, stage.test_limit, stage.skip_bad))
    rows, examples = fitting(start.tokenizer, test, stage, ctx, "held-out rankings")
    reference = load_policy(start.path, dtype=dtype)
    policy = load_policy(str(ctx.inputs["policy"]), dtype=dtype)
    held = ranked(reference, rows, [[r.rank or 0 for r in e.responses] for e in examples], stage.max_tokens)
    scores: dict[str, Any] = {}
    others: dict[str, dict[str, float]] = {}
    written: dict[str, list[list[Rollout]]] = {}
    apart: dict[str, NDArray[np.float64]] = {}
    for name, model in (("start", reference), ("trained", policy)):
        sums = held.start if model is reference else row_sums(model, rows, stage.max_tokens)
        found = on_rankings(sums, held)
        scores[name] = {key: np.array(found.pop(key))[:, None] for key in SHOWN}
        others[name] = {key: float(np.mean(values)) for key, values in found.items()}
        written[name] = answers(
            model,
            [row.prompt for row in rows],
            start.stop_ids,
            seed=ctx.seed,
            samples=stage.samples,
            max_new_tokens=stage.max_new_tokens,
        )
        apart[name] = divergence(model, reference, written[name], stage.max_tokens)
    section = sections.policy_section(
        scores,
        kl=apart,
        length={name: [[len(r.ids) for r in row] for row in found] for name, found in written.items()},
        truncated={name: [[r.truncated for r in row] for row in found] for name, found in written.items()},
    )
    results = sections.closing_results(machine=machine(), policy=section, stages=stage_seconds(ctx))
    sections.write_results(results | {"rankings": others}, ctx.dir / "results.json")
