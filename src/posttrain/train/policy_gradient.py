"""The objective of policy gradients: a loss of tokens at a level of ratio, aggregated, beside a KL penalty and a critic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from posttrain.forest import Batch
from posttrain.losses.advantages import Returns, advantages
from posttrain.losses.aggregation import aggregations, token_mean
from posttrain.losses.penalties import penalties
from posttrain.losses.policy import TokenTerms, policy_losses, ppo_clip, ratio, value_clip
from posttrain.losses.ratios import ratio_levels, token
from posttrain.ops.kl import k3
from posttrain.ops.masked import masked_sum
from posttrain.registry import keyword_defaults
from posttrain.train.algorithms import Algorithm
from posttrain.train.terms import Check, Stats, Term, objectives


@objectives.register(
    "policy_gradient", columns=("old_logp", "ref_logp", "advantage", "old_value", "return"), losses=policy_losses
)
@dataclass(frozen=True, kw_only=True)
class PolicyGradient:
    """A policy loss of sampled tokens, a KL penalty in the loss if there is one, and a clipped value loss for the critic.

    Batches carry ``old_logp`` and ``advantage``, where the loss or the penalty reads the reference ``ref_logp``, and with
    a critic ``old_value`` and ``return``, all ``[M]``.

    Attributes:
        loss: of a token (`posttrain.losses.policy`).
        level: what the ratio is of (`posttrain.losses.ratios`).
        aggregate: weights of tokens in the mean over the step (`posttrain.losses.aggregation`).
        penalty: of a token (`posttrain.losses.penalties`), added with the weight ``kl``; None = no penalty in the loss. The
            full KL reads the frozen role "reference", which `fit` is given beside the policy.
        critic: whether a value role is trained, with its loss clipped at ``value_clip``.
        ratio_tolerance: by how much sampler and trainer may differ before the first update.
    """

    loss: Callable[[TokenTerms], Tensor] = ppo_clip
    level: Callable[..., Tensor] = token
    aggregate: Callable[[Tensor, Tensor], Tensor] = token_mean
    penalty: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor] | None = None
    kl: float = 0.0
    value_clip: float = 0.2
    critic: bool = True
    temperature: float = 1.0
    ratio_tolerance: float = 1e-4
    mask = "sampled"
    coupled = False

    @property
    def whole_groups(self) -> bool:
        """As the level of the ratio needs it."""
        return bool(ratio_levels.facts(self.level).get("whole_groups", False))

    @property
    def reads(self) -> Mapping[str, frozenset[str]]:
        """Log-probabilities of the policy and what its penalty reads, values of the critic."""
        more = penalties.facts(self.penalty).get("reads", ()) if self.penalty is not None else ()
        policy = {"policy": frozenset({"logp", *more})}
        return policy | {"value": frozenset({"value"})} if self.critic else policy

    def __call__(self, stats: Stats, batch: Batch) -> dict[str, Term]:
        """Policy and value losses and the penalty, and how far the policy has moved from the one that sampled."""
        mask, tokens = batch.forest.masks["sampled"], batch.tokens
        logp = stats["policy"]["logp"]
        terms = self.terms(logp, batch)
        now, unit = logp.detach(), aggregations.facts(self.aggregate)["unit"]
        weight = self.aggregate(mask, batch.forest.branch).to(now.dtype)
        if "mismatch" in tokens:
            weight = weight * tokens["mismatch"]
        error = (ratio(terms).detach() - 1).abs()
        out = {
            "loss/policy": Term(masked_sum(self.loss(terms) * weight, mask), unit),
            "policy/clipped": Term(masked_sum(self.silent(now, batch).to(now.dtype), mask), "tokens", 0.0),
            "policy/ratio_error": Term(masked_sum(error, mask), "tokens", 0.0),
            "kl/update": Term(masked_sum(k3(tokens["old_logp"], now), mask), "tokens", 0.0),
        }
        if self.penalty is not None:
            estimate = self.penalty(stats["policy"], tokens)
            out["loss/kl"] = Term(masked_sum(estimate * weight, mask), unit, self.kl)
        if self.critic:
            loss = value_clip(stats["value"]["value"], tokens["old_value"], tokens["return"], clip=self.value_clip)
            out["loss/value"] = Term(masked_sum(loss, mask), "tokens")
        return out

    def terms(self, logp: Tensor, batch: Batch) -> TokenTerms:
        """What the loss reads of a micro-batch, with log-probabilities ``logp`` ``[M]`` of the policy."""
        forest, tokens = batch.forest, batch.tokens
        mask, old = forest.masks["sampled"], tokens["old_logp"]
        return TokenTerms(
            logp=logp,
            old_logp=old,
            advantage=tokens["advantage"],
            mask=mask,
            ref_logp=tokens.get("ref_logp"),
            log_ratio=self.level(logp, old, mask, forest.branch, forest.group[forest.branch]),
        )

    def silent(self, logp: Tensor, batch: Batch) -> Tensor:
        """``[M]`` bool: tokens that have an advantage but, because the ratio is clipped, no gradient."""
        with torch.enable_grad():
            leaf = logp.detach().clone().requires_grad_()
            terms = self.terms(leaf, batch)
            slope = torch.autograd.grad(self.loss(terms).sum(), leaf)[0]
        return (slope == 0) & (terms.advantage != 0)

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


def policy_gradient(row: Algorithm, *, longest: float, **numbers: Any) -> PolicyGradient:
    """The objective of a row of `posttrain.train.algorithms`.

    ``longest`` is the most tokens a response can have, ``numbers`` are other fields of `PolicyGradient`.
    """
    aggregate = aggregations[row.aggregation]
    if "longest" in keyword_defaults(aggregate):
        aggregate = partial(aggregate, longest=longest)
    return PolicyGradient(
        loss=policy_losses.bound(row.loss, row.options),
        level=ratio_levels[row.ratio],
        aggregate=aggregate,
        penalty=penalties[row.penalty] if row.penalty.startswith("loss:") else None,
        kl=row.numbers.get("kl", 0.0),
        critic="critic" in row.needs,
        **numbers,
    )


def estimator(row: Algorithm, **numbers: float) -> Callable[[Returns], Tensor]:
    """The advantage of a row, with those of the numbers (gamma, lam) that it has."""
    known = keyword_defaults(advantages[row.advantage])
    return advantages.bound(row.advantage, {k: v for k, v in numbers.items() if k in known})
