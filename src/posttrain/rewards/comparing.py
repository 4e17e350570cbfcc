"""Comparisons: anything that says how likely one answer is to beat another, and what K answers to one prompt are worth by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from posttrain.errors import RewardError
from posttrain.losses.games import self_play_reward
from posttrain.rewards.base import Completion, Reward, Score

Comparison = Callable[[str, str, str], float]
"""``(prompt, a, b) -> P(a is better than b)``; it may run in circles, and may favour the answer that it reads first."""

WIN_RATE = "win_rate"
"""The rating of a response, and the part of a score, that is its probability to beat one of its prompt's responses."""


def from_scores(function: Callable[[str, str], float]) -> Comparison:
    """The comparison of a score: ``sigmoid(f(prompt, a) - f(prompt, b))``."""

    def compare(prompt: str, a: str, b: str) -> float:
        return sigmoid(function(prompt, a) - function(prompt, b))

    return compare


def sigmoid(x: float) -> float:
    """``1 / (1 + exp(-x))`` without overflow."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def compared(compare: Comparison, prompt: str, answers: Sequence[str]) -> list[list[float]]:
    """``P_ij``, the probability that answer i beats answer j, ``[K, K]``; 1/2 on the diagonal.

    Each pair is asked in both orders, ``P_ij = (p(i, j) + 1 - p(j, i)) / 2``, so that a judge who favours the first answer
    favours none.

    Raises:
        RewardError: the comparison gave something that is no probability.
    """
    count = len(answers)
    asked = [[0.5] * count for _ in range(count)]
    for i, a in enumerate(answers):
        for j, b in enumerate(answers):
            if i == j:
                continue
            p = asked[i][j] = float(compare(prompt, a, b))
            if not 0 <= p <= 1:
                raise RewardError(f"the comparison gave {p} for {a[:40]!r} against {b[:40]!r}; expected 0 to 1")
    return [[(asked[i][j] + 1 - asked[j][i]) / 2 for j in range(count)] for i in range(count)]


def win_rates(better: Sequence[Sequence[float]]) -> list[float]:
    """``mean_j P_ij`` over all K responses, the response itself among them (one half): probabilities.

    What SPPO estimates of the chance to beat the policy. Source: Wu et al. 2024, section 4.
    """
    return [sum(row) / len(row) for row in better]


def self_play_scores(better: Sequence[Sequence[float]]) -> list[float]:
    """``sum_{j != i} P_ij / (K - 1)``: a response by the others of its own policy.

    Source: Swamy et al. 2024 (SPO), arXiv 2401.04056.
    """
    return self_play_reward(torch.tensor(better, dtype=torch.float64)).tolist()


def comparison_reward(compare: Comparison) -> Reward:
    """A reward out of a comparison: each response's `self_play_scores` among those to its prompt, ``win_rate`` beside it.

    Any learner from rewards then plays against its own policy, also where the comparison runs in circles.

    Raises (when called):
        RewardError: a prompt with a single response.
    """

    def reward(completions: Sequence[Completion]) -> list[Score]:
        members: dict[int, list[int]] = {}
        for i, c in enumerate(completions):
            members.setdefault(c.group, []).append(i)
        scores: list[Score] = [Score(None)] * len(completions)
        for places in members.values():
            if len(places) < 2:
                raise RewardError("a comparison needs at least 2 responses to a prompt, got 1; sample more")
            prompt = completions[places[0]].example.prompt[-1].content
            better = compared(compare, prompt, [completions[i].text for i in places])
            for i, own, rate in zip(places, self_play_scores(better), win_rates(better), strict=True):
                scores[i] = Score(own, {WIN_RATE: rate})
        return scores

    return reward
