"""Advantage estimators over ``[B, T]`` rewards of right-padded responses: `Returns` in, ``[B, T]`` out, 0 outside the mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.errors import ConfigError
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
        baseline: ``[B]`` score of the greedy response to the same prompt, None without one.
        steps: ``[B, T]`` scores of steps of reasoning, each at its step's last token; ``ends`` ``[B, T]`` bool says where.
    """

    score: Tensor
    reward: Tensor
    mask: Tensor
    group: Tensor
    values: Tensor | None = None
    baseline: Tensor | None = None
    steps: Tensor | None = None
    ends: Tensor | None = None


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


@advantages.register("group_centre", needs=("groups",))
def group_centre(given: Returns) -> Tensor:
    """Centred in its group: ``A = r - mean`` at every token.

    Source: Liu et al. 2025 (Dr. GRPO), section 3.2.
    """
    return _everywhere(given, group_centred(given.score, given.group, given.mask.any(1))[0])


@advantages.register("leave_one_out", needs=("groups",))
def leave_one_out(given: Returns) -> Tensor:
    """Against the mean of the others: ``A_i = R_i - mean_{j != i} R_j`` at every token, R the sum of token rewards.

    Source: Ahmadian et al. 2024 (RLOO), arXiv 2402.14740, section 3.
    """
    whole = torch.where(given.mask, given.reward, 0.0).sum(1)
    centred, count = group_centred(whole, given.group, given.mask.any(1))
    return _everywhere(given, centred * count / (count - 1).clamp(min=1))


@advantages.register("pair_difference", needs=("pairs",))
def pair_difference(given: Returns) -> Tensor:
    """Against the other response of a pair: ``A_1 = R_1 - R_2 = -A_2`` at every token, R the sum of token rewards.

    Source: Wu et al. 2023 (pairwise PPO), eq. 5.
    """
    whole = torch.where(given.mask, given.reward, 0.0).sum(1)
    return _everywhere(given, 2 * group_centred(whole, given.group, given.mask.any(1))[0])


def returns_to_go(reward: Tensor, mask: Tensor, *, gamma: float = 1.0) -> Tensor:
    """``G_t = sum_{s >= t} gamma^(s - t) R_s`` over sampled tokens, ``[B, T]``, 0 outside the mask."""
    return gae(reward, torch.zeros_like(reward), mask, gamma=gamma, lam=1.0)[0]


@advantages.register("greedy", needs=("greedy",))
def greedy(given: Returns, *, gamma: float = 1.0) -> Tensor:
    """Against the greedy response: ``A_t = G_t - r(greedy)``, G the return-to-go with the KL penalty, if it is in the reward.

    Source: Li et al. 2023 (ReMax), arXiv 2310.10505, algorithm 1.
    """
    if given.baseline is None:
        raise ConfigError("the advantage 'greedy' reads the score of each prompt's greedy response; got none")
    forward = returns_to_go(given.reward, given.mask, gamma=gamma)
    return torch.where(given.mask, forward - given.baseline[:, None], 0.0)


@advantages.register("returns_z")
def returns_z(given: Returns, *, gamma: float = 1.0) -> Tensor:
    """Returns-to-go, whitened over all sampled tokens of the rollout.

    Source: Hu 2025 (REINFORCE++), arXiv 2501.03262, section 3.
    """
    return whiten(returns_to_go(given.reward, given.mask, gamma=gamma), given.mask)


@advantages.register("centred_returns_z", needs=("groups",))
def centred_returns_z(given: Returns, *, gamma: float = 1.0) -> Tensor:
    """Returns-to-go less the mean score of the group, whitened over all sampled tokens of the rollout.

    Source: OpenRLHF, estimator ``reinforce_baseline``.
    """
    centred, _ = group_centred(given.score, given.group, given.mask.any(1))
    forward = returns_to_go(given.reward, given.mask, gamma=gamma)
    return whiten(forward + (centred - given.score)[:, None], given.mask)


@advantages.register("group_then_global", needs=("groups",))
def group_then_global(given: Returns) -> Tensor:
    """Scores centred in their group at every token, whitened over all sampled tokens of the rollout.

    Source: Hu 2025 (REINFORCE++), the form with a baseline.
    """
    return whiten(group_centre(given), given.mask)


@advantages.register("process_z", needs=("groups", "steps"))
def process_z(given: Returns, *, correction: float = 0.0, eps: float = 1e-6) -> Tensor:
    """Scores of steps standardised over all steps of the group, and summed over a token's own step and those after it.

    ``A_t = sum over steps that end at t or later of (s - mean) / (std + eps)``; 0 where all steps of a group score the same.
    Source: Shao et al. 2024 (DeepSeekMath), section 4.1.3.
    """
    if given.steps is None or given.ends is None:
        raise ConfigError("the advantage 'process_z' reads scores of steps of reasoning; the reward gave none")
    on = given.ends & given.mask
    group = given.group[:, None].expand_as(on)[on]
    scores, live = given.steps[on], torch.ones_like(given.steps[on], dtype=torch.bool)
    centred, count = group_centred(scores, group, live)
    squares = segment_sum(centred.square(), group, int(group.max()) + 1)[group]
    std = (squares / (count - correction).clamp(min=1)).sqrt()
    z = torch.where(flat_groups(scores, group, live), 0.0, centred / (std + eps))
    placed = torch.zeros_like(given.steps).masked_scatter(on, z)
    return torch.where(given.mask, placed.flip(1).cumsum(1).flip(1), 0.0)
