"""Reward-model losses: numbers worked out by hand, and what holds of every one."""

from __future__ import annotations

import inspect
import math
from dataclasses import fields

import pytest
import torch

from posttrain.errors import ConfigError
from posttrain.losses.reward import bradley_terry
from posttrain.losses.reward_pairs import ScoredPair, barrier, centring, reward_losses
from posttrain.losses.reward_points import (
    attribute_error,
    plackett_luce,
    step_error,
    step_score,
    verdict_error,
    verdict_value,
)
from posttrain.registry import keyword_defaults

NAMES = list(reward_losses)
LN2 = math.log(2)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def pair(chosen, rejected, **more):
    return ScoredPair(chosen=f64(chosen), rejected=f64(rejected), **{k: f64(v) for k, v in more.items()})


GOLDEN = [
    ("bradley_terry", pair(1.0, 0.0), {}, 0.3132616875),
    ("margin", pair(0.5, 0.0, margin=1.0), {}, 0.97407698),
    ("margin", pair(0.5, 0.0, margin=1 / 3), {}, 0.61328206),
    ("margin", pair(0.5, 0.0, margin=1 / 3), {"scale": 3.0}, 0.97407698),
    ("tempered", pair(2.0, 0.0), {"temperature": 2.0}, 0.3132616875),
    ("focal", pair(1.0, 0.0), {}, 0.0906322),
    ("focal", pair(0.0, 0.0), {}, LN2),
    ("focal", pair(0.0, 1.0), {}, 1.3132617),
    ("focal_barrier", pair(0.5, -0.5), {}, -0.0377208),
    ("hinge", pair(0.25, 0.0), {}, 0.75),
    ("hinge", pair(3.0, 0.0), {}, 0.0),
    ("margin_mse", pair(3.0, 0.5), {}, 2.25),
    ("soft", pair(1.0, 0.0, better=1.0), {}, 0.3132616875),
    ("soft", pair(1.0, 0.0, better=0.75), {}, 0.5632616875),
    ("scaled", pair(1.0, 0.0, margin=3.0), {}, 0.9397850625),
    ("cost", pair(-0.5, 1.0, chosen_unsafe=0.0, rejected_unsafe=1.0), {"l2": 0.0}, 0.98875195),
    ("cost", pair(0.5, 1.0, chosen_unsafe=1.0, rejected_unsafe=1.0), {"l2": 0.0}, 1.26141566),
    ("cost", pair(0.5, 1.0, chosen_unsafe=1.0, rejected_unsafe=1.0), {"l2": 0.001}, 1.26141566 + 0.000625),
]


@pytest.mark.parametrize(("name", "given", "options", "expected"), GOLDEN)
def test_golden(name, given, options, expected):
    assert reward_losses.bound(name, options)(given).item() == pytest.approx(expected, abs=1e-7)


def test_every_loss_has_a_golden_number():
    assert {case[0] for case in GOLDEN} == set(NAMES) and len(NAMES) == 10


def test_barrier_and_centring():
    assert barrier(f64(0, 4, 4.9)).tolist() == pytest.approx([-3.2188758, -2.1972246, 0.0100503], abs=1e-7)
    assert (0.01 * centring(pair(1.5, 0.5))).item() == pytest.approx(0.04)
    outside = f64(7.0).requires_grad_()
    barrier(outside).backward()
    assert outside.grad.item() == 0.0


