"""Reward-model losses of whole rankings, of single responses, of their steps and of verdicts in words."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from posttrain.ops.masked import segment_sum


def plackett_luce(score: Tensor, rank: Tensor, group: Tensor) -> Tensor:
    """``-sum_k log(exp s_k / sum over j not before k of exp s_j)`` along each prompt's ranking, ``[G]`` in nats.

    Tied responses do not compete with each other: each is set against itself and what ranks below it. Of two responses
    this is Bradley-Terry.

    Args:
        score: ``[B]``.
        rank: ``[B]``, 0 = best.
        group: ``[B]`` index of the prompt, from 0 without gaps.

    Source: Plackett 1975; Zhu et al. 2023 (Starling).
    """
    if not len(score):
        return score
    same = group[:, None] == group[None]
    competes = same & ((rank[None] > rank[:, None]) | torch.eye(len(score), dtype=torch.bool, device=score.device))
    field = torch.where(competes, score[None].expand(len(score), -1), -torch.inf).logsumexp(1)
    return segment_sum(field - score, group, int(group.max()) + 1)


def attribute_error(predicted: Tensor, rating: Tensor) -> Tensor:
    """Mean squared error over the attributes of a response that were rated, ``[B, k] -> [B]``; NaN = not rated.

    Source: Wang et al. 2024, HelpSteer2, arXiv 2406.08673.
    """
    known = ~rating.isnan()
    error = torch.where(known, predicted - torch.where(known, rating, 0.0), 0.0).square()
    return error.sum(1) / known.sum(1).clamp(min=1)


def step_error(logit: Tensor, good: Tensor) -> Tensor:
    """``-p log sigmoid(z) - (1 - p) log sigmoid(-z)`` of each step, any shape; p is 0 or 1, or a share of right completions.

    Source: Lightman et al. 2023, arXiv 2305.20050; Wang et al. 2024, Math-Shepherd, arXiv 2312.08935.
    """
    return -good * logsigmoid(logit) - (1 - good) * logsigmoid(-logit)


def verdict_logp(logp: Tensor, group: Tensor) -> Tensor:
    """Log-probabilities of a few verdicts made to add up to 1 within each group, ``[B]``."""
    if not len(logp):
        return logp
    size = int(group.max()) + 1
    largest = torch.full((size,), -torch.inf, dtype=logp.dtype, device=logp.device)
    shifted = logp - largest.scatter_reduce(0, group, logp.detach(), "amax")[group]
    return shifted - segment_sum(shifted.exp(), group, size).log()[group]


def verdict_error(logp: Tensor, wanted: Tensor, group: Tensor) -> Tensor:
    """Cross-entropy ``-sum_i q_i log p_i`` of the verdicts' probabilities and those wanted, ``[G]`` in nats.

    Args:
        logp: ``[B]`` log-probability of each verdict in words, summed over its tokens.
        wanted: ``[B]``, adding up to 1 within a group.
        group: ``[B]`` index of the response that is judged.

    Source: Zhang et al. 2024, Generative verifiers, arXiv 2408.15240.
    """
    return segment_sum(-wanted * verdict_logp(logp, group), group, int(group.max()) + 1 if len(group) else 0)


def verdict_value(logp: Tensor, value: Tensor, group: Tensor) -> Tensor:
    """The expected verdict ``sum_i v_i p_i``, ``[G]``, from log-probabilities and values of the verdicts ``[B]``.

    Source: Lee et al. 2023, direct RLAIF, arXiv 2309.00267.
    """
    return segment_sum(value * verdict_logp(logp, group).exp(), group, int(group.max()) + 1 if len(group) else 0)


def step_score(probabilities: Tensor, how: str) -> Tensor:
    """One score of the steps' chances to be good ``[S]``: their ``product``, ``min``, ``mean`` or ``last``.

    Source: Lightman et al. 2023, section 2.3 (product, min).
    """
    if how == "last":
        return probabilities[-1]
    return {"product": torch.prod, "min": torch.min, "mean": torch.mean}[how](probabilities)
