"""Policy-gradient and value losses of a token, unreduced and of any shape."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.errors import ConfigError
from posttrain.registry import Registry

policy_losses = Registry("policy loss", data="fresh samples")
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


@policy_losses.register("clip_higher")
def clip_higher(terms: TokenTerms, *, low: float = 0.2, high: float = 0.28) -> Tensor:
    """Clipped surrogate with more room above: ``max(-A rho, -A clip(rho, 1 - low, 1 + high))``.

    Unlikely tokens may grow further, which keeps entropy up.
    Source: Yu et al. 2025 (DAPO), section 3.1.
    """
    return _pessimistic(terms, low, high)


@policy_losses.register("dual_clip")
def dual_clip(terms: TokenTerms, *, clip: float = 0.2, bound: float = 3.0) -> Tensor:
    """Clipped surrogate whose loss is at most ``-A bound`` where ``A < 0``, so that a large ratio can't blow it up.

    Source: Ye et al. 2020, Mastering complex control in MOBA games, eq. 5.
    """
    loss = _pessimistic(terms, clip, clip)
    return torch.where(terms.advantage < 0, torch.minimum(loss, -terms.advantage * bound), loss)


@policy_losses.register("reinforce")
def reinforce(terms: TokenTerms) -> Tensor:
    """Score function ``-A logp``, without a ratio: right for one update on fresh samples.

    Source: Williams 1992.
    """
    return -terms.advantage * terms.logp


@policy_losses.register("cispo")
def cispo(terms: TokenTerms, *, low: float = 0.0, cap: float = 5.0) -> Tensor:
    """Score function weighted by the truncated ratio, ``-sg(clip(rho, low, cap)) A logp``; no token loses its gradient.

    ``cap`` is the largest weight itself, not what is added to 1.
    Source: MiniMax 2025 (MiniMax-M1), eq. 4.
    """
    return -ratio(terms).clamp(low, cap).detach() * terms.advantage * terms.logp


@policy_losses.register("p3o")
def p3o(terms: TokenTerms, *, clip: float = 0.2) -> Tensor:
    """Score function weighted by the clipped ratio of a pair, ``-sg(clip(rho, 1 - clip, 1 + clip)) A logp``.

    Source: Wu et al. 2023 (pairwise PPO), arXiv 2310.00212, clipped jointly.
    """
    return -ratio(terms).clamp(1 - clip, 1 + clip).detach() * terms.advantage * terms.logp


@policy_losses.register("apa", needs=("reference",))
def apa(terms: TokenTerms, *, scale: float = 0.1) -> Tensor:
    """Squared distance from the tilted start, ``(logp - ref_logp - A / scale)^2``; the reference is the initial policy.

    Source: Zhu et al. 2023 (advantage-induced policy alignment), arXiv 2306.02231, eq. 6.
    """
    if terms.ref_logp is None:
        raise ConfigError("the loss 'apa' reads the reference's log-probabilities; got none")
    return (terms.logp - terms.ref_logp - terms.advantage / scale).square()


@policy_losses.register("awr")
def awr(terms: TokenTerms, *, scale: float = 1.0, cap: float = 20.0) -> Tensor:
    """Likelihood weighted by the advantage, ``-min(exp(A scale), cap) logp``.

    Source: Peng et al. 2019 (advantage-weighted regression), arXiv 1910.00177, eq. 10; weights cut at 20 as there.
    """
    weight = (terms.advantage * scale).clamp(max=math.log(cap)).exp()
    return -weight * terms.logp


def value_clip(value: Tensor, old_value: Tensor, returns: Tensor, *, clip: float = 0.2) -> Tensor:
    """Clipped value loss ``0.5 max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2)``; any shape.

    Source: lm-human-preferences.
    """
    near = old_value + (value - old_value).clamp(-clip, clip)
    return 0.5 * torch.maximum((value - returns).square(), (near - returns).square())
