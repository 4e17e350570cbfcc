"""Levels of the importance ratio: what a token's ``log rho`` is, given its own log-probabilities and its response's.

Each takes ``logp``, ``old_logp`` and ``mask`` ``[M]`` (sampled tokens) with ``branch`` and ``group`` ``[M]``, the response
and the prompt of each token, and returns log-ratios ``[M]`` in nats. Above the token, all tokens of a response have the
same value, and each carries its own part of the gradient, so that the mean over a response's tokens has the value and the
gradient of the response's ratio.
"""

from __future__ import annotations

from torch import Tensor

from posttrain.ops.masked import segment_sum
from posttrain.registry import Registry

ratio_levels = Registry("ratio level")
"""Every level; the fact ``whole_groups`` says that responses to one prompt must stand in one micro-batch."""


@ratio_levels.register("token")
def token(logp: Tensor, old_logp: Tensor, mask: Tensor, branch: Tensor, group: Tensor) -> Tensor:
    """Each token's own: ``log rho_t = logp_t - old_logp_t``.

    Source: Schulman et al. 2017 (PPO), eq. 6.
    """
    del mask, branch, group
    return logp - old_logp


def _sums(values: Tensor, mask: Tensor, segment: Tensor) -> Tensor:
    """``[M]``, at each token the sum over the sampled tokens of its segment, in float64."""
    size = int(segment.max()) + 1 if len(segment) else 0
    return segment_sum(values.double().masked_fill(~mask, 0.0), segment, size)[segment]


@ratio_levels.register("sequence_mean")
def sequence_mean(logp: Tensor, old_logp: Tensor, mask: Tensor, branch: Tensor, group: Tensor) -> Tensor:
    """The response's geometric mean: ``log s = mean_t (logp_t - old_logp_t)``.

    Source: Zheng et al. 2025 (GSPO), eq. 7; its token form, eq. 14.
    """
    del group
    count = _sums(mask, mask, branch).clamp(min=1)
    mean = _sums((logp - old_logp).detach(), mask, branch) / count
    return mean.to(logp.dtype) + (logp - logp.detach())


@ratio_levels.register("sequence_product")
def sequence_product(logp: Tensor, old_logp: Tensor, mask: Tensor, branch: Tensor, group: Tensor) -> Tensor:
    """The response as one action: ``log rho = sum_t (logp_t - old_logp_t)``.

    Source: DeepSeek-AI 2024 (DeepSeek-V2), eq. 32.
    """
    del group
    count = _sums(mask, mask, branch)
    whole = _sums((logp - old_logp).detach(), mask, branch)
    return whole.to(logp.dtype) + count.to(logp.dtype) * (logp - logp.detach())


@ratio_levels.register("pair_product", whole_groups=True)
def pair_product(logp: Tensor, old_logp: Tensor, mask: Tensor, branch: Tensor, group: Tensor) -> Tensor:
    """Both responses of a pair as one action: ``log rho = sum over the prompt's tokens of (logp - old_logp)``, without gradient.

    Source: Wu et al. 2023 (pairwise PPO), section 4.2.
    """
    del branch
    return _sums((logp - old_logp).detach(), mask, group).to(logp.dtype)
