"""Objectives of pairs of responses to one prompt; rankings of K give every pair of different rank.

Each is a loss of `posttrain.losses` with its options, averaged over a prompt's pairs and then over prompts by their weight.
They differ in what the loss is given beside sums of log-probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from posttrain.forest import Batch
from posttrain.losses import (
    ExploredPairs,
    PairLogps,
    ScoredPairs,
    TokenLogps,
    TokenPairs,
    explored_losses,
    preference,
    scored_losses,
    token_losses,
)
from posttrain.losses.preference import lengths, margin
from posttrain.ops.kl import k3
from posttrain.ops.masked import masked_sum, to_padded
from posttrain.registry import keyword_defaults
from posttrain.train.terms import (
    Check,
    Stats,
    Term,
    at_reference,
    branch_weight,
    objectives,
    ordered_right,
    pair_shares,
    response_sums,
    stop_check,
)


@dataclass(frozen=True)
class OfLoss:
    """An objective made of a loss out of ``registry``: a name in it or such a function, and its keyword arguments.

    ``tolerance`` in nats bounds what rounding alone may give a policy that is its own reference.
    """

    loss: str | Callable[..., Tensor] = ""
    options: Mapping[str, float] = field(default_factory=dict[str, float])
    tolerance: float = 1e-3
    registry = preference
    mask = "loss"
    temperature = 1.0

    @property
    def reads(self) -> Mapping[str, frozenset[str]]:
        """Log-probabilities of the policy."""
        return {"policy": frozenset({"logp"})}

    @cached_property
    def bound(self) -> Callable[[Any], Tensor]:
        """The loss with its options fixed."""
        return self.registry.bound(self.loss, self.options)

    @property
    def facts(self) -> Mapping[str, Any]:
        """What was stated where the loss was registered."""
        return self.registry.facts(self.loss)

    @property
    def coupled(self) -> bool:
        """As the loss was registered."""
        return bool(self.facts.get("coupled", False))


@objectives.register("preference", columns=("rank", "weight", "ref_logp"), losses=preference)
@dataclass(frozen=True)
class Preference(OfLoss):
    """A loss of pairs of responses to one prompt, averaged over a prompt's pairs and then over prompts by their weight.

    Rankings of K responses give every pair of different rank; each response is forwarded once. Batches carry ``rank``
    and ``weight`` ``[B]`` and, unless the loss needs no reference, ``ref_logp`` ``[M]``, the reference's log-probabilities.
    ``loss`` is a name in `posttrain.losses.preference` or such a function, ``options`` its keyword arguments. ``tolerance``
    in nats bounds the margin that rounding alone may give a policy that is its own reference.
    """

    loss: str | Callable[..., Tensor] = "dpo"
    whole_groups = True

    @property
    def against_reference(self) -> bool:
        """Whether the loss reads a reference; one that says nothing of it does."""
        return "reference" in self.facts.get("needs", ("reference",))

    @cached_property
    def beta(self) -> float:
        """What turns log-ratios into implicit rewards: the loss's ``beta``, 1 if it has none."""
        function = self.registry[self.loss] if isinstance(self.loss, str) else self.loss
        return float((keyword_defaults(function) | dict(self.options)).get("beta", 1.0))

    def pairs(self, stats: Stats, batch: Batch) -> tuple[PairLogps, Tensor]:
        """All pairs of the batch, and each one's share of the sum over prompts, ``[P]``; float64.

        Without a reference its log-probabilities are NaN, so that a loss that read them would not go unnoticed.
        """
        better, worse, share = pair_shares(batch, torch.float64)
        logp = response_sums(stats["policy"]["logp"], batch)
        length = response_sums(torch.ones_like(stats["policy"]["logp"]), batch)
        ref = torch.full_like(logp.detach(), math.nan)
        if self.against_reference:
            ref = response_sums(batch.tokens["ref_logp"], batch)
        pairs = PairLogps(
            chosen=logp[better],
            rejected=logp[worse],
            ref_chosen=ref[better],
            ref_rejected=ref[worse],
            chosen_len=length[better],
            rejected_len=length[worse],
        )
        return pairs, share

    def inputs(self, stats: Stats, batch: Batch, pairs: PairLogps) -> Any:
        """What the loss is given: the pairs themselves."""
        return pairs

    def losses(self, stats: Stats, batch: Batch, pairs: PairLogps) -> Tensor:
        """The loss of each pair, ``[P]``."""
        return self.bound(self.inputs(stats, batch, pairs))

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """Implicit rewards of chosen and rejected responses, each ``[P]``: beta times log-ratios, or what stands in for them."""
        sides = pairs.chosen.detach(), pairs.rejected.detach()
        if self.against_reference:
            sides = sides[0] - pairs.ref_chosen, sides[1] - pairs.ref_rejected
        over = lengths(pairs) if self.facts.get("per_token") else (1.0, 1.0)
        return self.beta * sides[0] / over[0], self.beta * sides[1] / over[1]

    def __call__(self, stats: Stats, batch: Batch) -> dict[str, Term]:
        """The loss, implicit rewards, the share of pairs they order right, and how far the policy is from the reference."""
        pairs, share = self.pairs(stats, batch)
        chosen, rejected = self.rewards(pairs)
        logged = {
            "reward/chosen": chosen,
            "reward/rejected": rejected,
            "reward/margin": chosen - rejected,
            "accuracy/pairs": ordered_right(chosen - rejected),
            "logp/chosen": pairs.chosen.detach(),
            "logp/rejected": pairs.rejected.detach(),
        }
        out = {"loss/preference": Term((self.losses(stats, batch, pairs) * share).sum(), "prompts")}
        out |= {name: Term((x * share).sum(), "prompts", 0.0) for name, x in logged.items()}
        return out | drift(stats, batch) if self.against_reference else out

    def check(self, stats: Stats, batch: Batch, step: int) -> list[Check]:
        """A run begins at the reference: every margin is 0, and the loss has the value that it has there."""
        begins = step == 0
        pairs, share = self.pairs(stats, batch)
        found = [
            Check("pairs", f"{len(share)}, each prompt computed once", "", None),
            stop_check(batch.forest, batch.forest.masks["loss"], begins),
        ]
        if self.against_reference:
            apart = float(margin(pairs).detach().abs().max())
            near = apart <= self.tolerance if begins else None
            expected = f"0 within {self.tolerance:g}" if begins else ""
            found.append(Check("margin to the reference", f"at most {apart:.1e} nats", expected, near))
        return [*found, self._start(stats, batch, float(share.sum()), begins)]

    def _start(self, stats: Stats, batch: Batch, prompts: float, begins: bool) -> Check:
        """The loss, beside its value where policy and reference agree on every token."""

        def mean(given: Stats) -> Tensor:
            return self(given, batch)["loss/preference"].sum / prompts

        loss = float(mean(stats).detach())
        if not (begins and self.against_reference):
            return Check("start loss", f"{loss:.6f} nats a pair", "", None)
        there, slack = at_reference(mean, stats, batch, self.tolerance)
        return Check(
            "start loss", f"{loss:.6f} nats a pair", f"{there:.6f} at the reference", abs(loss - there) <= slack
        )


