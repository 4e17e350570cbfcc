"""PPO-ptx: beside its samples, a policy goes on learning text that it must not forget (Ouyang et al. 2022, eq. 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from posttrain.errors import ConfigError
from posttrain.forest import Batch, Row, join
from posttrain.ops.masked import masked_sum
from posttrain.train.around import AroundObjective, AroundSource
from posttrain.train.policy_gradient import PolicyGradient
from posttrain.train.sources import DataSource, demonstration_source
from posttrain.train.terms import Check, Stats, Term, objectives

COLUMNS = ("old_logp", "ref_logp", "advantage", "old_value", "return", "ptx")


@objectives.register("ptx", columns=COLUMNS, masks=("sampled", "ptx"))
@dataclass(frozen=True, kw_only=True)
class Ptx(AroundObjective):
    """``inner + coefficient * (-sum w log pi(y_t) / sum w)`` over the tokens of the text, w the row's weight; nats a token.

    Batches are those of `PtxSource`: the mask "trained" is "sampled" or "ptx", the column ``ptx`` ``[M]`` is w. Both gradients
    are sums over one step divided by counts of that step, so that neither micro-batches nor ranks change them.
    """

    inner: Any = field(default_factory=PolicyGradient)
    coefficient: float = 1.0
    mask = "trained"

    def __post_init__(self) -> None:
        """Refuse what would train another likelihood than the policy's own."""
        if self.coefficient <= 0 or self.temperature != 1.0:
            raise ConfigError(
                f"got ptx={self.coefficient:g} at temperature {self.temperature:g}; expected a coefficient above 0, and "
                "temperature 1: samples and text go through one pass, whose log-probabilities are divided by it"
            )

    def __call__(self, stats: Stats, batch: Batch) -> dict[str, Term]:
        """The inner objective's terms of samples, and the likelihood of the text."""
        logp, mask = stats["policy"]["logp"], batch.forest.masks["ptx"]
        loss = -masked_sum(logp * batch.tokens["ptx"].to(logp.dtype), mask)
        return {**self.inner(stats, batch), "loss/ptx": Term(loss, "ptx_tokens", self.coefficient)}

    def check(self, stats: Stats, batch: Batch, step: int) -> list[Check]:
        """The inner objective's lines where there are samples, and that the step has text."""
        found = self.inner.check(stats, batch, step) if bool(batch.forest.masks["sampled"].any()) else []
        count = batch.counts["ptx_tokens"]
        return [*found, Check("ptx tokens", f"{count:g} in the step", "some", count > 0)]


@dataclass
class PtxSource(AroundSource):
    """A rollout source whose every batch also has the step's rows of a data source.

    The rows follow from the step alone, so that a run goes on where it was, whatever the rollouts are.
    """

    rows: DataSource

    def __call__(self, step: int) -> Batch:
        """The inner source's share of samples, then the text."""
        text = self.rows(step)
        forest = text.forest
        weight = text.branches["weight"][forest.branch]
        masks = {"ptx": forest.masks["loss"]}
        counts = {"ptx_tokens": text.counts["tokens"]}
        joined = join(self.inner(step), Batch(replace(forest, masks=masks), {"ptx": weight}, {}, counts))
        both = joined.forest.masks["sampled"] | joined.forest.masks["ptx"]
        return replace(joined, forest=replace(joined.forest, masks={**joined.forest.masks, "trained": both}))


def ptx_rows(rows: Sequence[Row], weights: Sequence[float], *, responses: int, share: float, seed: int) -> DataSource:
    """A data source of ``share`` rows for each of the ``responses`` that a step trains, one at least."""
    return demonstration_source(rows, per_step=max(1, round(share * responses)), seed=seed, weights=weights)
