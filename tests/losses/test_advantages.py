"""Token rewards and GAE on numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from posttrain.errors import ConfigError
from posttrain.losses.advantages import Returns, advantages, gae, token_reward

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


def scored(scores, group, lengths=None, *, reward=None, **more):
    """A record of responses with scores, of ``lengths`` tokens; token rewards are the scores alone."""
    score, size = torch.tensor(scores, dtype=torch.float64), max(lengths or [1])
    mask = torch.arange(size)[None] < torch.tensor(lengths or [1] * len(scores))[:, None]
    zero = torch.zeros(mask.shape, dtype=torch.float64)
    reward = token_reward(score, zero, zero, mask, kl=0.0) if reward is None else reward
    return Returns(score=score, reward=reward, mask=mask, group=torch.tensor(group), **more)


def first(name, given, **options):
    """The advantage of each response's first token."""
    return advantages.bound(name, options)(given)[:, 0].tolist()


near = partial(pytest.approx, abs=1e-6)
TWO = scored([1, 0, 0, 1, 1, 1, 1, 0], [0] * 4 + [1] * 4)


def test_standardised_in_the_group():
    given = scored([1, 0, 0, 1, 1], [0] * 5)
    assert first("group_z", given, eps=0.0) == near([0.730297, -1.095445, -1.095445, 0.730297, 0.730297])
    assert first("group_z", given, eps=0.0, correction=0.0)[:2] == near([0.816497, -1.224745])
    assert first("group_z", scored([1, 0, 0, 0], [0] * 4), eps=0.0) == near([1.5, -0.5, -0.5, -0.5])


def test_centred_and_left_out():
    given = scored([1, 0, 0, 0], [0] * 4)
    assert first("group_centre", given) == near([0.75, -0.25, -0.25, -0.25])
    assert first("leave_one_out", given) == near([1, -1 / 3, -1 / 3, -1 / 3])
    assert first("leave_one_out", given) == near([4 / 3 * a for a in first("group_centre", given)])
    assert first("pair_difference", scored([3, 1, 0, 5], [0, 0, 1, 1])) == near([2, -2, -5, 5])


def test_whitened_over_the_rollout():
    plus = [0.774597, -1.290994]
    assert first("returns_z", TWO) == near([plus[0], plus[1], plus[1], plus[0], *[plus[0]] * 3, plus[1]])
    base = [1.069045, -1.069045, 0.534522, -1.603567]
    expected = [base[0], base[1], base[1], base[0], *[base[2]] * 3, base[3]]
    assert first("group_then_global", TWO) == near(expected)
    assert first("centred_returns_z", TWO) == near(expected)


def test_against_the_greedy_response_with_the_penalty_in_the_reward():
    given = scored([2, 0], [0, 1], [2, 1], reward=torch.tensor([[-0.5, 1.75], [0.25, 0]]).double())
    found = advantages["greedy"](replace(given, baseline=torch.tensor([1.0, 3.0])))
    assert found.tolist() == [[0.25, 0.75], [-2.75, 0]]
    with pytest.raises(ConfigError, match="greedy response"):
        advantages["greedy"](given)


def test_steps_of_reasoning():
    ends, steps = torch.zeros(2, 6, dtype=torch.bool), torch.zeros(2, 6, dtype=torch.float64)
    for row_, found in enumerate([{1: 0.2, 4: 0.8}, {0: 0.5, 2: 0.1, 5: 0.9}]):
        for place, value in found.items():
            ends[row_, place], steps[row_, place] = True, value
    given = scored([0, 0], [0, 0], [5, 6], steps=steps, ends=ends)
    found = advantages["process_z"](given, eps=0.0)
    expected = [[0, 0, 0.948683, 0.948683, 0.948683, 0], [0, 0, 0, 1.264911, 1.264911, 1.264911]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)
    with pytest.raises(ConfigError, match="steps of reasoning"):
        advantages["process_z"](replace(given, steps=None))


@pytest.mark.parametrize("name", [n for n in advantages if advantages.facts(n).get("needs") == ("groups",)])
def test_responses_without_a_score_leave_no_trace(name):
    """Their numbers, whatever they are, change no other's advantage, and their own is 0."""
    full = scored([1, 0, 2, 5, 7], [0, 0, 0, 1, 1], [2, 3, 1, 2, 2])
    spoilt = replace(
        full,
        score=torch.cat([full.score, torch.tensor([99.0, -99.0]).double()]),
        reward=torch.cat([full.reward, torch.full((2, 3), 42.0).double()]),
        mask=torch.cat([full.mask, torch.zeros(2, 3, dtype=torch.bool)]),
        group=torch.tensor([0, 0, 0, 1, 1, 0, 1]),
    )
    found = advantages[name](spoilt)
    torch.testing.assert_close(found[:5], advantages[name](full), atol=1e-12, rtol=0)
    assert not found[5:].any()
    equal = advantages[name](scored([0.1] * 3 + [1, 0], [0, 0, 0, 1, 1]))
    assert name in ("centred_returns_z", "group_then_global", "leave_one_out", "group_centre") or not equal[:3].any()