def random_pairs(rows=6, scale=3.0, dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    draw = lambda: torch.randn(rows, generator=g, dtype=dtype) * scale  # noqa: E731
    share = lambda: torch.rand(rows, generator=g, dtype=dtype)  # noqa: E731
    return ScoredPair(
        chosen=draw(), rejected=draw(), margin=share(), better=share(),
        chosen_unsafe=share().round(), rejected_unsafe=share().round(),
    )  # fmt: skip


def picked(pairs, order):
    return ScoredPair(**{f.name: getattr(pairs, f.name)[order] for f in fields(pairs)})


@pytest.mark.parametrize("name", NAMES)
def test_every_loss_says_what_it_is(name):
    text = inspect.getdoc(reward_losses[name])
    first, blank, *_ = text.split("\n")
    assert reward_losses.facts(name)["paper"] and "``" in first and first.endswith(".") and not blank
    assert "Source: " in text and all(type(v) is float for v in keyword_defaults(reward_losses[name]).values())


@pytest.mark.parametrize("name", NAMES)
def test_gradient_order_and_extremes(name):
    loss, given = reward_losses[name], random_pairs()
    order = torch.tensor([3, 5, 4, 1, 0, 2])
    assert torch.equal(loss(picked(given, order)), loss(given)[order])
    assert loss(picked(given, slice(0, 0))).shape == (0,)

    def rebuilt(chosen, rejected):
        return loss(
            ScoredPair(
                **{f.name: getattr(given, f.name) for f in fields(given)} | {"chosen": chosen, "rejected": rejected}
            )
        )

    leaves = [given.chosen.clone().requires_grad_(), given.rejected.clone().requires_grad_()]
    assert torch.autograd.gradcheck(rebuilt, leaves)
    for scale in (0.0, 1e-7, 1e4):
        given = random_pairs(scale=scale, dtype=torch.float32)
        leaves = [given.chosen.clone().requires_grad_(), given.rejected.clone().requires_grad_()]
        found = rebuilt(*leaves)
        slopes = torch.autograd.grad(found.sum(), leaves)
        assert found.isfinite().all() and all(s.isfinite().all() for s in slopes)


@pytest.mark.parametrize("name", [n for n in NAMES if reward_losses.facts(n).get("reads")])
def test_a_column_that_is_missing_is_refused(name):
    with pytest.raises(ConfigError, match=reward_losses.facts(name)["reads"][0]):
        reward_losses[name](pair(1.0, 0.0))


def test_plackett_luce_by_hand():
    score, rank, group = f64(2, 1, 0, -1), torch.arange(4), torch.zeros(4, dtype=torch.long)
    assert plackett_luce(score, rank, group).item() == pytest.approx(1.16105735, abs=1e-8)
    shuffle = torch.tensor([2, 0, 3, 1])
    assert plackett_luce(score[shuffle], rank[shuffle], group).item() == pytest.approx(1.16105735, abs=1e-8)


def test_plackett_luce_of_two_is_bradley_terry():
    score = f64(0.3, -1.2, 2.0, 2.5).requires_grad_()
    rank, group = torch.tensor([1, 0, 0, 1]), torch.tensor([0, 0, 1, 1])
    ours, theirs = plackett_luce(score, rank, group), bradley_terry(score, rank, group)
    assert torch.allclose(ours.sum(), theirs.sum(), atol=1e-12)
    slopes = [torch.autograd.grad(x.sum(), score)[0] for x in (ours, theirs)]
    assert torch.allclose(*slopes, atol=1e-12)


def test_plackett_luce_ties_gradient_and_extremes():
    rank, group = torch.tensor([0, 1, 1, 2, 0, 1]), torch.tensor([0, 0, 0, 0, 1, 1])
    tied = plackett_luce(f64(0, 5, 5, 0), rank[:4], group[:4]).item()
    by_hand = math.log(2 + 2 * math.exp(5)) + 2 * (math.log(math.exp(5) + 1) - 5)
    assert tied == pytest.approx(by_hand, abs=1e-9)
    score = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: plackett_luce(s, rank, group), [score])
    wide = (1e4 * score.detach()).float().requires_grad_()
    found = plackett_luce(wide, rank, group)
    assert found.isfinite().all() and torch.autograd.grad(found.sum(), wide)[0].isfinite().all()
    assert plackett_luce(score[:0], rank[:0], group[:0]).shape == (0,)


def test_attributes_and_their_weighted_scalar():
    weights, ratings = f64(0.3, 0.74, 0.46, 0.47, -0.33), f64(3, 4, 4, 2, 2)
    assert (weights @ ratings).item() == pytest.approx(5.98)
    predicted = torch.stack([ratings + f64(1, 0, 0, 0, 2), ratings + 1]).requires_grad_()
    known = torch.stack([ratings, f64(3, math.nan, 4, math.nan, math.nan)])
    assert attribute_error(predicted, known).tolist() == pytest.approx([1.0, 1.0])
    slope = torch.autograd.grad(attribute_error(predicted, known).sum(), predicted)[0]
    assert slope[1].tolist() == pytest.approx([1.0, 0, 1.0, 0, 0]) and slope.isfinite().all()
    assert attribute_error(predicted[:1], torch.full((1, 5), math.nan)).tolist() == [0.0]


def test_steps():
    assert step_error(f64(0, 1, -1), f64(1, 1, 1)).tolist() == pytest.approx([LN2, 0.31326169, 1.31326169])
    assert step_error(f64(1.0), f64(0.75)).item() == pytest.approx(0.56326169)
    chances = f64(0.9, 0.5, 0.8)
    assert [step_score(chances, how).item() for how in ("product", "min", "last")] == pytest.approx([0.36, 0.5, 0.8])


def test_verdicts():
    logp = f64(0.2, 0.5, 0.3).log() - 3.0  # words outside those on offer have the rest
    group = torch.zeros(3, dtype=torch.long)
    value = verdict_value(logp, f64(7, 8, 9), group).item()
    assert value == pytest.approx(8.1) and (value - 5.5) / 4.5 == pytest.approx(0.577778, abs=1e-6)
    assert verdict_error(logp, f64(0, 1, 0), group).item() == pytest.approx(LN2)
    both = torch.cat([logp, f64(-1, -1)]).requires_grad_()
    groups, wanted = torch.tensor([0, 0, 0, 1, 1]), f64(0, 1, 0, 0.5, 0.5)
    assert verdict_error(both, wanted, groups).tolist() == pytest.approx([LN2, LN2])
    assert torch.autograd.gradcheck(lambda x: verdict_error(x, wanted, groups), [both])
