"""Critic warm-up: on the first rollouts only the critic learns, so that no advantage is measured by one that knows nothing."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from posttrain.errors import ConfigError
from posttrain.forest import Batch
from posttrain.train.around import AroundObjective, AroundSource
from posttrain.train.policy_gradient import PolicyGradient
from posttrain.train.terms import Stats, Term, objectives

CRITICS = ("loss/value", "loss/cost_value")
"""Terms that train critics."""


@objectives.register(
    "critic_first", columns=("old_logp", "ref_logp", "advantage", "old_value", "return", "critic_only")
)
@dataclass(frozen=True, kw_only=True)
class CriticFirst(AroundObjective):
    """An objective whose terms, but for those of critics, weigh nothing in steps that carry the column ``critic_only``.

    The policy then has no gradient at all: neither its weights nor its moments move (Cai et al. 2024, InternLM2, section 4.4:
    50 iterations).
    """

    inner: Any = field(default_factory=PolicyGradient)

    @property
    def mask(self) -> str | None:
        """As the inner objective."""
        return self.inner.mask

    def __post_init__(self) -> None:
        """Refuse an objective without a critic."""
        if not any("value" in wanted for wanted in self.reads.values()):
            raise ConfigError("got a critic's warm-up without a critic; leave it out, or use an algorithm that has one")

    def __call__(self, stats: Stats, batch: Batch) -> dict[str, Term]:
        """The inner terms, the policy's logged only while the critic learns alone."""
        terms: dict[str, Term] = self.inner(stats, batch)
        if "critic_only" not in batch.tokens:
            return terms
        return {name: t if name in CRITICS else replace(t, coefficient=0.0) for name, t in terms.items()}


@dataclass
class CriticFirstSource(AroundSource):
    """A source that marks the batches before ``steps``."""

    steps: int

    def __call__(self, step: int) -> Batch:
        """The inner batch, marked where only the critic learns from it."""
        batch = self.inner(step)
        if step >= self.steps:
            return batch
        marks = torch.ones(len(batch.forest.target), dtype=torch.bool)
        return replace(batch, tokens={**batch.tokens, "critic_only": marks})
