"""Objectives: what a step minimises."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain.forest import Batch
from posttrain.losses import find_loss
from posttrain.losses.reward import bradley_terry
from posttrain.ops.masked import masked_sum
from posttrain.train.critic_first import CriticFirst
from posttrain.train.odin import Odin
from posttrain.train.policy_gradient import PolicyGradient
from posttrain.train.preferences import BetaDPO, ExploredPreference, Preference, ScoredPreference, TokenPreference
from posttrain.train.ptx import Ptx
from posttrain.train.quark import RewardConditioned
from posttrain.train.responses import Listwise, Unpaired, Valued
from posttrain.train.reward_objectives import (
    AttributeReward,
    GatedReward,
    ListedReward,
    RankedReward,
    StepReward,
    VerdictReward,
)
from posttrain.train.safe import ConstrainedPolicyGradient
from posttrain.train.terms import (
    Check,
    Stats,
    Term,
    branch_weight,
    objectives,
    ordered_right,
    pair_shares,
    stop_check,
)

__all__ = [
    "AttributeReward",
    "BetaDPO",
    "ConstrainedPolicyGradient",
    "CriticFirst",
    "ExploredPreference",
    "GatedReward",
    "ListedReward",
    "Listwise",
    "Odin",
    "PolicyGradient",
    "Preference",
    "Ptx",
    "RankedReward",
    "RewardConditioned",
    "RewardModel",
    "ScoredPreference",
    "StepReward",
    "Supervised",
    "TokenPreference",
    "Unpaired",
    "Valued",
    "VerdictReward",
    "objective_of",
    "objectives",
]


def objective_of(loss: str | Callable[..., Tensor], options: Mapping[str, float], tolerance: float) -> Any:
    """The objective that trains with a preference loss: the one of its own name, else the one that takes such losses.

    Raises:
        ConfigError: an unknown loss, or an option that it does not have.
    """
    registry = find_loss(loss)
    registry.bound(loss, options)
    own = loss if isinstance(loss, str) and loss in objectives else ""
    name = own or next(name for name in objectives if objectives.facts(name).get("losses") is registry)
    return objectives[name](loss, options, tolerance)


@objectives.register("supervised", columns=("weight",))
@dataclass(frozen=True)
class Supervised:
    """Negative log-likelihood ``-sum w log pi(y_t) / sum w`` over trained tokens of the step, w the row's weight; nats a token."""

    reads = {"policy": frozenset({"logp"})}  # noqa: RUF012
    mask = "loss"
    temperature = 1.0
    whole_groups = False
    coupled = False

    def __call__(self, stats: Stats, batch: Batch) -> dict[str, Term]:
        """The loss over the "loss" mask."""
        logp = stats["policy"]["logp"]
        weighted = logp * branch_weight(batch, logp.dtype)[batch.forest.branch]
        return {"loss/nll": Term(-masked_sum(weighted, batch.forest.masks["loss"]), "tokens")}

    def check(self, stats: Stats, batch: Batch, step: int) -> list[Check]:
        """Every response has trained tokens, and the last of each that was not cut is trained (it is the stop token)."""
        forest, begins = batch.forest, step == 0
        mask = forest.masks["loss"]
        trained = torch.zeros(len(forest.end), dtype=torch.long).index_add(0, forest.branch, mask.long())
        share = float(mask.float().mean())
        nll = float(-masked_sum(stats["policy"]["logp"].detach(), mask) / mask.sum().clamp(min=1))
        return [
            Check(
                "trained tokens",
                f"{share:.0%} of response tokens",
                "every response has some",
                bool((trained > 0).all()) if begins else None,
            ),
            stop_check(forest, mask, begins),
            Check("start loss", f"{nll:.3f} nats a token", "", None),
        ]


@objectives.register("reward_model", columns=("rank", "weight"))
@dataclass(frozen=True)
class RewardModel:
    """A loss over the scores of each prompt's ranked responses, averaged over prompts; each response is forwarded once."""

    loss: Callable[..., Tensor] = bradley_terry
    reads = {"reward": frozenset({"score"})}  # noqa: RUF012
    mask = None
    temperature = 1.0
    whole_groups = True
    coupled = False

    def __call__(self, stats: Stats, batch: Batch) -> dict[str, Term]:
        """The loss, the share of pairs ordered right, and the mean score."""
        score, rank, group = stats["reward"]["score"], batch.branches["rank"], batch.forest.group
        better, worse, share = pair_shares(batch, score.dtype)
        row = branch_weight(batch, score.dtype)[better]
        gap = (score[better] - score[worse]).detach()
        return {
            "loss/ranking": Term((self.loss(score, rank, group) * row).sum(), "prompts"),
            "accuracy/pairs": Term((ordered_right(gap) * share).sum(), "prompts", 0.0),
            "score/mean": Term(score.detach().sum(), "branches", 0.0),
        }

    def check(self, stats: Stats, batch: Batch, step: int) -> list[Check]:
        """Scores are finite and the untrained loss is near that of a coin, log 2."""
        score = stats["reward"]["score"].detach()
        _, _, share = pair_shares(batch, score.dtype)
        loss = float(self(stats, batch)["loss/ranking"].sum / share.sum())
        return [
            Check(
                "scores finite",
                f"{score.mean():+.3f} +- {score.std():.3f}",
                "finite",
                bool(score.isfinite().all()),
            ),
            Check("start loss", f"{loss:.3f} nats a prompt", "0.693 for equal scores", None),
        ]
