"""Aggregation, levels of ratio and shaping on numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from posttrain.losses.aggregation import aggregations, sequence_mean, sequence_sum_scaled
from posttrain.losses.policy import TokenTerms, clip_higher
from posttrain.losses.quark import quark, reward_bins
from posttrain.losses.ratios import ratio_levels
from posttrain.losses.shaping import (
    adaptive_kl,
    constrained_advantage,
    mismatch_weights,
    next_multiplier,
    overlong_penalty,
)

from .fixtures import f64

BRANCH = torch.tensor([0, 0, 1, 1, 1, 1])
VALUES = f64(1, 1, 2, 2, 2, 2)
ALL = torch.ones(6, dtype=torch.bool)


def aggregated(name, values, mask, branch, **options):
    count = {"tokens": int(mask.sum()), "branches": len(branch[mask].unique())}[aggregations.facts(name)["unit"]]
    weighted = values * aggregations.bound(name, options)(mask, branch)
    return weighted[mask].sum().item() / count


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("token_mean", {}, 5 / 3),
        ("sequence_mean", {}, 1.5),
        ("sequence_sum", {}, 5.0),
        ("sequence_sum_scaled", {"longest": 8.0}, 0.625),
    ],
)
def test_two_rows(name, options, expected):
    assert aggregated(name, VALUES, ALL, BRANCH, **options) == pytest.approx(expected, abs=1e-12)
    apart = torch.cat([BRANCH, torch.tensor([2, 2])])  # a row without sampled tokens is in no mean
    mask = torch.tensor([True] * 6 + [False] * 2)
    found = aggregated(name, torch.cat([VALUES, f64(7, 7)]), mask, apart, **options)
    assert found == pytest.approx(expected, abs=1e-12)


def test_a_response_of_twice_the_length_has_tokens_of_equal_weight_by_a_constant_and_of_half_by_its_own_length():
    mask, branch = torch.ones(9, dtype=torch.bool), torch.tensor([0] * 3 + [1] * 6)
    scaled, own = sequence_sum_scaled(mask, branch, longest=12.0), sequence_mean(mask, branch)
    assert scaled.tolist() == [1 / 12] * 9
    assert own.tolist() == pytest.approx([1 / 3] * 3 + [1 / 6] * 6)


def levels(name, logp, mask=None):
    old = f64(-1, -2, -3, -1, -1)
    mask = torch.ones(5, dtype=torch.bool) if mask is None else mask
    return ratio_levels[name](logp, old, mask, torch.tensor([0, 0, 0, 1, 1]), torch.zeros(5, dtype=torch.long))


def test_the_value_of_each_level():
    logp = f64(-1, -2, -3, -1, -1) + f64(0.1, -0.2, 0.4, 0.5, 0.3)
    near = lambda *x: pytest.approx(list(x), abs=1e-12)  # noqa: E731
    assert levels("token", logp).tolist() == near(0.1, -0.2, 0.4, 0.5, 0.3)
    assert levels("sequence_mean", logp).exp()[0].item() == pytest.approx(1.1051709, abs=1e-6)
    assert levels("sequence_mean", logp).tolist() == near(0.1, 0.1, 0.1, 0.4, 0.4)
    assert levels("sequence_product", logp).tolist() == near(0.3, 0.3, 0.3, 0.8, 0.8)
    assert levels("pair_product", logp).tolist() == near(*[1.1] * 5)
    part = torch.tensor([True, False, True, True, True])
    assert levels("sequence_mean", logp, part)[0].item() == pytest.approx(0.25)


@pytest.mark.parametrize(("name", "reduce"), [("sequence_mean", torch.mean), ("sequence_product", torch.sum)])
def test_the_mean_over_tokens_has_value_and_gradient_of_the_responses_ratio(name, reduce):
    start = f64(-1, -2, -3, -1, -1) + f64(0.1, -0.2, 0.4, 0.5, 0.3)
    one, two = start.clone().requires_grad_(), start.clone().requires_grad_()
    weight = sequence_mean(torch.ones(5, dtype=torch.bool), torch.tensor([0, 0, 0, 1, 1]))
    found = (levels(name, one).exp() * weight).sum()
    gap = two - f64(-1, -2, -3, -1, -1)
    expected = reduce(gap[:3]).exp() + reduce(gap[3:]).exp()
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)
    for total in (found, expected):
        total.backward()
    torch.testing.assert_close(one.grad, two.grad, atol=1e-12, rtol=0)


def test_a_response_outside_the_tight_clip_of_its_ratio_has_no_gradient():
    logp = (f64(-1, -2, -3, -1, -1) + f64(0.001, 0.001, 0.001, 0.0001, 0.0001)).requires_grad_()
    ones = torch.ones(5, dtype=torch.float64)
    given = TokenTerms(
        logp=logp, old_logp=logp.detach(), advantage=ones, mask=ones > 0, log_ratio=levels("sequence_mean", logp)
    )
    clip_higher(given, low=3e-4, high=4e-4).sum().backward()
    assert logp.grad[:3].tolist() == [0, 0, 0] and (logp.grad[3:] < 0).all()


def test_overlong_punishment():
    found = overlong_penalty(f64(16384, 18432, 20480, 20481), longest=20480, buffer=4096)
    assert found.tolist() == [0.0, -0.5, -1.0, -1.0]


@pytest.mark.parametrize(("kl", "expected"), [(3.0, 0.198976), (6.0, 0.2), (12.0, 0.201024)])
def test_the_kl_coefficient_follows_its_target(kl, expected):
    assert adaptive_kl(0.2, kl, sequences=256) == pytest.approx(expected, abs=1e-9)


def test_weights_where_the_sampler_is_not_the_trainer():
    old, sampled = f64(-1, -1, -1), f64(-1.1, -2, -0.5)
    mask, branch = torch.ones(3, dtype=torch.bool), torch.tensor([0, 0, 1])
    weigh = lambda name, **options: mismatch_weights.bound(name, options)(old, sampled, mask, branch).tolist()  # noqa: E731
    assert weigh("truncate") == pytest.approx([1.1051709, 2, 0.6065307], abs=1e-6)
    assert weigh("band", low=0.7) == pytest.approx([1.1051709, math.e, 0], abs=1e-6)
    assert weigh("reject") == pytest.approx([0, 0, 0.6065307], abs=1e-6)
    assert weigh("reject", cap=3.01) == pytest.approx([math.exp(1.1), math.exp(1.1), 0.6065307], abs=1e-6)
    for name in mismatch_weights:
        assert mismatch_weights[name](old, old, mask, branch).tolist() == [1, 1, 1]


def test_a_constraint_is_held_by_its_multiplier():
    first = next_multiplier(1.0, 0.5)
    assert [first, next_multiplier(first, 0.5)] == pytest.approx([1.0512711, 1.1080077], abs=1e-6)
    assert next_multiplier(2.0, -1.0) == pytest.approx(1.6374616, abs=1e-6)
    assert next_multiplier(4.9, 3.0, limit=1.0) == 5.0
    assert constrained_advantage(f64(1), f64(0.5), multiplier=2.0).tolist() == [0]


def test_bins_of_scores_and_the_loss_under_their_tokens():
    assert reward_bins(f64(3, 1, 2, 2, 9, 0, -1), bins=3).tolist() == [0, 2, 1, 1, 0, 2, 2]
    assert reward_bins(f64(1, 2), bins=5).tolist() == [1, 0]
    assert quark(f64(-2), f64(0.4), f64(1.5)).tolist() == pytest.approx([1.93])
