"""Advantage estimators over ``[B, T]`` rewards of right-padded responses."""

from __future__ import annotations

import torch
from torch import Tensor


def token_reward(score: Tensor, logp: Tensor, ref_logp: Tensor, mask: Tensor, *, kl: float) -> Tensor:
    """Reward a token: ``R_t = -kl (logp_t - ref_logp_t) + 1[t last sampled] score``.

    Args:
        score: ``[B]`` reward of the whole response.
        logp: ``[B, T]`` log-probabilities in nats under the policy that sampled.
        ref_logp: ``[B, T]`` the same under the reference.
        mask: ``[B, T]`` bool, sampled tokens, the stop token included; right-padded.
        kl: coefficient of the penalty.

    Returns:
        ``[B, T]``, 0 outside the mask.

    Source: Ouyang et al. 2022 (InstructGPT), eq. 2; lm-human-preferences.
    """
    reward = torch.where(mask, -kl * (logp - ref_logp), 0.0)
    steps = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, steps, -1).max(1).values
    return reward + torch.where((steps[None] == last[:, None]) & mask, score[:, None], 0.0)


def gae(
    reward: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation; returns ``(advantage, return)``, both ``[B, T]``, 0 outside the mask.

    ``delta_t = R_t + gamma V_{t+1} - V_t``, ``A_t = delta_t + gamma lam A_{t+1}``, ``return = A + V``, with V and A zero
    past the last masked token; tokens outside the mask inside a response are stepped over.

    Source: Schulman et al. 2016, eq. 16.
    """
    advantage = torch.zeros_like(reward)
    next_value = torch.zeros_like(reward[:, 0])
    next_advantage = torch.zeros_like(reward[:, 0])
    for t in range(reward.shape[1] - 1, -1, -1):
        on = mask[:, t]
        delta = reward[:, t] + gamma * next_value - values[:, t]
        current = delta + gamma * lam * next_advantage
        next_advantage = torch.where(on, current, next_advantage)
        next_value = torch.where(on, values[:, t], next_value)
        advantage[:, t] = torch.where(on, current, 0.0)
    return advantage, torch.where(mask, advantage + values, 0.0)
