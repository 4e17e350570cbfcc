"""Alignment as a game between policies: rewards and losses from a preference function, which may run in circles."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.losses.listwise import Scored, group_mean, listwise_losses, log_ratio
from posttrain.ops.masked import segment_sum


def win_rates(score: Tensor, group: Tensor) -> Tensor:
    """``mean_j sigmoid(s_i - s_j)`` over all of a prompt's responses, itself among them (one half): ``[B]`` probabilities.

    Args:
        score: ``[B]`` log-odds of a pairwise ranker.
        group: ``[B]`` index of the prompt.

    Source: Wu et al. 2024 (SPPO), section 4.
    """
    size = int(group.max()) + 1 if len(group) else 0
    first, second = (group[:, None] == group[None]).nonzero(as_tuple=True)
    wins = segment_sum((score[first] - score[second]).sigmoid(), first, len(score))
    return wins / torch.bincount(group, minlength=size)[group]


def self_play_reward(better: Tensor) -> Tensor:
    """``sum_{j != i} P(y_i > y_j) / (K - 1)``: rewards of K samples of one policy by each other, ``[K]``.

    For any learner from rewards; a preference function that runs in circles is no obstacle.

    Args:
        better: ``[K, K]`` probabilities that row beats column; the diagonal is not read.

    Source: Swamy et al. 2024, A minimaximalist approach to reinforcement learning from human feedback, arXiv 2401.04056.
    """
    count = len(better)
    return (better.sum(1) - better.diagonal()) / max(1, count - 1)


def geometric_mixture(logp: Tensor, ref_logp: Tensor, *, share: float) -> Tensor:
    """``log softmax((1 - share) logp + share ref_logp)`` over the vocabulary: the opponent that Nash-MD samples; ``[..., V]``.

    Source: Munos et al. 2023, section 5.
    """
    return ((1 - share) * logp + share * ref_logp).log_softmax(-1)


@listwise_losses.register(
    "sppo",
    paper="Wu et al. 2024, Self-play preference optimization for language model alignment, arXiv 2405.00675",
    needs=("reference",),
    scores="win rate",
)
def sppo(rows: Scored, *, eta: float = 1000.0) -> Tensor:
    """SPPO: ``mean over responses of (h - eta (P - 1/2))^2``, P the response's win rate, in nats^2.

    The reference is the model of the round before. The paper trains on a prompt's best and worst response only.

    Source: Wu et al. 2024, eq. 4.5.
    """
    return group_mean(rows, (log_ratio(rows) - eta * (rows.score - 0.5)).square())


@listwise_losses.register(
    "nash_md",
    paper="Munos et al. 2023, Nash learning from human feedback, arXiv 2312.00886",
    needs=("reference",),
    scores="win rate",
    opponent="mixture",
)
def nash_md(rows: Scored, *, tau: float = 0.008) -> Tensor:
    """Nash-MD: ``-mean over responses of (P - 1/2 - tau h) log pi(y)``, the bracket without gradient.

    A response is the policy's own sample, P its probability to beat a sample of the `geometric_mixture` of policy and
    reference, h the log-ratio of the whole sequence. The value means nothing; its gradient is the method.

    Source: Munos et al. 2023, section 7.
    """
    coefficient = (rows.score - 0.5 - tau * log_ratio(rows)).detach()
    return group_mean(rows, -coefficient * rows.logp)
