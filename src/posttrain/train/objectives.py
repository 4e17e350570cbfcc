"""Objectives: what a step minimises. Each returns sums with a unit; the loop divides them by the step's counts, once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from posttrain.forest import Batch
from posttrain.losses.policy import TokenTerms, clipped, ppo_clip, ratio, value_clip
from posttrain.losses.reward import bradley_terry, pair_weights
from posttrain.ops.kl import k3
from posttrain.ops.masked import masked_sum

Stats = Mapping[str, Mapping[str, Tensor]]  # role -> statistic -> tensor


@dataclass(frozen=True)
class Term:
    """A sum over this micro-batch, the unit whose count over the step divides it, and its weight (0 = only logged)."""

    sum: Tensor
    unit: str
    coefficient: float = 1.0


@dataclass(frozen=True)
class Check:
    """A line of the step-0 table; ``ok`` None = printed without a verdict."""

    name: str
    value: str
    expected: str
    ok: bool | None


class Objective(Protocol):
    """What `posttrain.train.loop.fit` needs of an objective."""

    @property
    def reads(self) -> Mapping[str, frozenset[str]]:
        """Statistics wanted of each trained role."""
        ...

    @property
    def mask(self) -> str | None:
        """The mask outside which token statistics are not computed."""
        ...

    @property
    def temperature(self) -> float:
        """What logits are divided by."""
        ...

    @property
    def whole_groups(self) -> bool:
        """Whether the responses of one prompt must stand in one micro-batch."""
        ...

    def __call__(self, stats: Stats, batch: Batch) -> dict[str, Term]:
        """Terms of a micro-batch, by metric name."""
        ...

    def check(self, stats: Stats, batch: Batch) -> list[Check]:
        """What must hold on the first micro-batch, before anything is changed."""
        ...


@dataclass(frozen=True)
class Supervised:
    """Negative log-likelihood ``-sum log pi(y_t) / trained tokens of the step``, nats a token."""

    reads = {"policy": frozenset({"logp"})}  # noqa: RUF012
    mask = "loss"
    temperature = 1.0
    whole_groups = False

    def __call__(self, stats: Stats, batch: Batch) -> dict[str, Term]:
        """The loss over the "loss" mask."""
        return {"loss/nll": Term(-masked_sum(stats["policy"]["logp"], batch.forest.masks["loss"]), "tokens")}

    def check(self, stats: Stats, batch: Batch) -> list[Check]:
        """Every response has trained tokens, and the last of each that was not cut is trained (it is the stop token)."""
        forest = batch.forest
        mask = forest.masks["loss"]
        trained = torch.zeros(len(forest.end), dtype=torch.long).index_add(0, forest.branch, mask.long())
        last = forest.lengths.cumsum(0) - 1
        stops = int((mask[last] | forest.truncated).sum())
        share = float(mask.float().mean())
        nll = float(-masked_sum(stats["policy"]["logp"].detach(), mask) / mask.sum().clamp(min=1))
        return [
            Check(
                "trained tokens",
                f"{share:.0%} of response tokens",
                "every response has some",
                bool((trained > 0).all()),
            ),
            Check("stop token trained", f"{stops} of {len(last)} responses", "all", stops == len(last)),
            Check("start loss", f"{nll:.3f} nats a token", "", None),
        ]


@dataclass(frozen=True)
class RewardModel:
    """A loss over the scores of each prompt's ranked responses, averaged over prompts; each response is forwarded once."""

    loss: Callable[..., Tensor] = bradley_terry
    reads = {"reward": frozenset({"score"})}  # noqa: RUF012
    mask = None
    temperature = 1.0
    whole_groups = True

    def __call__(self, stats: Stats, batch: Batch) -> dict[str, Term]:
        """The loss, the share of pairs ordered right, and the mean score."""
        score, rank, group = stats["reward"]["score"], batch.branches["rank"], batch.forest.group
        better, worse, weight = pair_weights(rank, group, score.dtype)
        gap = (score[better] - score[worse]).detach()
        right = (gap > 0).to(score.dtype) + 0.5 * (gap == 0).to(score.dtype)
        return {
            "loss/ranking": Term(self.loss(score, rank, group).sum(), "prompts"),
            "accuracy/pairs": Term((right * weight).sum(), "prompts", 0.0),
            "score/mean": Term(score.detach().sum(), "branches", 0.0),
        }

    def check(self, stats: Stats, batch: Batch) -> list[Check]:
        """Scores are finite and the untrained loss is near that of a coin, log 2."""
        score = stats["reward"]["score"].detach()
        loss = float(self(stats, batch)["loss/ranking"].sum) / len(batch.forest.trees)
        return [
            Check(
                "scores finite",
                f"{score.mean():+.3f} +- {score.std():.3f}",
                "finite",
                bool(score.isfinite().all()),
            ),
            Check("start loss", f"{loss:.3f} nats a prompt", "0.693 for equal scores", None),
        ]


