"""Quark's training: a pool of the policy's scored responses, sorted into bins, each learnt under its bin's token.

Source: Lu et al. 2022, Quark: controllable text generation with reinforced unlearning, arXiv 2205.13636.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from posttrain.errors import CheckError, RewardError
from posttrain.forest import Batch, Branch, Row, build_forest
from posttrain.losses.quark import quark, reward_bins
from posttrain.ops.masked import masked_sum
from posttrain.rewards.base import Completion
from posttrain.rollout.engine import Request, Rollout
from posttrain.train.estimates import records, sample_means
from posttrain.train.rollout_plan import Group
from posttrain.train.rollouts import RolloutSource
from posttrain.train.sources import shuffled
from posttrain.train.terms import Check, Stats, Term, objectives, stop_check

DIRECTIONS = {"reverse": "kl_to_other", "forward": "kl_from_other"}
"""Which KL holds the policy: reverse is KL(policy || start), as in the authors' code; forward KL(start || policy)."""


@objectives.register("reward_conditioned", columns=())
@dataclass(frozen=True, kw_only=True)
class RewardConditioned:
    """Quark's loss of responses in the pool, ``-log pi(y_t) + beta KL_t - eta H_t``, averaged over the step's tokens.

    The policy reads each response after its bin's token; the frozen role "reference" reads it without.
    """

    beta: float = 0.05
    eta: float = 0.06
    direction: str = "reverse"
    mask = "loss"
    temperature = 1.0
    whole_groups = False
    coupled = False

    @property
    def reads(self) -> Mapping[str, frozenset[str]]:
        """Log-probability, entropy and KL of each token."""
        return {"policy": frozenset({"logp", "entropy", DIRECTIONS[self.direction]})}

    def __call__(self, stats: Stats, batch: Batch) -> dict[str, Term]:
        """The loss, and the likelihood and KL in it."""
        found, mask = stats["policy"], batch.forest.masks["loss"]
        kl = found[DIRECTIONS[self.direction]]
        loss = quark(found["logp"], kl, found["entropy"], beta=self.beta, eta=self.eta)
        return {
            "loss/quark": Term(masked_sum(loss, mask), "tokens"),
            "loss/nll": Term(-masked_sum(found["logp"].detach(), mask), "tokens", 0.0),
            "kl/full": Term(masked_sum(kl.detach(), mask), "tokens", 0.0),
        }

    def check(self, stats: Stats, batch: Batch, step: int) -> list[Check]:
        """Stop tokens are trained, and the KL to the start is a number."""
        mask = batch.forest.masks["loss"]
        kl = stats["policy"][DIRECTIONS[self.direction]][mask]
        finite = bool(kl.isfinite().all())
        return [
            stop_check(batch.forest, mask, step == 0),
            Check("KL to the start", f"{kl.mean():.3f} nats a token", "finite", finite),
        ]


@dataclass(frozen=True)
class Pooled:
    """A response in the pool: the index of its prompt, its ids, whether it was cut, its score."""

    prompt: int
    ids: tuple[int, ...]
    truncated: bool
    score: float


