"""What holds of every loss that needs more than sums of pairs: it is described, finite, and has the gradient it should."""

from __future__ import annotations

import inspect
import math
from dataclasses import fields, replace

import pytest
import torch

from posttrain import losses
from posttrain.losses import (
    ExploredPairs,
    Labelled,
    PairLogps,
    Scored,
    ScoredPairs,
    TokenLogps,
    TokenPairs,
    Valued,
    preference,
)
from posttrain.registry import Registry, keyword_defaults

REGISTRIES = {name: found for name, found in vars(losses).items() if isinstance(found, Registry)}
CASES = [(kind, name) for kind, registry in REGISTRIES.items() if kind != "preference" for name in registry]
FACTS = {"paper", "needs", "at_reference", "coupled", "scores", "reads", "mismatched", "opponent"}


def columns(names, size, low, high, g, dtype=torch.float64):
    return {name: torch.rand(size, generator=g, dtype=dtype) * (high - low) + low for name in names}


def record(kind, *, seed=0, low=-9.0, high=-1.0, rows=6, tokens=5, dtype=torch.float64):
    """An input of a registry's losses, random, its log-probabilities within a range."""
    g = torch.Generator().manual_seed(seed)

    def pairs():
        lengths = torch.randint(1, 9, (2, rows), generator=g).to(dtype)
        return PairLogps(
            **columns([f.name for f in fields(PairLogps)][:4], rows, low, high, g, dtype),
            chosen_len=lengths[0],
            rejected_len=lengths[1],
        )

    def side():
        size = (rows, tokens)
        return TokenLogps(
            **columns(("logp", "ref_logp"), size, low, high, g, dtype),
            **columns(("kl", "sum_p2", "ref_entropy"), size, 0.05, 0.95, g, dtype),
            mask=torch.rand(size, generator=g) < 0.6,
            written=torch.rand(size, generator=g) < 0.7,
        )

    logps = columns(("logp", "ref_logp"), rows, low, high, g, dtype)
    extra = columns(("length", "reward", "value", "score", "kl"), rows, 0.5, 5, g, dtype)
    return {
        "token_losses": lambda: TokenPairs(chosen=side(), rejected=side()),
        "scored_losses": lambda: ScoredPairs(
            pairs=pairs(), chosen_score=extra["score"], rejected_score=extra["reward"]
        ),
        "explored_losses": lambda: ExploredPairs(pairs=pairs(), explored=logps["logp"]),
        "unpaired_losses": lambda: Labelled(
            **logps,
            length=extra["length"],
            kl=extra["kl"],
            label=torch.arange(rows) % 2 == 0,
            matched=torch.arange(rows) % 3 != 2,
        ),
        "valued_losses": lambda: Valued(**logps, reward=extra["reward"], value=extra["value"]),
        "listwise_losses": lambda: Scored(
            **logps, length=extra["length"], score=extra["score"], group=torch.arange(rows) // 3
        ),
    }[kind]()


def leaves_of(value):
    """All floating tensors of a record, however deep, as leaves with gradient; and the record that holds them."""
    if isinstance(value, torch.Tensor):
        leaf = value.clone().requires_grad_() if value.is_floating_point() else value
        return leaf, [leaf] if value.is_floating_point() else []
    if value is None:
        return None, []
    made, found = {}, []
    for f in fields(value):
        made[f.name], leaves = leaves_of(getattr(value, f.name))
        found += leaves
    return replace(value, **made), found


def picked(value, order):
    """A record with rows in another order (or some of them)."""
    if isinstance(value, torch.Tensor):
        return value[order]
    return replace(value, **{f.name: picked(getattr(value, f.name), order) for f in fields(value)})


def test_every_mapping_has_its_losses_and_no_name_is_in_two():
    assert {kind: len(registry) for kind, registry in REGISTRIES.items()} == {
        "preference": 36, "token_losses": 7, "scored_losses": 4, "explored_losses": 1, "unpaired_losses": 6,
        "valued_losses": 1, "listwise_losses": 7,
    }  # fmt: skip
    names = [name for registry in REGISTRIES.values() for name in registry]
    assert len(names) == len(set(names)) == 62


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_every_loss_says_what_it_is_and_where_it_is_from(kind, name):
    registry, function = REGISTRIES[kind], REGISTRIES[kind][name]
    facts, text = registry.facts(name), inspect.getdoc(function)
    assert facts["paper"] and "reference" in facts["needs"] and facts.keys() <= FACTS
    first, blank, *_ = text.split("\n")
    assert "``" in first and first.endswith(".") and not blank and "Source: " in text
    assert all(type(default) is float for default in keyword_defaults(function).values())
    assert (facts.get("scores") in ("score", "win rate", "rank")) == (kind in ("listwise_losses", "scored_losses"))


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_shape_and_order(kind, name):
    loss, given = REGISTRIES[kind][name], record(kind)
    found = loss(given)
    assert found.shape == ((2,) if kind == "listwise_losses" else (6,))
    order = torch.tensor([3, 5, 4, 1, 0, 2])
    expected = found.flip(0) if kind == "listwise_losses" else found[order]
    regrouped = picked(given, order)
    if kind == "listwise_losses":
        regrouped = replace(regrouped, group=1 - regrouped.group)
    torch.testing.assert_close(loss(regrouped), expected, atol=1e-12, rtol=1e-12)
    none = loss(picked(given, slice(0, 0)))
    assert none.shape == (0,)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_extremes_are_finite(kind, name):
    loss = REGISTRIES[kind][name]
    for low, high in ((-1e4, 0.0), (-1e4, -1e4), (0.0, 0.0), (-1e-7, 0.0)):
        for tokens in (1, 5):
            given, leaves = leaves_of(record(kind, low=low, high=high, tokens=tokens, dtype=torch.float32))
            found = loss(given)
            assert found.isfinite().all()
            slopes = torch.autograd.grad(found.sum(), leaves, allow_unused=True)
            assert all(slope.isfinite().all() for slope in slopes if slope is not None)


