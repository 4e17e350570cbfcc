"""The ranking loss on numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from posttrain.losses.reward import bradley_terry, pair_weights, ranked_pairs


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_four_ranked_responses():
    rank, group = torch.arange(4), torch.zeros(4, dtype=torch.long)
    assert bradley_terry(f64(2, 1, 0, -1), rank, group).sum().item() == pytest.approx(0.20703807, abs=1e-8)
    shuffle = torch.tensor([2, 0, 3, 1])
    again = bradley_terry(f64(2, 1, 0, -1)[shuffle], rank[shuffle], group)
    assert again.sum().item() == pytest.approx(0.20703807, abs=1e-8)


def test_prompts_count_equally_and_only_their_own_responses_are_compared():
    score, rank = f64(2, 1, 0, -1, 0.3, 0.3), torch.tensor([0, 1, 2, 3, 1, 0])
    group = torch.tensor([0, 0, 0, 0, 1, 1])
    assert bradley_terry(score, rank, group).sum().item() == pytest.approx(0.20703807 + math.log(2), abs=1e-8)
    better, worse, weight = pair_weights(rank, group)
    assert (group[better] == group[worse]).all() and weight.tolist() == pytest.approx([1 / 6] * 6 + [1.0])


def test_ties_make_no_pair():
    rank, group = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 0, 1])
    better, worse = ranked_pairs(rank, group)
    assert list(zip(better.tolist(), worse.tolist(), strict=True)) == [(0, 1), (0, 2)]
    none = bradley_terry(f64(1, 2), torch.tensor([0, 0]), torch.tensor([0, 0]))
    assert none.shape == (0,) and none.sum() == 0


def test_the_gradient_pushes_by_how_wrong_a_pair_is():
    score = f64(0.0, 2.0).requires_grad_()
    bradley_terry(score, torch.tensor([0, 1]), torch.tensor([0, 0])).sum().backward()
    assert score.grad.tolist() == pytest.approx([-1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-2))], abs=1e-12)
