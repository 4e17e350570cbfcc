"""Quark: a pool of scored responses is sorted into bins, and the policy learns to write each under its bin's token.

Source: Lu et al. 2022, Quark: controllable text generation with reinforced unlearning, arXiv 2205.13636.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reward_bins(score: Tensor, *, bins: int = 5) -> Tensor:
    """The bin of each score ``[P]``, 0 the best, all of equal size but the worst, which takes the remainder; ties by place."""
    size = max(len(score) // bins, 1)
    order = score.argsort(descending=True, stable=True)
    return torch.empty_like(order).index_copy(0, order, (torch.arange(len(score)) // size).clamp(max=bins - 1))


def quark(logp: Tensor, kl: Tensor, entropy: Tensor, *, beta: float = 0.05, eta: float = 0.06) -> Tensor:
    """``-logp + beta kl - eta entropy`` of each token, any shape, in nats.

    ``logp`` is given the reward token, ``kl`` the reverse KL to the reference over the vocabulary without reward tokens.
    Source: Lu et al. 2022, eq. 2; direction of the KL and ``eta`` as in the authors' code.
    """
    return -logp + beta * kl - eta * entropy
