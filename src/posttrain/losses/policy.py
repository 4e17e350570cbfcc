"""Policy-gradient and value losses of a token, unreduced and of any shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.registry import Registry

policy_losses = Registry("policy loss")
"""Every loss; the fact ``needs`` names what it reads beside the policy's own numbers."""


@dataclass(frozen=True, kw_only=True)
class TokenTerms:
    """What a policy loss reads, every field of one shape; log-probabilities in nats.

    ``logp`` under the policy being trained, ``old_logp`` under the one that sampled, ``ref_logp`` under the reference (None
    where there is none); ``mask`` marks sampled tokens. ``log_ratio`` is that of the algorithm's level
    (`posttrain.losses.ratios`); None = the token's own.
    """

    logp: Tensor
    old_logp: Tensor
    advantage: Tensor
    mask: Tensor
    ref_logp: Tensor | None = None
    log_ratio: Tensor | None = None


def ratio(terms: TokenTerms) -> Tensor:
    """``exp(logp - old_logp)``, the difference clamped to +-20 nats so that a stray token can't overflow."""
    difference = terms.logp - terms.old_logp if terms.log_ratio is None else terms.log_ratio
    return difference.clamp(-20, 20).exp()


def _pessimistic(terms: TokenTerms, low: float, high: float) -> Tensor:
    """The larger of the surrogate's loss and the same with the ratio kept within ``[1 - low, 1 + high]``."""
    rho = ratio(terms)
    return torch.maximum(-terms.advantage * rho, -terms.advantage * rho.clamp(1 - low, 1 + high))


@policy_losses.register("ppo_clip")
def ppo_clip(terms: TokenTerms, *, clip: float = 0.2) -> Tensor:
    """Clipped surrogate ``max(-A rho, -A clip(rho, 1 - clip, 1 + clip))``.

    Source: Schulman et al. 2017 (PPO), eq. 7, as a loss.
    """
    return _pessimistic(terms, clip, clip)


def value_clip(value: Tensor, old_value: Tensor, returns: Tensor, *, clip: float = 0.2) -> Tensor:
    """Clipped value loss ``0.5 max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2)``; any shape.

    Source: lm-human-preferences.
    """
    near = old_value + (value - old_value).clamp(-clip, clip)
    return 0.5 * torch.maximum((value - returns).square(), (near - returns).square())
