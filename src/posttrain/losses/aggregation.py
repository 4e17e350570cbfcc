"""How losses of tokens become one number: a weight for each token ``[M]`` and the unit whose count over the step divides.

Each function takes ``mask`` ``[M]`` (sampled tokens) and ``branch`` ``[M]`` (their response) and returns the weights; the
fact ``unit`` is the divisor: all sampled tokens of the step, or its responses that have any. A divisor of the whole step
keeps micro-batches from changing the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.registry import Registry

aggregations = Registry("aggregation")


@aggregations.register("token_mean", unit="tokens")
def token_mean(mask: Tensor, branch: Tensor) -> Tensor:
    """Mean over tokens, each of equal weight: ``sum_i sum_t x / sum_i |o_i|``.

    Source: Yu et al. 2025 (DAPO), section 3.3; lm-human-preferences.
    """
    del branch
    return torch.ones(mask.shape, dtype=torch.float64, device=mask.device)


@aggregations.register("sequence_mean", unit="branches")
def sequence_mean(mask: Tensor, branch: Tensor) -> Tensor:
    """Mean over responses of each one's mean over its tokens: ``1/B sum_i 1/|o_i| sum_t x``.

    Tokens of long responses weigh less. Source: Shao et al. 2024 (DeepSeekMath), eq. 3.
    """
    if not len(branch):
        return torch.zeros(0, dtype=torch.float64)
    lengths = torch.bincount(branch[mask], minlength=int(branch.max()) + 1)
    return 1.0 / lengths.clamp(min=1).double()[branch]


@aggregations.register("sequence_sum", unit="branches")
def sequence_sum(mask: Tensor, branch: Tensor) -> Tensor:
    """Mean over responses of each one's sum over its tokens: ``1/B sum_i sum_t x``; the response is the action.

    Source: Ahmadian et al. 2024 (RLOO), section 2.
    """
    return token_mean(mask, branch)


@aggregations.register("sequence_sum_scaled", unit="branches")
def sequence_sum_scaled(mask: Tensor, branch: Tensor, *, longest: float = 1024.0) -> Tensor:
    """Mean over responses of each one's sum over its tokens, divided by a constant: ``1/B sum_i sum_t x / longest``.

    All tokens weigh the same in every step. ``longest`` is the largest number of tokens that a response can have.
    Source: Liu et al. 2025 (Dr. GRPO), arXiv 2503.20783, section 3.2.
    """
    return token_mean(mask, branch) / longest
