"""Estimators of KL(policy || reference) from log-probabilities of tokens that the policy sampled.

Source: J. Schulman, "Approximating KL Divergence" (2020); with ``d = logp - ref_logp``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """``d`` in nats: unbiased, of either sign; any shape."""
    return logp - ref_logp


def k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """``d^2 / 2`` in nats: biased, low variance; as a loss its on-policy gradient is that of the reverse KL."""
    return 0.5 * (logp - ref_logp) ** 2


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """``exp(-d) - 1 + d`` in nats: unbiased and never negative; as a loss its on-policy gradient is that of the forward KL."""
    d = (logp - ref_logp).clamp(-20, 20)
    return torch.exp(-d) - 1 + d
