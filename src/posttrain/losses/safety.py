"""Reward under a constraint on cost: a multiplier that rises while the cost is over its limit, and the advantage it mixes.

Source: Dai et al. 2023, Safe RLHF: safe reinforcement learning from human feedback, arXiv 2310.12773, eqs. 10 to 12 and appendix.
"""

from __future__ import annotations

import math

from torch import Tensor

from posttrain.errors import ConfigError


def mixed_advantage(reward: Tensor, cost: Tensor, multiplier: float) -> Tensor:
    """``(A_reward - multiplier A_cost) / (1 + multiplier)``, any shape.

    The division keeps the size of a step, and the whole weight of a KL penalty that both advantages carry, whatever the
    multiplier is.

    Raises:
        ConfigError: a multiplier below 0.
    """
    if multiplier < 0:
        raise ConfigError(f"got the multiplier {multiplier}; expected at least 0")
    return (reward - multiplier * cost) / (1 + multiplier)


def next_multiplier(multiplier: float, cost: float, *, limit: float, rate: float = 0.1, most: float = 5.0) -> float:
    """``min(exp(log m + rate m (cost - limit)), most)``: gradient ascent on ``m (cost - limit)`` in ``log m``.

    ``cost`` is the mean over recent responses. In the logarithm the multiplier stays positive by itself.
    """
    return min(math.exp(math.log(multiplier) + rate * multiplier * (cost - limit)), most)
