"""Token rewards and GAE on numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from posttrain.losses.advantages import gae, token_reward

OLD, REF = [-1, -0.5, -2, -0.3], [-1.2, -0.4, -1.5, -0.3]
VALUE, REWARD = [0.5, 0.6, 0.9, 1.2], [-0.02, 0.01, 0.05, 2]


def row(*values):
    return torch.tensor([values], dtype=torch.float64)


ALL = torch.ones(1, 4, dtype=torch.bool)


def test_the_score_comes_with_the_last_token_and_the_penalty_with_each():
    got = token_reward(torch.tensor([2.0], dtype=torch.float64), row(*OLD), row(*REF), ALL, kl=0.1)
    torch.testing.assert_close(got, row(*REWARD), atol=1e-12, rtol=0)


def test_the_last_token_is_that_of_the_mask():
    mask = torch.tensor([[True, True, False, False], [True, False, True, True], [False, False, False, False]])
    logp = torch.full((3, 4), 0.25, dtype=torch.float64)
    logp[~mask] = float("nan")
    score = torch.tensor([5.0, -1.0, 7.0], dtype=torch.float64)
    got = token_reward(score, logp, torch.zeros_like(logp), mask, kl=1.0)
    assert got.tolist() == [[-0.25, 4.75, 0, 0], [-0.25, 0, -0.25, -1.25], [0, 0, 0, 0]]


@pytest.mark.parametrize(("lam", "expected"), [(0.95, [1.376275, 1.3645, 1.11, 0.8]), (1.0, [1.54, 1.46, 1.15, 0.8])])
def test_advantages(lam, expected):
    advantage, returns = gae(row(*REWARD), row(*VALUE), ALL, lam=lam)
    torch.testing.assert_close(advantage, row(*expected), atol=1e-12, rtol=0)
    torch.testing.assert_close(returns, advantage + row(*VALUE), atol=1e-12, rtol=0)
    if lam == 0.95:
        torch.testing.assert_close(returns, row(1.876275, 1.9645, 2.01, 2.0), atol=1e-12, rtol=0)


def test_discounting():
    advantage, _ = gae(row(0, 0, 4), row(0, 0, 0), ALL[:, :3], gamma=0.5, lam=1.0)
    assert advantage.tolist() == [[1, 2, 4]]


def test_padding_and_gaps_change_nothing():
    mask = torch.tensor([[True, False, True, True, True, False, False]])
    scatter = lambda values: torch.full((1, 7), 9.0, dtype=torch.float64).masked_scatter(mask, row(*values))  # noqa: E731
    advantage, returns = gae(scatter(REWARD), scatter(VALUE), mask)
    torch.testing.assert_close(advantage[mask], row(1.376275, 1.3645, 1.11, 0.8)[0], atol=1e-12, rtol=0)
    assert advantage[~mask].abs().sum() == 0 and returns[~mask].abs().sum() == 0