@dataclass(kw_only=True)
class QuarkSource(RolloutSource):
    """Every ``plan.updates`` steps all prompts are answered and the answers join the pool; each step learns ``per_step`` of it.

    The first answers are the start's own, later ones are sampled after the best token. The whole pool is sorted anew each time.
    ``tokens`` are the bins' tokens, the best first. The pool holds ids, never text; responses without a score stay out. It is
    rebuilt from the journal, which keeps every rollout.
    """

    tokens: Sequence[int]
    per_step: int
    _pool: dict[int, list[Pooled]] = field(default_factory=dict[int, list[Pooled]])
    _sorted: tuple[list[Pooled], list[int]] = ((), ())  # type: ignore[assignment]
    _explored: int = 0

    def forget(self, step: int) -> None:
        """Nothing: the pool is made of all rollouts."""

    def state(self, step: int) -> Any:
        """Where the journal has the rollout in use, and all before it."""
        first = step - step % self.plan.updates
        earlier = [self.journal.state(s) for s in range(0, first, self.plan.updates)]
        return {"now": super().state(step), "pool": earlier}

    def load_state(self, state: Any) -> None:
        """See that the journal has every rollout the pool is made of."""
        super().load_state(state["now"])
        for earlier in state["pool"]:
            self.journal.require(earlier)

    def _requests(self, step: int, indices: Sequence[int], seen: dict[str, int]) -> tuple[list[Request], list[Request]]:
        """Those of the prompts, after the first rollout with the best token before each."""
        requests, best = super()._requests(step, indices, seen)
        if step == 0:
            return requests, best
        return [replace(r, ids=(self.tokens[0], *r.ids)) for r in requests], best

    def _completions(self, indices: Sequence[int], rollouts: Sequence[Rollout]) -> list[Completion]:
        """What the reward sees: prompts without the token, which only the policy knows."""
        each = len(rollouts) // len(indices)
        plain = [tuple(self.prompt_ids[indices[i // each]]) for i in range(len(rollouts))]
        found = super()._completions(indices, rollouts)
        return [replace(c, prompt_ids=ids) for c, ids in zip(found, plain, strict=True)]

    def _estimated(self, step: int, groups: Sequence[Group]) -> Batch:
        """The pool with the new answers, sorted; returns the batch of the rollout's first step.

        Raises:
            CheckError: the journal lacks an earlier rollout.
            RewardError: fewer scored responses than bins.
        """
        for earlier in range(0, step, self.plan.updates):
            if earlier not in self._pool:
                self._pool[earlier] = pooled(self._recorded(earlier))
        self._pool[step] = pooled(groups)
        every = [p for first in sorted(self._pool) for p in self._pool[first]]
        if len(every) < len(self.tokens):
            raise RewardError(
                f"step {step}: {len(every)} responses have a score; expected at least one for each of the {len(self.tokens)} bins"
            )
        scores = torch.tensor([p.score for p in every], dtype=torch.float64)
        bins = reward_bins(scores, bins=len(self.tokens))
        self._sorted, self._explored = (every, bins.tolist()), step
        self._metrics |= sample_means(groups) | {
            "pool/size": float(len(every)),
            "pool/best": float(scores[bins == 0].mean()),
            "pool/worst": float(scores[bins == len(self.tokens) - 1].mean()),
        }
        return self._drawn(step)

    def _recorded(self, step: int) -> list[Group]:
        """An earlier rollout as the journal has it."""
        if not self.journal.holds(step):
            raise CheckError(f"the rollout begun at step {step} is not in the journal; begin the stage anew")
        return self._gather(step)[0]

    def _cut(self, batch: Batch) -> list[Batch]:
        """A batch for each of the rollout's steps, drawn from the pool."""
        return [batch, *(self._drawn(self._explored + k) for k in range(1, self.plan.updates))]

    def _drawn(self, step: int) -> Batch:
        """``per_step`` different responses of the pool, each after its bin's token; draws depend on (seed, step)."""
        every, bins = self._sorted
        rows: list[Row] = []
        for i in shuffled(len(every), self.plan.seed, step)[: self.per_step]:
            p = every[i]
            branch = Branch(p.ids, {"loss": [True] * len(p.ids)}, p.truncated)
            rows.append(Row((self.tokens[bins[i]], *self.prompt_ids[p.prompt]), [branch]))
        counts = {"tokens": float(sum(len(row.branches[0].ids) for row in rows)), "branches": float(len(rows))}
        return Batch(build_forest(rows), {}, {}, counts)

    def _records(
        self, completions: Sequence[Completion], groups: Sequence[Group], batch: Batch
    ) -> list[dict[str, Any]]:
        """A line of ``samples.jsonl`` for each response; its KL is not measured."""
        return records(completions, groups)


def pooled(groups: Sequence[Group]) -> list[Pooled]:
    """The responses that have a score."""
    return [
        Pooled(g.index, r.ids, r.truncated, s)
        for g in groups
        for r, s in zip(g.rollouts, g.scores, strict=True)
        if s is not None
    ]
