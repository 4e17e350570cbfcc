"""Objectives of reward models beyond plain Bradley-Terry: each reads scores where its kind has them.

All are averaged over a prompt's pairs, responses or steps first and then over prompts by their weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from posttrain.forest import Batch
from posttrain.losses.reward_pairs import ScoredPair, centring, reward_losses
from posttrain.losses.reward_points import attribute_error, plackett_luce, step_error, verdict_error, verdict_value
from posttrain.ops.masked import segment_sum
from posttrain.train.terms import (
    Check,
    Stats,
    Term,
    branch_weight,
    objectives,
    ordered_right,
    pair_shares,
    response_sums,
)


@dataclass(frozen=True)
class _OfScores:
    """What all of them are: scores of the role ``reward``, a prompt's responses together."""

    mask = None
    temperature = 1.0
    whole_groups = True
    coupled = False

    def check(self, stats: Stats, batch: Batch, step: int) -> list[Check]:
        """Scores are finite."""
        found = torch.cat([x.detach().flatten() for role in stats.values() for x in role.values()])
        value = f"{found.mean():+.3f} +- {found.std():.3f}"
        return [Check("scores finite", value, "finite", bool(found.isfinite().all()))]


def response_share(batch: Batch, dtype: torch.dtype) -> Tensor:
    """``[B]``, the row's weight over its number of responses."""
    group = batch.forest.group
    return branch_weight(batch, dtype) / torch.bincount(group)[group].to(dtype)


def prompt_weight(batch: Batch, dtype: torch.dtype) -> Tensor:
    """``[G]``, the weight of each row."""
    group = batch.forest.group
    return branch_weight(batch, dtype)[torch.searchsorted(group, torch.arange(int(group.max()) + 1))]


def scored_pairs(score: Tensor, batch: Batch, better: Tensor, worse: Tensor) -> ScoredPair:
    """The batch's pairs with the columns that it has: ``rating``, ``better`` (the better response's) and ``unsafe``."""
    columns = {
        name: batch.branches[name].to(score.dtype) for name in ("rating", "better", "unsafe") if name in batch.branches
    }
    rating, sure, unsafe = (columns.get(name) for name in ("rating", "better", "unsafe"))
    return ScoredPair(
        chosen=score[better],
        rejected=score[worse],
        margin=None if rating is None else rating[better] - rating[worse],
        better=None if sure is None else sure[better],
        chosen_unsafe=None if unsafe is None else unsafe[better],
        rejected_unsafe=None if unsafe is None else unsafe[worse],
    )


def pair_terms(score: Tensor, batch: Batch, sign: int = 1) -> dict[str, Term]:
    """The share of pairs ordered right, and the mean score; ``sign`` -1 where the better response scores less."""
    better, worse, share = pair_shares(batch, score.dtype)
    gap = sign * (score[better] - score[worse]).detach()
    return {
        "accuracy/pairs": Term((ordered_right(gap) * share).sum(), "prompts", 0.0),
        "score/mean": Term(score.detach().sum(), "branches", 0.0),
    }


@objectives.register("reward_ranked", columns=("rank", "rating", "better", "unsafe", "weight"), losses=reward_losses)
@dataclass(frozen=True)
class RankedReward(_OfScores):
    """A loss of pairs of scores out of `posttrain.losses.reward_pairs`, each response forwarded once.

    Batches carry ``rank`` and ``weight`` ``[B]`` and what the loss reads: ``rating``, ``better`` or ``unsafe``. ``centre`` is
    the coefficient of ``(s_chosen + s_rejected)^2``.
    """

    loss: str | Callable[..., Tensor] = "bradley_terry"
    options: Mapping[str, float] = field(default_factory=dict[str, float])
    centre: float = 0.0
    reads = {"reward": frozenset({"score"})}  # noqa: RUF012

    @cached_property
    def bound(self) -> Callable[[ScoredPair], Tensor]:
        """The loss with its options fixed."""
        return reward_losses.bound(self.loss, self.options)

    def __call__(self, stats: Stats, batch: Batch) -> dict[str, Term]:
        """The loss, the centring, the share of pairs ordered right, and the mean score."""
        score = stats["reward"]["score"]
        better, worse, share = pair_shares(batch, score.dtype)
        pairs = scored_pairs(score, batch, better, worse)
        out = {"loss/ranking": Term((self.bound(pairs) * share).sum(), "prompts")}
        if self.centre:
            out["loss/centring"] = Term((centring(pairs) * share).sum(), "prompts", self.centre)
        return out | pair_terms(score, batch, reward_losses.facts(self.loss).get("sign", 1))


@objectives.register("reward_listed", columns=("rank", "weight"))
@dataclass(frozen=True)
class ListedReward(_OfScores):
    """Plackett-Luce over each prompt's whole ranking (`posttrain.losses.reward_points.plackett_luce`)."""

    reads = {"reward": frozenset({"score"})}  # noqa: RUF012

    def __call__(self, stats: Stats, batch: Batch) -> dict[str, Term]:
        """The loss, the share of pairs ordered right, and the mean score."""
        score = stats["reward"]["score"]
        losses = plackett_luce(score, batch.branches["rank"], batch.forest.group)
        return {"loss/ranking": Term((losses * prompt_weight(batch, score.dtype)).sum(), "prompts")} | pair_terms(
            score, batch
        )


