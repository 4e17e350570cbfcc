"""Every objective with every loss it can be given, on random batches in float64: what the tests of invariance walk."""

from __future__ import annotations

import torch

from posttrain.forest import Batch, build_forest, split
from posttrain.models.policy import forward_stats
from posttrain.models.scores import SCORES
from posttrain.train.loop import _accumulate
from posttrain.train.objectives import objectives
from posttrain.train.sources import label_counts
from posttrain.train.terms import Term, unmoved

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


def every() -> list[str]:
    """``objective`` or ``objective:loss``."""
    out = ["coupled"]
    for name in objectives:
        losses = objectives.facts(name).get("losses")
        out += [f"{name}:{loss}" for loss in losses] if losses is not None else [name]
    return out


def names() -> list[str]:
    """Of losses that an objective treats alike, by what was stated of them, the first."""
    first: dict[str, str] = {}
    for case in every():
        kind, _, loss = case.partition(":")
        facts = objectives.facts(kind)["losses"].facts(loss) if loss else {}
        told = [facts.get(k) for k in ("needs", "reads", "coupled", "per_token", "mismatched")]
        first.setdefault(str([kind, *told]), case)
    return list(first.values())


def make(name: str, seed: int = 0):
    """``(models, objective, batch)`` of a case."""
    kind, _, loss = name.partition(":")
    facts = objectives.facts(kind) if kind != "coupled" else {"columns": ()}
    build = objectives[kind] if kind != "coupled" else Spread
    objective = build() if not loss else build(loss=facts["losses"][loss] if kind == "policy_gradient" else loss)
    models = {
        r: role(k, scalar=bool(names & SCORES), outputs=3 if "scores" in names else 1, gated="gate" in names)
        for k, (r, names) in enumerate(objective.reads.items())
    }
    if any("other" in stat for wanted in objective.reads.values() for stat in wanted):
        models["reference"] = role(7, trained=False)
    forest = build_forest(random_rows(seed + 1, SHAPE, objective.mask))
    for k, part in enumerate(parts := facts.get("masks", ())):  # of whole responses, as samples and text are
        forest.masks[part] = forest.masks[objective.mask] & (forest.branch % len(parts) == k)
    g = torch.Generator().manual_seed(seed + 9)
    noise = lambda: torch.randn(len(forest.target), generator=g, dtype=torch.float64)  # noqa: E731
    stats = {}
    with torch.no_grad():
        for r, wanted in objective.reads.items():
            stats |= forward_stats(models[r], forest, wanted, other=models.get("reference"))
    tokens = {
        "old_logp": lambda: stats["logp"] + 0.3 * noise(),
        "ref_logp": lambda: stats["logp"] + 0.3 * noise(),
        "old_cost_value": lambda: stats["value"] + 0.3 * noise(),
        "cost_return": noise,
        "old_value": lambda: stats["value"] + 0.3 * noise(),
        "advantage": noise,
        "ptx": lambda: torch.rand(len(forest.target), generator=g, dtype=torch.float64),
        "critic_only": lambda: torch.ones(len(forest.target), dtype=torch.bool),
        "return": noise,
        "ref_entropy": lambda: torch.rand(len(forest.target), generator=g, dtype=torch.float64),
        "written": lambda: torch.rand(len(forest.target), generator=g) < 0.8,
        "good": lambda: torch.rand(len(forest.target), generator=g, dtype=torch.float64),
    }
    branches = {
        "rank": lambda: torch.tensor(RANKS),
        "weight": lambda: torch.tensor(WEIGHTS, dtype=torch.float64),
        "score": lambda: torch.randn(len(RANKS), generator=g, dtype=torch.float64),
        "reward": lambda: torch.randn(len(RANKS), generator=g, dtype=torch.float64),
        "rating": lambda: 4.0 - torch.tensor(RANKS),
        "better": lambda: 0.5 + 0.1 * torch.tensor(RANKS),
        "unsafe": lambda: torch.tensor(RANKS) % 2,
        "attributes": lambda: torch.randn(len(RANKS), 3, generator=g, dtype=torch.float64),
        "rated": lambda: torch.ones(len(RANKS), 3, dtype=torch.float64),
        "wanted": lambda: torch.tensor([0.2, 0.3, 0.5, 0.0, 1.0, 0.4, 0.6, 0.1, 0.2, 0.3, 0.4]),
        "explored": lambda: torch.tensor(RANKS) % 2,
        "label": lambda: torch.tensor(RANKS) % 2,
        "matched": lambda: torch.tensor([k % 4 != 2 for k in range(len(RANKS))]).long(),
    }
    unknown = set(facts["columns"]) - set(tokens) - set(branches)
    assert not unknown, f"objective '{kind}' has columns {unknown} that tests/train/cases.py can't make: add them there"
    mask = forest.masks[objective.mask] if objective.mask else torch.ones(len(forest.target), dtype=torch.bool)
    counts = {"tokens": float(mask.sum()), "branches": float(len(forest.end)), "prompts": 4.0, "pairs": 9.0}
    counts |= {f"{part}_tokens": float(forest.masks[part].sum()) for part in parts}
    made = {c: branches[c]() for c in facts["columns"] if c in branches}
    if "label" in made:
        counts |= label_counts(made["label"], made["matched"], made["weight"])
    batch = Batch(forest, {c: tokens[c]() for c in facts["columns"] if c in tokens}, made, counts)
    return models, objective, batch


def gradients(models, objective, batch, max_tokens, share=None):
    """Metrics and gradients of a step (or of a rank's share of it), and how many micro-batches made them."""
    mine = batch if share is None else share.batch
    parts = split(mine, max_tokens, objective.whole_groups) if mine else []
    with unmoved(objective):
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
