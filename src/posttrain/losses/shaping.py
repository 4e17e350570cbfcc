"""What is added to scores or set between steps: penalties of length, the KL coefficient, weights where sampler and trainer differ."""

from __future__ import annotations

import math

from torch import Tensor

from posttrain.ops.masked import segment_sum
from posttrain.registry import Registry


def overlong_penalty(length: Tensor, *, longest: float, buffer: float) -> Tensor:
    """Soft punishment of length, ``[B]``: 0 up to ``longest - buffer`` tokens, falling to -1 at ``longest``, -1 beyond.

    Source: Yu et al. 2025 (DAPO), eq. 13.
    """
    return ((longest - buffer - length) / buffer).clamp(-1.0, 0.0)


def adaptive_kl(
    coefficient: float, kl: float, *, sequences: int, target: float = 6.0, horizon: float = 10_000.0
) -> float:
    """The next KL coefficient: ``c (1 + clip(kl / target - 1, -0.2, 0.2) sequences / horizon)``.

    Args:
        coefficient: the present one.
        kl: what it led to, in nats a sequence.
        sequences: responses since the last change.
        target: the KL that is wanted, in nats a sequence.
        horizon: responses over which the coefficient moves.

    Source: Ziegler et al. 2019, section 2.2.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * sequences / horizon)


def next_multiplier(
    multiplier: float, cost: float, *, limit: float = 0.0, rate: float = 0.1, cap: float = 5.0
) -> float:
    """The next Lagrange multiplier: ``log m`` moves by ``rate m (cost - limit)``; at most ``cap``.

    ``cost`` is the mean cost of recent responses, ``limit`` what it may be.
    Source: Dai et al. 2023 (Safe RLHF), arXiv 2310.12773, eq. 11, and the authors' code.
    """
    return min(multiplier * math.exp(rate * multiplier * (cost - limit)), cap)


def constrained_advantage(reward: Tensor, cost: Tensor, *, multiplier: float) -> Tensor:
    """``(A_reward - m A_cost) / (1 + m)`` of each token, any shape; the divisor keeps the size of steps.

    Source: Dai et al. 2023 (Safe RLHF), eq. 31.
    """
    return (reward - multiplier * cost) / (1 + multiplier)


mismatch_weights = Registry("mismatch weight")
"""What multiplies a token's loss where the sampler's distribution is not the trainer's.

Each takes the trainer's ``old_logp`` and the sampler's ``sampled_logp``, ``mask`` and ``branch``, all ``[M]``, and returns
``[M]``, without gradient.
"""


@mismatch_weights.register("truncate")
def truncate(old_logp: Tensor, sampled_logp: Tensor, mask: Tensor, branch: Tensor, *, cap: float = 2.0) -> Tensor:
    """Truncated importance weight of a token: ``min(exp(old_logp - sampled_logp), cap)``.

    Source: Yao et al. 2025, Your efficient RL framework secretly brings you off-policy RL training.
    """
    del mask, branch
    return (old_logp - sampled_logp).clamp(max=20).exp().clamp(max=cap)


@mismatch_weights.register("band")
def band(
    old_logp: Tensor, sampled_logp: Tensor, mask: Tensor, branch: Tensor, *, low: float = 0.5, high: float = 5.0
) -> Tensor:
    """Importance weight of a token, 0 outside ``[low, high]``.

    Source: Ling team 2025 (IcePop).
    """
    del mask, branch
    weight = (old_logp - sampled_logp).clamp(max=20).exp()
    return weight.masked_fill((weight < low) | (weight > high), 0.0)


@mismatch_weights.register("reject")
def reject(old_logp: Tensor, sampled_logp: Tensor, mask: Tensor, branch: Tensor, *, cap: float = 3.0) -> Tensor:
    """Importance weight of the response, ``exp(sum_t (old_logp - sampled_logp))``, and 0 for one above ``cap``: it is rejected.

    Source: Liu et al. 2025, When speed kills stability.
    """
    size = int(branch.max()) + 1 if len(branch) else 0
    gap = segment_sum((old_logp - sampled_logp).masked_fill(~mask, 0.0), branch, size)
    weight = gap.clamp(max=20).exp()
    return weight.masked_fill(weight > cap, 0.0)[branch]
