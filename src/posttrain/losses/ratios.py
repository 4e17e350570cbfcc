"""Levels of the importance ratio: what a token's ``log rho`` is, given its own log-probabilities and its response's.

Each takes ``logp``, ``old_logp`` and ``mask`` ``[M]`` (sampled tokens) with ``branch`` and ``group`` ``[M]``, the response
and the prompt of each token, and returns log-ratios ``[M]`` in nats.
"""

from __future__ import annotations

from torch import Tensor

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