def drift(stats: Stats, batch: Batch) -> dict[str, Term]:
    """How far the policy is from the reference on the data's tokens."""
    logp = stats["policy"]["logp"].detach()
    weight = branch_weight(batch, logp.dtype)[batch.forest.branch]
    apart = k3(batch.tokens["ref_logp"].to(logp.dtype), logp) * weight
    return {"kl/data": Term(masked_sum(apart, batch.forest.masks["loss"]), "tokens", 0.0)}


@objectives.register("scored_preference", columns=("rank", "score", "weight", "ref_logp"), losses=scored_losses)
@dataclass(frozen=True)
class ScoredPreference(Preference):
    """A loss of pairs that reads the ``score`` ``[B]`` of both responses, in the units that the loss's facts name."""

    loss: str | Callable[..., Tensor] = "reward_aware_po"
    registry = scored_losses

    def inputs(self, stats: Stats, batch: Batch, pairs: PairLogps) -> ScoredPairs:
        """The pairs with their scores."""
        better, worse, _ = pair_shares(batch, torch.float64)
        score = batch.branches["score"].double()
        return ScoredPairs(pairs=pairs, chosen_score=score[better], rejected_score=score[worse])


@objectives.register("explored_preference", columns=("rank", "explored", "weight", "ref_logp"), losses=explored_losses)
@dataclass(frozen=True)
class ExploredPreference(Preference):
    """A loss of pairs of which the reference sampled one response, where ``explored`` ``[B]`` is 1."""

    loss: str | Callable[..., Tensor] = "xpo"
    registry = explored_losses

    def inputs(self, stats: Stats, batch: Batch, pairs: PairLogps) -> ExploredPairs:
        """The pairs with the policy's log-probability of what the reference sampled."""
        better, worse, _ = pair_shares(batch, torch.float64)
        explored = batch.branches["explored"].double()
        return ExploredPairs(pairs=pairs, explored=explored[better] * pairs.chosen + explored[worse] * pairs.rejected)


STATISTIC = {"kl": "kl_from_other", "sum_p2": "sum_p2"}
"""Fields of `TokenLogps` that are statistics of the policy, by the name under which they are asked."""


