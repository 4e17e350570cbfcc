"""Policy-gradient and value losses of a token, unreduced and of any shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.registry import Registry

policy_losses = Registry("policy loss")


@dataclass(frozen=True, kw_only=True)
class TokenTerms:
    """What a policy loss reads, every field of one shape; log-probabilities in nats.

    ``logp`` under the policy being trained, ``old_logp`` under the one that sampled; ``mask`` marks sampled tokens.
    """

    logp: Tensor
    old_logp: Tensor
    advantage: Tensor
    mask: Tensor


def ratio(terms: TokenTerms) -> Tensor:
    """``exp(logp - old_logp)``, the difference clamped to +-20 nats so that a stray token can't overflow."""
    return (terms.logp - terms.old_logp).clamp(-20, 20).exp()


@policy_losses.register("ppo_clip")
def ppo_clip(terms: TokenTerms, *, clip: float = 0.2) -> Tensor:
    """Clipped surrogate ``max(-A rho, -A clip(rho, 1 - clip, 1 + clip))``.

    Source: Schulman et al. 2017 (PPO), eq. 7, as a loss.
    """
    rho = ratio(terms)
    return torch.maximum(-terms.advantage * rho, -terms.advantage * rho.clamp(1 - clip, 1 + clip))


def clipped(terms: TokenTerms, *, clip: float = 0.2) -> Tensor:
    """Where the clipped branch is the larger one, so that the token has no gradient; bool."""
    rho = ratio(terms)
    return -terms.advantage * rho.clamp(1 - clip, 1 + clip) > -terms.advantage * rho


def value_clip(value: Tensor, old_value: Tensor, returns: Tensor, *, clip: float = 0.2) -> Tensor:
    """Clipped value loss ``0.5 max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2)``; any shape.

    Source: lm-human-preferences.
    """
    near = old_value + (value - old_value).clamp(-clip, clip)
    return 0.5 * torch.maximum((value - returns).square(), (near - returns).square())