@objectives.register("reward_attributes", columns=("attributes", "rated", "weight"))
@dataclass(frozen=True)
class AttributeReward(_OfScores):
    """Mean squared error of k attributes at each response's last token.

    Batches carry ``attributes`` ``[B, k]`` and ``rated`` ``[B, k]``, 1 where an attribute was rated and else 0.
    """

    reads = {"reward": frozenset({"scores"})}  # noqa: RUF012

    def __call__(self, stats: Stats, batch: Batch) -> dict[str, Term]:
        """The error, averaged over the prompt's responses."""
        scores = stats["reward"]["scores"]
        given = batch.branches["attributes"].to(scores.dtype)
        error = attribute_error(scores, torch.where(batch.branches["rated"] > 0, given, torch.nan))
        return {"loss/attributes": Term((error * response_share(batch, scores.dtype)).sum(), "prompts")}


@objectives.register("reward_steps", columns=("good", "weight"))
@dataclass(frozen=True)
class StepReward(_OfScores):
    """Cross-entropy at the last token of each labelled step (mask "step"), averaged over a response's steps.

    Batches carry ``good`` ``[M]``, the chance that the step which ends there is good.
    """

    reads = {"reward": frozenset({"marks"})}  # noqa: RUF012
    mask = "step"

    def __call__(self, stats: Stats, batch: Batch) -> dict[str, Term]:
        """The loss, and the share of steps judged as labelled (a half and more is good)."""
        forest, logit = batch.forest, stats["reward"]["marks"]
        ends, size = forest.masks["step"], len(forest.end)
        good = batch.tokens["good"].to(logit.dtype)
        steps = segment_sum(ends.to(logit.dtype), forest.branch, size).clamp(min=1)
        share = response_share(batch, logit.dtype)

        def mean(values: Tensor) -> Tensor:
            return (segment_sum(torch.where(ends, values, 0.0), forest.branch, size) / steps * share).sum()

        right = ((logit.detach() > 0) == (good >= 0.5)).to(logit.dtype)
        return {
            "loss/steps": Term(mean(step_error(logit, good)), "prompts"),
            "accuracy/steps": Term(mean(right), "prompts", 0.0),
        }


@objectives.register("reward_verdict", columns=("wanted", "weight"))
@dataclass(frozen=True)
class VerdictReward(_OfScores):
    """Cross-entropy of a language model's verdict in words on one response, its branches being the words on offer.

    Batches carry ``wanted`` ``[B]``, the probability that each word should have; those of a row add up to 1.
    """

    reads = {"policy": frozenset({"logp"})}  # noqa: RUF012
    mask = "loss"

    def __call__(self, stats: Stats, batch: Batch) -> dict[str, Term]:
        """The loss, and the share of responses whose likeliest verdict is the one most wanted."""
        group, logp = batch.forest.group, response_sums(stats["policy"]["logp"], batch)
        wanted, weight = batch.branches["wanted"].to(logp.dtype), prompt_weight(batch, logp.dtype)
        hit = (best_of(logp.detach(), group) & best_of(wanted, group)).to(logp.dtype)
        return {
            "loss/verdict": Term((verdict_error(logp, wanted, group) * weight).sum(), "prompts"),
            "accuracy/verdicts": Term((hit * branch_weight(batch, logp.dtype)).sum(), "prompts", 0.0),
        }


def best_of(values: Tensor, group: Tensor) -> Tensor:
    """``[B]`` bool: the first largest value of its group."""
    size, place = int(group.max()) + 1, torch.arange(len(values))
    largest = torch.full((size,), -torch.inf, dtype=values.dtype).scatter_reduce(0, group, values, "amax")
    at = torch.where(values == largest[group], place, len(values))
    first = torch.full((size,), len(values)).scatter_reduce(0, group, at, "amin")
    return place == first[group]


@objectives.register("reward_gated", columns=("rank", "weight"))
@dataclass(frozen=True)
class GatedReward(_OfScores):
    """Bradley-Terry on ``sum_i g_i(x) r_i(x, y)``: attribute scores weighted by what a gate makes of the prompt.

    Source: Wang et al. 2024, ArmoRM, arXiv 2406.12845.
    """

    reads = {"reward": frozenset({"scores", "gate"})}  # noqa: RUF012

    def __call__(self, stats: Stats, batch: Batch) -> dict[str, Term]:
        """The loss, the share of pairs ordered right, and the mean score."""
        score = (stats["reward"]["scores"] * stats["reward"]["gate"]).sum(1)
        better, worse, share = pair_shares(batch, score.dtype)
        losses = reward_losses["bradley_terry"](scored_pairs(score, batch, better, worse))
        return {"loss/ranking": Term((losses * share).sum(), "prompts")} | pair_terms(score, batch)


def expected_verdict(stats: Mapping[str, Any], batch: Batch, value: Tensor) -> Tensor:
    """``[G]``, the expected value of the verdicts of each row, ``value`` ``[B]`` being what each word is worth."""
    logp = response_sums(stats["logp"], batch)
    return verdict_value(logp, value.to(logp.dtype), batch.forest.group)
