"""Every objective with every loss it can be given, on random batches in float64: what the tests of invariance walk."""

from __future__ import annotations

import torch

from posttrain.forest import Batch, build_forest, split
from posttrain.losses.preference import preference
from posttrain.models.policy import forward_stats
from posttrain.train.loop import _accumulate
from posttrain.train.objectives import objectives
from posttrain.train.terms import Term

from .tiny import random_rows, role

SHAPE = [(5, [4, 7, 3]), (9, [6, 5]), (2, [8, 8]), (12, [5, 1, 9, 2])]
RANKS = [0, 1, 2, 1, 0, 0, 1, 0, 2, 1, 1]
WEIGHTS = [1.0] * 3 + [0.5] * 2 + [2.0] * 2 + [1.5] * 4


class Spread:
    """An objective that couples all rows: squared distances of responses' log-probabilities from their mean over the step."""

    reads = {"policy": frozenset({"logp"})}  # noqa: RUF012
    mask, temperature, whole_groups, coupled = "loss", 1.0, False, True

    def __call__(self, stats, batch):
        logp = torch.where(batch.forest.masks["loss"], stats["policy"]["logp"], 0.0)
        sums = torch.zeros(len(batch.forest.end), dtype=logp.dtype).index_add(0, batch.forest.branch, logp)
        return {"loss/total": Term(((sums - sums.mean()) ** 2).sum(), "branches")}


def names() -> list[str]:
    """``objective`` or ``objective:loss``."""
    out = ["coupled"]
    for name in objectives:
        losses = objectives.facts(name).get("losses")
        out += [f"{name}:{loss}" for loss in losses] if losses is not None else [name]
    return out


def make(name: str, seed: int = 0):
    """``(models, objective, batch)`` of a case."""
    kind, _, loss = name.partition(":")
    facts = objectives.facts(kind) if kind != "coupled" else {"columns": ()}
    build = objectives[kind] if kind != "coupled" else Spread
    losses = facts.get("losses")
    objective = build() if not loss else build(loss=loss if losses is preference else losses[loss])
    models = {
        r: role(k, scalar=bool(names & {"score", "value"})) for k, (r, names) in enumerate(objective.reads.items())
    }
    forest = build_forest(random_rows(seed + 1, SHAPE, objective.mask))
    g = torch.Generator().manual_seed(seed + 9)
    noise = lambda: torch.randn(len(forest.target), generator=g, dtype=torch.float64)  # noqa: E731
    stats = {}
    with torch.no_grad():
        for r, wanted in objective.reads.items():
            stats |= forward_stats(models[r], forest, wanted)
    tokens = {
        "old_logp": lambda: stats["logp"] + 0.3 * noise(),
        "ref_logp": lambda: stats["logp"] + 0.3 * noise(),
        "old_value": lambda: stats["value"] + 0.3 * noise(),
        "advantage": noise,
        "return": noise,
    }
    branches = {"rank": lambda: torch.tensor(RANKS), "weight": lambda: torch.tensor(WEIGHTS, dtype=torch.float64)}
    unknown = set(facts["columns"]) - set(tokens) - set(branches)
    assert not unknown, f"objective '{kind}' has columns {unknown} that tests/train/cases.py can't make: add them there"
    mask = forest.masks[objective.mask] if objective.mask else torch.ones(len(forest.target), dtype=torch.bool)
    counts = {"tokens": float(mask.sum()), "branches": float(len(forest.end)), "prompts": 4.0, "pairs": 9.0}
    batch = Batch(
        forest,
        {c: tokens[c]() for c in facts["columns"] if c in tokens},
        {c: branches[c]() for c in facts["columns"] if c in branches},
        counts,
    )
    return models, objective, batch


def gradients(models, objective, batch, max_tokens, share=None):
    """Metrics and gradients of a step (or of a rank's share of it), and how many micro-batches made them."""
    mine = batch if share is None else share.batch
    parts = split(mine, max_tokens, objective.whole_groups) if mine else []
    found = _accumulate(models, objective, batch, parts, 0, share)
    return found, taken(models), len(parts)


def taken(models):
    """All gradients, which are cleared."""
    grads = {}
    for name, model in models.items():
        for key, parameter in model.parameters().items():
            if parameter.grad is not None:
                grads[f"{name}/{key}"] = parameter.grad.clone()
                parameter.grad = None
    return grads


def close(one, two):
    """The promise: equal within 1e-10."""
    assert one.keys() == two.keys() and one
    for name, grad in one.items():
        torch.testing.assert_close(
            grad, two[name], atol=1e-10, rtol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )
