"""Losses that couple the rows of a whole step (batch baselines, sorting), cut into micro-batches all the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from posttrain.forest import Batch
from posttrain.train.distributed import ALONE, PER_BRANCH, Share, world
from posttrain.train.terms import Objective, Stats, Term, total

Terms = Callable[[Stats, Batch], dict[str, Term]]


def linearised(
    objective: Objective,
    stats_of: Callable[[Batch], Stats],
    batch: Batch,
    parts: Sequence[Batch],
    share: Share | None = None,
    phase: str = "statistics",
) -> Terms:
    """Return terms of a micro-batch whose sum over ``parts`` (and ranks) has the value and the gradient of the whole step's.

    With s the statistics of all micro-batches and L the step's loss: a pass without gradient finds s, then L and
    ``g = dL/ds`` are taken once. A micro-batch's own term is ``g . s`` of its rows, so that back-propagating all of them
    gives ``g ds/dw = dL/dw``. Values stand on the first micro-batch, the terms of the others are worth 0.

    Args:
        objective: evaluated on the whole step.
        stats_of: a micro-batch's statistics, by role.
        batch: the step.
        parts: micro-batches of this rank's share, with its targets and branches in their order.
        share: where those stand in ``batch``; None = they are all of it.
        phase: what ranks wait for, in messages.
    """
    share = share or ALONE.share(batch)
    with torch.no_grad():
        found = [stats_of(part) for part in parts]

    def whole(role: str, name: str) -> Tensor:
        mine = torch.cat([f[role][name] for f in found]) if found else None
        size = len(batch.forest.end if name in PER_BRANCH else batch.forest.target)
        full = world().whole(name, mine, share, size, f"{phase}, {role}/{name}")
        return (full if mine is None else full.to(mine.dtype)).requires_grad_()

    joined = {role: {name: whole(role, name) for name in sorted(names)} for role, names in objective.reads.items()}
    terms = objective(joined, batch)
    leaves = {(role, name): x for role, stats in joined.items() for name, x in stats.items()}
    slopes = torch.autograd.grad(total(terms, batch.counts), list(leaves.values()), allow_unused=True)
    by_part: dict[tuple[str, str], Sequence[Tensor]] = {
        (role, name): slope[share.branches if name in PER_BRANCH else share.targets].split(
            [len(f[role][name]) for f in found]
        )
        for (role, name), slope in zip(leaves, slopes, strict=True)
        if slope is not None
    }
    trained = next(name for name, term in terms.items() if term.coefficient)
    place = {id(part): k for k, part in enumerate(parts)}

    def of_part(stats: Stats, part: Batch) -> dict[str, Term]:
        k = place[id(part)]
        linear = torch.stack([(g[k] * stats[role][name]).double().sum() for (role, name), g in by_part.items()]).sum()
        out = {
            name: replace(t, sum=t.sum.detach() if k == 0 and world().writes else torch.zeros_like(t.sum))
            for name, t in terms.items()
        }
        term = out[trained]
        slope = (linear - linear.detach()) * (batch.counts[term.unit] / term.coefficient)  # worth 0, with the gradient
        out[trained] = replace(term, sum=term.sum + slope)
        return out

    return of_part
