"""Policy gradients under a constraint on cost: two critics, two advantages, and the multiplier that mixes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from posttrain.errors import ConfigError
from posttrain.forest import Batch
from posttrain.losses.advantages import gae, token_reward
from posttrain.losses.policy import value_clip
from posttrain.losses.safety import mixed_advantage, next_multiplier
from posttrain.models.policy import Model
from posttrain.ops.masked import masked_sum, to_padded
from posttrain.train.policy_gradient import PolicyGradient
from posttrain.train.rollout_plan import Group
from posttrain.train.rollouts import RolloutSource
from posttrain.train.terms import Stats, Term, objectives

COST = "cost"
"""The part of a score that is the response's cost (`posttrain.rewards.base.Score.parts`)."""


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """Keep the mean cost at most ``limit`` (Dai et al. 2023, appendix B: window 128, rate 0.1, from 1, at most 5).

    The multiplier moves once a rollout, by the mean cost of the newest ``window`` responses. ``multiplier`` 0 never moves:
    the reward alone.
    """

    limit: float = 0.0
    multiplier: float = 1.0
    rate: float = 0.1
    most: float = 5.0
    window: int = 128

    def __post_init__(self) -> None:
        """Refuse numbers that can't work."""
        if self.multiplier < 0 or self.rate < 0 or self.most <= 0 or self.window < 1:
            raise ConfigError(
                f"got {self}; expected multiplier and rate of at least 0, most above 0, a window of at least 1"
            )

    def moved(self, multiplier: float, costs: Sequence[float]) -> float:
        """The multiplier after a rollout, from the costs of the newest responses."""
        if multiplier == 0:
            return 0.0
        mean = sum(costs) / len(costs)
        return next_multiplier(multiplier, mean, limit=self.limit, rate=self.rate, most=self.most)


@objectives.register(
    "constrained",
    columns=("old_logp", "ref_logp", "advantage", "old_value", "return", "old_cost_value", "cost_return"),
)
@dataclass(frozen=True, kw_only=True)
class ConstrainedPolicyGradient(PolicyGradient):
    """`PolicyGradient` with a second critic, the role ``cost_value``, that learns ``cost_return`` ``[M]``."""

    @property
    def reads(self) -> Mapping[str, frozenset[str]]:
        """What the policy gradient reads, and the cost critic's values."""
        return {**super().reads, "cost_value": frozenset({"value"})}

    def __call__(self, stats: Stats, batch: Batch) -> dict[str, Term]:
        """The terms of the policy gradient and the cost critic's clipped loss."""
        out = super().__call__(stats, batch)
        mask, tokens = batch.forest.masks["sampled"], batch.tokens
        value, old, wanted = stats["cost_value"]["value"], tokens["old_cost_value"], tokens["cost_return"]
        loss = value_clip(value, old, wanted, clip=self.value_clip)
        return out | {"loss/cost_value": Term(masked_sum(loss, mask), "tokens")}


@dataclass(kw_only=True)
class ConstrainedRollouts(RolloutSource):
    """Rollouts whose reward also gives each response's cost, as the part `COST` of its score.

    Rewards a token are ``-kl d + 1[last] r``, costs ``+kl d + 1[last] c``, both clipped at ``clip``; advantages of both are
    GAE, not whitened, and mixed by the multiplier in force.
    """

    cost_value: Model
    constraint: Constraint = field(default_factory=Constraint)
    clip: float = 50.0
    _multipliers: dict[int, tuple[float, list[float]]] = field(default_factory=dict[int, tuple[float, list[float]]])

    def multiplier(self, first: int) -> tuple[float, list[float]]:
        """The multiplier before the rollout that begins at a step, and the costs seen until then."""
        known = [step for step in self._multipliers if step <= first]
        return self._multipliers[max(known)] if known else (self.constraint.multiplier, [])

    def state(self, step: int) -> Any:
        """The rollouts' own, and the multiplier in force with the costs behind it."""
        first = step - step % self.plan.updates
        return {"rollouts": super().state(step), "multiplier": self.multiplier(first)}

    def load_state(self, state: Any) -> None:
        """Go on from a multiplier."""
        super().load_state(state["rollouts"])
        multiplier, costs = state["multiplier"]
        self._multipliers = {-1: (float(multiplier), [float(c) for c in costs])}

    def _estimated(self, step: int, groups: Sequence[Group]) -> Batch:
        """The rollout with both critics' returns and the mixed advantage; moves the multiplier before it is used.

        Raises:
            ConfigError: a response has a score and no cost.
        """
        costs = [part.get(COST) for g in groups for part in g.parts]
        scores = [s for g in groups for s in g.scores]
        if len(costs) != len(scores) or any(c is None and s is not None for c, s in zip(costs, scores, strict=True)):
            raise ConfigError(
                f"a response has a score and no cost; the reward must give the part '{COST}' with each score"
            )
        before, seen = self.multiplier(step)
        known = [c for c, s in zip(costs, scores, strict=True) if s is not None and c is not None]
        recent = [*seen, *known][-self.constraint.window :]
        now = self.constraint.moved(before, recent) if recent else before
        self._multipliers |= {step: (before, seen), step + self.plan.updates: (now, recent)}
        batch = super()._estimated(step, groups)
        tokens = self._mixed(step, groups, batch, [c or 0.0 for c in costs], now)
        self._metrics |= {
            "cost/mean": sum(known) / max(len(known), 1),
            "cost/recent": sum(recent) / max(len(recent), 1),
            "cost/over": sum(c > self.constraint.limit for c in known) / max(len(known), 1),
            "cost/multiplier": now,
        }
        return replace(batch, tokens={**batch.tokens, **tokens})

    def _mixed(
        self, step: int, groups: Sequence[Group], batch: Batch, costs: Sequence[float], multiplier: float
    ) -> dict[str, Tensor]:
        """Advantages, returns of both critics and the cost critic's values, all ``[M]``."""
        plan, forest, tokens = self.plan, batch.forest, batch.tokens
        name = f"old_cost_value {len(costs)}"
        found = self.journal.once(step, name, lambda: self._evaluate(batch, self.cost_value, "value").tolist())
        old = torch.tensor(found, dtype=tokens["old_logp"].dtype)
        size = len(forest.end)
        marks = torch.tensor([m for g in groups for m in g.live(plan)])
        wide = {k: to_padded(tokens[k], forest.branch, size)[0] for k in ("old_logp", "ref_logp", "old_value")}
        on, real = to_padded(marks[forest.branch], forest.branch, size)
        cost = torch.tensor(costs, dtype=old.dtype)
        values = {"reward": wide["old_value"], "cost": to_padded(old, forest.branch, size)[0]}
        kl = self.coefficient(step)
        given = {"reward": (batch.branches["reward"], kl), "cost": (cost, -kl)}
        found_of: dict[str, tuple[Tensor, Tensor]] = {}
        for which, (score, weight) in given.items():
            reward = token_reward(score, wide["old_logp"], wide["ref_logp"], on, kl=weight).clamp(-self.clip, self.clip)
            found_of[which] = gae(reward, values[which], on, gamma=plan.gamma, lam=plan.lam)
        mixed = mixed_advantage(found_of["reward"][0], found_of["cost"][0], multiplier)
        return {
            "advantage": mixed[real],
            "return": found_of["reward"][1][real],
            "cost_return": found_of["cost"][1][real],
            "old_cost_value": old,
        }