@objectives.register(
    "token_preference", columns=("rank", "weight", "ref_logp", "ref_entropy", "written"), losses=token_losses
)
@dataclass(frozen=True)
class TokenPreference(Preference):
    """A loss of pairs that reads more of each token; what, the loss's facts say under ``reads``.

    A divergence from the reference needs the frozen role ``reference`` beside the policy. The reference's entropy is the
    column ``ref_entropy`` ``[M]``, as a share of log V; tokens that are no format are the column ``written`` ``[M]``, bool.
    """

    loss: str | Callable[..., Tensor] = "tdpo2"
    registry = token_losses

    @property
    def wanted(self) -> tuple[str, ...]:
        """Optional fields of `TokenLogps` that the loss reads, as registered or by an attribute of its own."""
        return self.facts.get("reads", getattr(self.loss, "reads", ()))

    @property
    def reads(self) -> Mapping[str, frozenset[str]]:
        """Log-probabilities of the policy, and the statistics that the loss reads."""
        return {"policy": frozenset({"logp", *(STATISTIC[name] for name in self.wanted if name in STATISTIC)})}

    def inputs(self, stats: Stats, batch: Batch, pairs: PairLogps) -> TokenPairs:
        """Chosen and rejected responses, token by token."""
        forest, policy = batch.forest, stats["policy"]
        better, worse, _ = pair_shares(batch, torch.float64)
        found = {"logp": policy["logp"], "ref_logp": batch.tokens["ref_logp"]}
        for name in self.wanted:
            found[name] = policy[STATISTIC[name]] if name in STATISTIC else batch.tokens[name]
        wide = {k: x if x.dtype == torch.bool else x.double() for k, x in found.items()}
        rows = {k: to_padded(x, forest.branch, len(forest.end))[0] for k, x in wide.items()}
        mask, _ = to_padded(forest.masks["loss"], forest.branch, len(forest.end))
        chosen, rejected = (
            TokenLogps(mask=mask[side], **{k: x[side] for k, x in rows.items()}) for side in (better, worse)
        )
        return TokenPairs(chosen=chosen, rejected=rejected)


@objectives.register("beta_dpo", columns=("rank", "weight", "ref_logp"))
@dataclass(frozen=True)
class BetaDPO(Preference):
    """DPO with a beta that follows the step's margins, on the pairs of a step whose margin is not unusual.

    Mean M and deviation S of margins run over steps: ``M <- momentum M + (1 - momentum) mean``, S alike, from 0, both
    before they are used. Of a step's pairs the share ``keep`` is drawn without replacement, with odds ``exp(-(D - M)^2 /
    (2 S^2))``; the loss is a mean over those. Draws follow from ``seed``, how many steps were made, and the order of margins.
    """

    loss: str | Callable[..., Tensor] = "beta_dpo"
    momentum: float = 0.9
    keep: float = 0.8
    seed: int = 0
    seen: dict[str, float] = field(default_factory=lambda: {"mean": 0.0, "deviation": 0.0, "steps": 0.0})

    def losses(self, stats: Stats, batch: Batch, pairs: PairLogps) -> Tensor:
        """The loss of kept pairs, 0 of others; kept ones stand in for all, so that the mean is theirs."""
        _, _, share = pair_shares(batch, torch.float64)
        gaps = margin(pairs).detach()
        now = {"mean": float(gaps.mean()), "deviation": float(gaps.std()) if len(gaps) > 1 else 0.0}
        for name, value in now.items():
            self.seen[name] = self.momentum * self.seen[name] + (1 - self.momentum) * value
        self.seen["steps"] += 1
        kept = self._draw(gaps)
        some = replace(pairs, **{name: x[kept] for name, x in vars(pairs).items()})
        loss = self.registry.bound(self.loss, {"centre": self.seen["mean"], **self.options})(some)
        return torch.zeros_like(gaps).index_put((kept,), loss * (share.sum() / share[kept].sum()))

    def _draw(self, gaps: Tensor) -> Tensor:
        """Indices of the pairs that are kept, at least one: the largest of log odds plus Gumbel noise."""
        g = torch.Generator().manual_seed((self.seed << 32) + int(self.seen["steps"]))
        noise = -torch.rand(len(gaps), generator=g, dtype=gaps.dtype).clamp(min=1e-300).log().neg().log()
        odds = -0.5 * ((gaps - self.seen["mean"]) / max(self.seen["deviation"], 1e-6)).square()
        odds = odds + torch.empty_like(gaps).index_copy(0, gaps.argsort(stable=True), noise.to(gaps.device))
        return odds.topk(max(1, math.floor(self.keep * len(gaps)))).indices.sort().values

    def state(self) -> dict[str, float]:
        """What runs over steps."""
        return dict(self.seen)

    def load_state(self, state: dict[str, float]) -> None:
        """Go on from it."""
        self.seen.update(state)
