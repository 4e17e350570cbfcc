"""Objectives of single responses and of lists of them: labels, rewards, scores instead of an order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain.forest import Batch
from posttrain.losses import Labelled, Scored, listwise_losses, unpaired_losses, valued_losses
from posttrain.losses import Valued as ValuedRows
from posttrain.train.preferences import OfLoss, drift
from posttrain.train.terms import Check, Stats, Term, at_reference, branch_weight, objectives, response_sums, stop_check


@objectives.register("unpaired", columns=("label", "matched", "weight", "ref_logp"), losses=unpaired_losses)
@dataclass(frozen=True)
class Unpaired(OfLoss):
    """A loss of single responses that are good or bad, averaged over rows by their weight.

    Batches carry ``label`` (1 good, 0 bad), ``matched`` (0 where a response answers another prompt) and ``weight`` ``[B]``
    and the reference's ``ref_logp`` ``[M]``; their counts name ``good``, ``bad`` and ``mismatched`` responses.
    ``loss`` is a name in `posttrain.losses.unpaired_losses` or such a function, ``options`` its keyword arguments. A loss
    that reads the divergence from the reference needs the frozen role ``reference``.
    """

    loss: str | Callable[..., Tensor] = "kto"
    registry = unpaired_losses
    whole_groups = False

    @property
    def reads(self) -> Mapping[str, frozenset[str]]:
        """Log-probabilities of the policy, and the divergence if the loss reads it."""
        return {"policy": frozenset({"logp", *(["kl_from_other"] if "kl" in self.facts.get("reads", ()) else [])})}

    def rows(self, stats: Stats, batch: Batch) -> Labelled:
        """The responses; sums in float64."""
        policy, length = stats["policy"], response_sums(torch.ones_like(stats["policy"]["logp"]), batch)
        kl = policy.get("kl_from_other")
        return Labelled(
            logp=response_sums(policy["logp"], batch),
            ref_logp=response_sums(batch.tokens["ref_logp"], batch),
            length=length,
            label=batch.branches["label"] > 0,
            matched=batch.branches["matched"] > 0,
            kl=None if kl is None else response_sums(kl, batch) / length.clamp(min=1),
        )

    def __call__(self, stats: Stats, batch: Batch) -> dict[str, Term]:
        """The loss, mean log-ratios of good, bad and mismatched responses, and how far the policy is from the reference."""
        rows = self.rows(stats, batch)
        weight = branch_weight(batch, torch.float64)
        out = {"loss/unpaired": Term((self.bound(rows) * weight).sum(), "prompts")}
        h = (rows.logp - rows.ref_logp).detach()
        kinds = {
            "good": rows.matched & rows.label,
            "bad": rows.matched & ~rows.label,
            "mismatched": ~rows.matched,
        }
        for kind, where in kinds.items():
            if batch.counts[kind]:  # of the whole step
                out[f"logratio/{kind}"] = Term(torch.where(where, h * weight, 0.0).sum(), kind, 0.0)
        return out | drift(stats, batch)

    def check(self, stats: Stats, batch: Batch, step: int) -> list[Check]:
        """A run begins at the reference, where the loss has the value that it has there."""
        return start_checks(self, "loss/unpaired", stats, batch, step)


def start_checks(objective: Any, name: str, stats: Stats, batch: Batch, step: int) -> list[Check]:
    """Stop tokens are trained, log-ratios are 0, and the loss has the value that it has at the reference."""
    begins, tolerance = step == 0, objective.tolerance
    apart = response_sums(stats["policy"]["logp"].detach() - batch.tokens["ref_logp"], batch).abs().max()

    def mean(given: Stats) -> Tensor:
        return objective(given, batch)[name].sum / len(batch.forest.end)

    loss = float(mean(stats).detach())
    there, slack = at_reference(mean, stats, batch, tolerance)
    return [
        stop_check(batch.forest, batch.forest.masks["loss"], begins),
        Check(
            "log-ratio to the reference",
            f"at most {float(apart):.1e} nats",
            f"0 within {tolerance:g}" if begins else "",
            float(apart) <= tolerance if begins else None,
        ),
        Check(
            "start loss",
            f"{loss:.6f} a response",
            f"{there:.6f} at the reference" if begins else "",
            abs(loss - there) <= slack if begins else None,
        ),
    ]


@objectives.register("listwise", columns=("score", "weight", "ref_logp"), losses=listwise_losses)
@dataclass(frozen=True)
class Listwise(OfLoss):
    """A loss of all of a prompt's responses with a score each, averaged over prompts by their weight.

    Batches carry ``score`` and ``weight`` ``[B]`` and the reference's ``ref_logp`` ``[M]``; what a score is, the loss's facts
    say. ``loss`` is a name in `posttrain.losses.listwise_losses` or such a function, ``options`` its keyword arguments.
    """

    loss: str | Callable[..., Tensor] = "info_nca"
    registry = listwise_losses
    whole_groups = True

    def __call__(self, stats: Stats, batch: Batch) -> dict[str, Term]:
        """The loss, and how far the policy is from the reference."""
        forest, logp = batch.forest, stats["policy"]["logp"]
        rows = Scored(
            logp=response_sums(logp, batch),
            ref_logp=response_sums(batch.tokens["ref_logp"], batch),
            length=response_sums(torch.ones_like(logp), batch),
            score=batch.branches["score"].double(),
            group=forest.group,
        )
        first = torch.searchsorted(forest.group, torch.arange(rows.prompts))
        weight = branch_weight(batch, torch.float64)[first]
        return {"loss/listwise": Term((self.bound(rows) * weight).sum(), "prompts")} | drift(stats, batch)

    def check(self, stats: Stats, batch: Batch, step: int) -> list[Check]:
        """A run begins at the reference, where the loss has the value that it has there."""
        return start_checks(self, "loss/listwise", stats, batch, step)


@objectives.register("valued", columns=("reward", "weight", "ref_logp"), losses=valued_losses)
@dataclass(frozen=True)
class Valued(OfLoss):
    """A loss of single responses with a scalar reward and of the value network that expects it, averaged by weight.

    Batches carry ``reward`` and ``weight`` ``[B]`` and the reference's ``ref_logp`` ``[M]``. The role ``value`` is read
    where the prompt ends. ``loss`` is a name in `posttrain.losses.valued_losses` or such a function.
    """

    loss: str | Callable[..., Tensor] = "dro_v"
    registry = valued_losses
    whole_groups = False

    @property
    def reads(self) -> Mapping[str, frozenset[str]]:
        """Log-probabilities of the policy, and values."""
        return {"policy": frozenset({"logp"}), "value": frozenset({"value"})}

    def __call__(self, stats: Stats, batch: Batch) -> dict[str, Term]:
        """The loss, how well the value network expects rewards, and how far the policy is from the reference."""
        forest = batch.forest
        begins = forest.lengths.cumsum(0) - forest.lengths  # first targets, which the prompt's last state predicts
        rows = ValuedRows(
            logp=response_sums(stats["policy"]["logp"], batch),
            ref_logp=response_sums(batch.tokens["ref_logp"], batch),
            reward=batch.branches["reward"].double(),
            value=stats["value"]["value"][begins].double(),
        )
        weight = branch_weight(batch, torch.float64)
        error = (rows.reward - rows.value.detach()).square() * weight
        return {
            "loss/valued": Term((self.bound(rows) * weight).sum(), "prompts"),
            "value/error": Term(error.sum(), "prompts", 0.0),
        } | drift(stats, batch)

    def check(self, stats: Stats, batch: Batch, step: int) -> list[Check]:
        """A run begins at the reference, where the loss has the value that it has there."""
        return start_checks(self, "loss/valued", stats, batch, step)