@dataclass(frozen=True, kw_only=True)
class PolicyGradient:
    """A policy loss a sampled token, averaged over the step's tokens, and a clipped value loss for the critic if there is one.

    Batches carry ``old_logp``, ``advantage`` and, with a critic, ``old_value`` and ``return``, all ``[M]``.
    """

    loss: Callable[[TokenTerms], Tensor] = ppo_clip
    clip: float = 0.2
    value_clip: float = 0.2
    critic: bool = True
    temperature: float = 1.0
    ratio_tolerance: float = 1e-4
    mask = "sampled"
    whole_groups = False

    @property
    def reads(self) -> Mapping[str, frozenset[str]]:
        """Log-probabilities of the policy, values of the critic."""
        policy = {"policy": frozenset({"logp"})}
        return policy | {"value": frozenset({"value"})} if self.critic else policy

    def __call__(self, stats: Stats, batch: Batch) -> dict[str, Term]:
        """Policy and value losses, and how far the policy has moved from the one that sampled."""
        mask, tokens = batch.forest.masks["sampled"], batch.tokens
        terms = TokenTerms(
            logp=stats["policy"]["logp"],
            old_logp=tokens["old_logp"],
            advantage=tokens["advantage"],
            mask=mask,
        )
        now = terms.logp.detach()
        out = {
            "loss/policy": Term(masked_sum(self.loss(terms), mask), "tokens"),
            "policy/clipped": Term(masked_sum(clipped(terms, clip=self.clip).to(now.dtype), mask), "tokens", 0.0),
            "policy/ratio_error": Term(masked_sum((ratio(terms).detach() - 1).abs(), mask), "tokens", 0.0),
            "kl/update": Term(masked_sum(k3(terms.old_logp, now), mask), "tokens", 0.0),
        }
        if self.critic:
            loss = value_clip(stats["value"]["value"], tokens["old_value"], tokens["return"], clip=self.value_clip)
            out["loss/value"] = Term(masked_sum(loss, mask), "tokens")
        return out

    def check(self, stats: Stats, batch: Batch) -> list[Check]:
        """The sampler's distribution is the trainer's: the ratio is 1 before the first update, within the dtype's tolerance."""
        mask = batch.forest.masks["sampled"]
        gap = (stats["policy"]["logp"].detach() - batch.tokens["old_logp"])[mask]
        error = float((gap.exp() - 1).abs().mean())
        worst = float((gap.exp() - 1).abs().max())
        return [
            Check("sampled tokens", f"{int(mask.sum())}", "some", bool(mask.any())),
            Check(
                "ratio before updates",
                f"1 +- {error:.1e} (max {worst:.1e})",
                f"mean within {self.ratio_tolerance:g}",
                error <= self.ratio_tolerance,
            ),
            Check(
                "advantages finite",
                f"{batch.tokens['advantage'][mask].mean():+.3f}",
                "finite",
                bool(batch.tokens["advantage"].isfinite().all()),
            ),
        ]


def state_of(thing: Any) -> Any:
    """The JSON state of an objective or source that has one, else None."""
    return thing.state() if hasattr(thing, "state") else None
