"""Advantage estimators over ``[B, T]`` rewards of right-padded responses: `Returns` in, ``[B, T]`` out, 0 outside the mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.ops.masked import segment_sum, whiten
from posttrain.registry import Registry

advantages = Registry("advantage")
"""Every estimator; the fact ``needs`` names what it reads beside rewards: groups, critic, greedy ..."""


@dataclass(frozen=True, kw_only=True)
class Returns:
    """What an estimator reads of a whole rollout, none of it with gradient.

    Attributes:
        score: ``[B]`` reward of each response, before any penalty.
        reward: ``[B, T]`` the same at the last sampled token, and the KL penalty of each token where it is in the reward.
        mask: ``[B, T]`` bool, sampled tokens; a response without any has no score and enters nothing.
        group: ``[B]`` which prompt.
        values: ``[B, T]`` of the critic, None without one.
    """

    score: Tensor
    reward: Tensor
    mask: Tensor
    group: Tensor
    values: Tensor | None = None


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


@advantages.register("gae")
def whitened_gae(given: Returns, *, gamma: float = 1.0, lam: float = 0.95) -> Tensor:
    """Generalised advantage estimation, whitened over all sampled tokens of the rollout; without a critic values are 0.

    Source: Schulman et al. 2016, eq. 16; lm-human-preferences.
    """
    values = torch.zeros_like(given.reward) if given.values is None else given.values
    return whiten(gae(given.reward, values, given.mask, gamma=gamma, lam=lam)[0], given.mask)


def group_centred(score: Tensor, group: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """``(score - mean of its group, count of the group)``, each ``[B]``, over ``live`` responses; 0 for the others."""
    groups = int(group.max()) + 1
    count = segment_sum(live.to(score.dtype), group, groups)
    total = segment_sum(torch.where(live, score, 0.0), group, groups)
    centred = score - (total / count.clamp(min=1))[group]
    return torch.where(live, centred, 0.0), count[group]


def flat_groups(score: Tensor, group: Tensor, live: Tensor) -> Tensor:
    """``[B]`` bool: responses whose group's live responses all have one score; there is nothing to learn from them."""
    groups = int(group.max()) + 1
    high = torch.full((groups,), -torch.inf, dtype=score.dtype).scatter_reduce(0, group[live], score[live], "amax")
    low = torch.full((groups,), torch.inf, dtype=score.dtype).scatter_reduce(0, group[live], score[live], "amin")
    return (high <= low)[group]


def _everywhere(given: Returns, of_response: Tensor) -> Tensor:
    """A number of each response ``[B]`` at all its sampled tokens."""
    return torch.where(given.mask, of_response[:, None], 0.0)


@advantages.register("group_z", needs=("groups",))
def group_z(given: Returns, *, correction: float = 1.0, eps: float = 1e-6) -> Tensor:
    """Standardised in its group: ``A = (r - mean) / (std + eps)`` at every token, exactly 0 where all scores are equal.

    ``correction`` 1 divides the variance by G - 1, 0 by G.
    Source: Shao et al. 2024 (DeepSeekMath), section 4.1.2.
    """
    live = given.mask.any(1)
    centred, count = group_centred(given.score, given.group, live)
    squares = segment_sum(centred.square(), given.group, int(given.group.max()) + 1)[given.group]
    std = (squares / (count - correction).clamp(min=1)).sqrt()
    flat = flat_groups(given.score, given.group, live)
    return _everywhere(given, torch.where(flat, 0.0, centred / (std + eps)))