@pytest.mark.parametrize("name", list(REGISTRIES["token_losses"]))
def test_responses_without_trained_tokens_are_finite(name):
    given = record("token_losses")
    empty = [replace(side, mask=torch.zeros_like(side.mask)) for side in (given.chosen, given.rejected)]
    pairs, leaves = leaves_of(TokenPairs(chosen=empty[0], rejected=empty[1]))
    found = REGISTRIES["token_losses"][name](pairs)
    assert found.isfinite().all()
    slopes = torch.autograd.grad(found.sum(), leaves, allow_unused=True)
    assert all(slope is None or not slope.any() for slope in slopes)


STOPPED = {"nash_md", "dro_v", "kto", "bco", "wpo", "mallows", "mallows_ipo", "tdpo2"}
"""Their gradient stops somewhere on purpose, which other tests look at."""


@pytest.mark.parametrize(("kind", "name"), [case for case in CASES if case[1] not in STOPPED])
def test_gradients_are_those_of_finite_differences(kind, name):
    given, _ = leaves_of(record(kind, rows=3, tokens=3))
    inner = given if kind not in ("scored_losses", "explored_losses") else given.pairs
    names = [f for f in ("logp", "kl", "chosen", "rejected") if isinstance(getattr(inner, f, None), torch.Tensor)]
    loss = REGISTRIES[kind][name]

    def rebuilt(*values):
        changed = replace(inner, **dict(zip(names, values, strict=True)))
        return loss(changed if inner is given else replace(given, pairs=changed))

    if kind == "token_losses":
        logps = [given.chosen.logp, given.rejected.logp, given.chosen.kl, given.rejected.kl]

        def rebuilt(*v):
            sides = [replace(given.chosen, logp=v[0], kl=v[2]), replace(given.rejected, logp=v[1], kl=v[3])]
            return loss(TokenPairs(chosen=sides[0], rejected=sides[1]))

        assert torch.autograd.gradcheck(rebuilt, logps)
        return
    assert torch.autograd.gradcheck(rebuilt, [getattr(inner, n) for n in names])


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_scores_of_pairs_are_data(kind, name):
    given, _ = leaves_of(record(kind))
    loss = REGISTRIES[kind][name](given)
    assert loss.requires_grad
    if kind == "scored_losses":
        slopes = torch.autograd.grad(loss.sum(), [given.chosen_score, given.rejected_score], allow_unused=True)
        assert slopes == (None, None)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_declared_value_where_policy_and_reference_agree(kind, name):
    declared = REGISTRIES[kind].facts(name).get("at_reference")
    if declared is None:
        return
    given = record(kind)
    if kind == "token_losses":
        sides = [
            replace(s, logp=s.ref_logp, kl=torch.zeros_like(s.kl), mask=s.mask | True)
            for s in (given.chosen, given.rejected)
        ]
        found = REGISTRIES[kind][name](TokenPairs(chosen=sides[0], rejected=sides[1]))
    else:
        found = REGISTRIES[kind][name](replace(given, logp=given.ref_logp))[given.matched]
    assert all(math.isclose(x, declared, abs_tol=1e-9) for x in found.tolist())


def test_only_coupled_losses_of_labels_depend_on_other_rows():
    for name in losses.unpaired_losses:
        given = record("unpaired_losses")
        given = replace(given, logp=given.logp + 5)  # away from the reference
        one = losses.unpaired_losses[name](picked(given, slice(0, 1)))
        apart = not torch.equal(one, losses.unpaired_losses[name](given)[:1])
        assert apart == losses.unpaired_losses.facts(name).get("coupled", False)


def test_the_pair_losses_are_in_the_public_mapping():
    for name in ("nca", "apo_zero", "apo_down", "orpo", "exo", "simpo", "sppo_hard", "slic", "beta_dpo", "aot"):
        assert name in preference
