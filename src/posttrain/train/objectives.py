"""Objectives: what a step minimises."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from posttrain.forest import Batch
from posttrain.losses import PairLogps, preference
from posttrain.losses.policy import TokenTerms, clipped, policy_losses, ppo_clip, ratio, value_clip
from posttrain.losses.preference import margin
from posttrain.losses.reward import bradley_terry
from posttrain.ops.kl import k3
from posttrain.ops.masked import masked_sum, segment_sum
from posttrain.registry import Registry, keyword_defaults
from posttrain.train.terms import Check, Stats, Term, branch_weight, ordered_right, pair_shares, stop_check

objectives = Registry("objective")
"""Every objective; facts: ``columns`` that its batches carry beside the forest, ``losses`` that it can be given."""


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


@objectives.register("policy_gradient", columns=("old_logp", "advantage", "old_value", "return"), losses=policy_losses)
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
    coupled = False

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

    def check(self, stats: Stats, batch: Batch, step: int) -> list[Check]:
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


@objectives.register("preference", columns=("rank", "weight", "ref_logp"), losses=preference)
@dataclass(frozen=True)
class Preference:
    """A loss of pairs of responses to one prompt, averaged over a prompt's pairs and then over prompts by their weight.

    Rankings of K responses give every pair of different rank; each response is forwarded once. Batches carry ``rank``
    and ``weight`` ``[B]`` and ``ref_logp`` ``[M]``, the reference's log-probabilities. ``loss`` is a name in
    `posttrain.losses.preference` or such a function, ``options`` its keyword arguments. ``tolerance`` in nats bounds the
    margin that rounding alone may give a policy that is its own reference.
    """

    loss: str | Callable[..., Tensor] = "dpo"
    options: Mapping[str, float] = field(default_factory=dict[str, float])
    tolerance: float = 1e-3
    reads = {"policy": frozenset({"logp"})}  # noqa: RUF012
    mask = "loss"
    temperature = 1.0
    whole_groups = True

    @cached_property
    def bound(self) -> Callable[[PairLogps], Tensor]:
        """The loss with its options fixed."""
        return preference.bound(self.loss, self.options)

    @cached_property
    def beta(self) -> float:
        """What turns log-ratios into implicit rewards: the loss's ``beta``, 1 if it has none."""
        function = preference[self.loss] if isinstance(self.loss, str) else self.loss
        return float((keyword_defaults(function) | dict(self.options)).get("beta", 1.0))

    @property
    def coupled(self) -> bool:
        """As the loss was registered."""
        return bool(preference.facts(self.loss).get("coupled", False))

    def pairs(self, stats: Stats, batch: Batch) -> tuple[PairLogps, Tensor]:
        """All pairs of the batch, and each one's share of the sum over prompts, ``[P]``; float64.

        Sums are taken in float64: margins are small differences of large sums.
        """
        forest, mask = batch.forest, batch.forest.masks["loss"]
        better, worse, share = pair_shares(batch, torch.float64)
        logp, ref, length = (
            segment_sum(torch.where(mask, x.double(), 0.0), forest.branch, len(forest.end))
            for x in (stats["policy"]["logp"], batch.tokens["ref_logp"], mask)
        )
        pairs = PairLogps(
            chosen=logp[better],
            rejected=logp[worse],
            ref_chosen=ref[better],
            ref_rejected=ref[worse],
            chosen_len=length[better],
            rejected_len=length[worse],
        )
        return pairs, share

    def __call__(self, stats: Stats, batch: Batch) -> dict[str, Term]:
        """The loss, implicit rewards, the share of pairs they order right, and how far the policy is from the reference."""
        pairs, share = self.pairs(stats, batch)
        chosen = self.beta * (pairs.chosen - pairs.ref_chosen).detach()
        rejected = self.beta * (pairs.rejected - pairs.ref_rejected).detach()
        logged = {
            "reward/chosen": chosen,
            "reward/rejected": rejected,
            "reward/margin": chosen - rejected,
            "accuracy/pairs": ordered_right(chosen - rejected),
            "logp/chosen": pairs.chosen.detach(),
            "logp/rejected": pairs.rejected.detach(),
        }
        logp = stats["policy"]["logp"].detach()
        weight = branch_weight(batch, logp.dtype)[batch.forest.branch]
        drift = k3(batch.tokens["ref_logp"].to(logp.dtype), logp) * weight
        return {
            "loss/preference": Term((self.bound(pairs) * share).sum(), "prompts"),
            **{name: Term((x * share).sum(), "prompts", 0.0) for name, x in logged.items()},
            "kl/data": Term(masked_sum(drift, batch.forest.masks["loss"]), "tokens", 0.0),
        }

    def check(self, stats: Stats, batch: Batch, step: int) -> list[Check]:
        """A run begins at the reference: every margin is 0, and the loss has the value it declares there."""
        begins = step == 0
        pairs, share = self.pairs(stats, batch)
        apart = float(margin(pairs).detach().abs().max())
        loss = float((self.bound(pairs).detach() * share).sum() / share.sum())
        declared = preference.facts(self.loss).get("at_reference")
        near = None if declared is None else abs(loss - declared) <= 1e-9 + self.beta * self.tolerance
        return [
            Check("pairs", f"{len(share)}, each prompt computed once", "", None),
            stop_check(batch.forest, batch.forest.masks["loss"], begins),
            Check(
                "margin to the reference",
                f"at most {apart:.1e} nats",
                f"0 within {self.tolerance:g}" if begins else "",
                apart <= self.tolerance if begins else None,
            ),
            Check(
                "start loss",
                f"{loss:.6f} nats a pair",
                f"{declared:.6f} at the reference" if begins and declared is not None else "",
                near if begins else None,
            ),
        ]
