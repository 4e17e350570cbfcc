"""Reward-model losses over the scores of one prompt's responses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def ranked_pairs(rank: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Indices ``(better, worse)``, each ``[P]``, of all pairs of one prompt whose ranks differ; ties make no pair.

    Args:
        rank: ``[B]``, 0 = best.
        group: ``[B]`` index of the prompt.
    """
    better = (group[:, None] == group[None]) & (rank[:, None] < rank[None])
    first, second = better.nonzero(as_tuple=True)
    return first, second


def pair_weights(rank: Tensor, group: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(better, worse, weight)``, each ``[P]``; weight = 1 / pairs of that prompt, so that prompts count equally."""
    better, worse = ranked_pairs(rank, group)
    size = int(group.max()) + 1 if len(group) else 0
    pairs = torch.bincount(group[better], minlength=size)
    return better, worse, 1.0 / pairs[group[better]].to(dtype)


def bradley_terry(score: Tensor, rank: Tensor, group: Tensor) -> Tensor:
    """``-1/C sum over pairs log sigmoid(s_better - s_worse)`` of a prompt's C pairs, spread over its pairs: ``[P]``.

    The sum over P is the sum over prompts of their mean pair loss; each response is scored once.

    Args:
        score: ``[B]``.
        rank: ``[B]``, 0 = best.
        group: ``[B]``.

    Source: Ouyang et al. 2022, eq. 1.
    """
    better, worse, weight = pair_weights(rank, group, score.dtype)
    return -logsigmoid(score[better] - score[worse]) * weight
