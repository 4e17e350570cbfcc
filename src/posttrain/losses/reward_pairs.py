"""Reward-model losses of pairs of scored responses to one prompt, one loss a pair ``[P]``.

Facts: ``paper``; ``reads``, which columns of the data beside the order a loss needs: ``rating`` (how good people found each
response, in the data's units), ``better`` (the probability that the first of two is the better one) or ``unsafe``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from posttrain.errors import ConfigError
from posttrain.losses.preference import positive
from posttrain.registry import Registry

reward_losses = Registry("reward loss", data="pairs")


@dataclass(frozen=True, kw_only=True)
class ScoredPair:
    """Pairs of responses, every field ``[P]``: scores of the better and the worse one, and what the data says of them.

    ``margin`` is the better one's rating less the worse one's, ``better`` the probability that the order is right;
    ``chosen_unsafe`` and ``rejected_unsafe`` are 1 for a harmful response, else 0. What a loss does not read may be None.
    """

    chosen: Tensor
    rejected: Tensor
    margin: Tensor | None = None
    better: Tensor | None = None
    chosen_unsafe: Tensor | None = None
    rejected_unsafe: Tensor | None = None

    @property
    def gap(self) -> Tensor:
        """``d = s_chosen - s_rejected``."""
        return self.chosen - self.rejected


def known(name: str, column: Tensor | None) -> Tensor:
    """A column that a loss reads.

    Raises:
        ConfigError: the pairs were made without it.
    """
    if column is None:
        raise ConfigError(f"the loss reads '{name}' of every pair and got none; give that column")
    return column


@reward_losses.register("bradley_terry", paper="Bradley and Terry 1952; Ouyang et al. 2022, arXiv 2203.02155")
def bradley_terry_pair(pairs: ScoredPair) -> Tensor:
    """Bradley-Terry: ``-log sigmoid(d)``.

    Source: Ouyang et al. 2022, eq. 1.
    """
    return -logsigmoid(pairs.gap)


@reward_losses.register("margin", paper="Touvron et al. 2023, Llama 2, arXiv 2307.09288", reads=("rating",))
def margin_pair(pairs: ScoredPair, *, scale: float = 1.0) -> Tensor:
    """Bradley-Terry with a margin: ``-log sigmoid(d - scale m)``, m how much better people found the better one.

    Llama 2's four grades are margins of 1, 2/3, 1/3 and 0, or three times that.

    Source: Touvron et al. 2023, eq. 2.
    """
    return -logsigmoid(pairs.gap - scale * known("rating", pairs.margin))


@reward_losses.register("tempered", paper="Liu et al. 2024, Skywork-Reward, arXiv 2410.18451")
def tempered_pair(pairs: ScoredPair, *, temperature: float = 2.0) -> Tensor:
    """Bradley-Terry at a temperature: ``-log sigmoid(d / T)``.

    Raises:
        ConfigError: ``temperature`` not above 0.

    Source: Liu et al. 2024, section 3.2.
    """
    return -logsigmoid(pairs.gap / positive("temperature", temperature))


@reward_losses.register("focal", paper="Cai et al. 2024, InternLM2, arXiv 2403.17297")
def focal_pair(pairs: ScoredPair, *, gamma: float = 2.0) -> Tensor:
    """Focal ranking: ``-(1 - 2 max(0, P - 1/2))^gamma log P`` with ``P = sigmoid(d)``; pairs already right count less.

    Source: Cai et al. 2024, eq. 1.
    """
    certainty = 2 * relu(torch.sigmoid(pairs.gap) - 0.5)
    return -((1 - certainty).clamp(min=1e-12) ** gamma) * logsigmoid(pairs.gap)


def barrier(score: Tensor, bound: float = 5.0) -> Tensor:
    """``-(log(s + b) + log(b - s))``, which holds scores within ``(-b, b)``; its gradient is 0 outside ``b - 0.001``.

    Source: Cai et al. 2024, eq. 2; clamped as xtuner does.
    """
    inside = score.clamp(-bound + 1e-3, bound - 1e-3)
    return -((inside + bound).log() + (bound - inside).log())


@reward_losses.register("focal_barrier", paper="Cai et al. 2024, InternLM2, arXiv 2403.17297")
def focal_barrier_pair(pairs: ScoredPair, *, gamma: float = 2.0, lam: float = 0.02) -> Tensor:
    """Focal ranking with a log-barrier: `focal` ``+ lam (pen(s_c) + pen(s_r))``, ``pen(s) = -log(s + 5) - log(5 - s)``.

    It is negative where scores are small.

    Source: Cai et al. 2024, eq. 1 and 2.
    """
    return focal_pair(pairs, gamma=gamma) + lam * (barrier(pairs.chosen) + barrier(pairs.rejected))


@reward_losses.register("hinge", paper="Liu et al. 2024, Skywork-Reward, arXiv 2410.18451")
def hinge_pair(pairs: ScoredPair, *, target: float = 1.0) -> Tensor:
    """Hinge: ``max(0, target - d)``.

    Source: Liu et al. 2024, section 3.2.
    """
    return relu(target - pairs.gap)


@reward_losses.register("margin_mse", paper="Liu et al. 2024, Skywork-Reward, arXiv 2410.18451")
def margin_mse_pair(pairs: ScoredPair, *, target: float = 1.0) -> Tensor:
    """Squared distance of the gap from a target: ``(d - target)^2``.

    Source: Liu et al. 2024, section 3.2.
    """
    return (pairs.gap - target).square()


@reward_losses.register("soft", paper="Bai et al. 2022, arXiv 2212.08073; Lee et al. 2023, RLAIF", reads=("better",))
def soft_pair(pairs: ScoredPair) -> Tensor:
    """Cross-entropy on soft labels: ``-p log sigmoid(d) - (1 - p) log sigmoid(-d)``.

    Source: Bai et al. 2022, section 4.1.
    """
    p = known("better", pairs.better)
    return -p * logsigmoid(pairs.gap) - (1 - p) * logsigmoid(-pairs.gap)


@reward_losses.register("scaled", paper="Wang et al. 2024, HelpSteer2-Preference, arXiv 2410.01257", reads=("rating",))
def scaled_pair(pairs: ScoredPair) -> Tensor:
    """Scaled Bradley-Terry: ``-m log sigmoid(d)``, m how much better people found the better one.

    Source: Wang et al. 2024, eq. 5.
    """
    return -known("rating", pairs.margin) * logsigmoid(pairs.gap)


@reward_losses.register("cost", paper="Dai et al. 2023, Safe RLHF, arXiv 2310.12773", reads=("unsafe",), sign=-1)
def cost_pair(pairs: ScoredPair, *, l2: float = 0.001) -> Tensor:
    """Cost: ``-log sigmoid(C_w - C_b) - log sigmoid(s_w C_w) - log sigmoid(s_b C_b) + l2 (C_w^2 + C_b^2) / 2``.

    ``C_b`` is the cost of the better (less harmful) response and ``C_w`` that of the worse; ``s`` is 1 for unsafe responses
    and -1 for safe ones, so that a cost above 0 says unsafe.

    Source: Dai et al. 2023, eq. 6.
    """
    total = -logsigmoid(pairs.rejected - pairs.chosen) + l2 * (pairs.chosen.square() + pairs.rejected.square()) / 2
    for cost, unsafe in ((pairs.chosen, pairs.chosen_unsafe), (pairs.rejected, pairs.rejected_unsafe)):
        total = total - logsigmoid((2 * known("unsafe", unsafe) - 1) * cost)
    return total


def centring(pairs: ScoredPair) -> Tensor:
    """``(s_chosen + s_rejected)^2``: times a coefficient (0.01) it holds scores around 0.

    Source: Eisenstein et al. 2023, arXiv 2312.09244.
    """
    return (pairs.chosen + pairs.rejected).square()
