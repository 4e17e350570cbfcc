"""Batches from the policy itself: sample, score, compare with the reference, estimate advantages, cut into updates."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from posttrain.errors import CheckError, ConfigError, RewardError
from posttrain.forest import Batch, Branch, Row, build_forest, split, take
from posttrain.losses.advantages import Returns, gae, token_reward, whitened_gae
from posttrain.models.policy import Model, forward_stats
from posttrain.ops.masked import masked_mean, segment_sum, to_padded, whiten
from posttrain.rewards.base import BadScore, Completion, Reward, Score, require_finite
from posttrain.rollout.engine import Engine, Request, Rollout, Sampling
from posttrain.train.journal import Journal
from posttrain.train.signs import signs
from posttrain.train.sources import shuffled
from posttrain.train.streams import random_streams, restore_streams
from posttrain.types import Example, stable_hash


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The numbers of a rollout step.

    Attributes:
        prompts: prompts a rollout.
        samples: responses a prompt.
        updates: optimiser steps on each rollout, over equal shares of its prompts.
        sampling: how responses are drawn.
        kl: coefficient of the KL penalty in the reward.
        gamma, lam: discount and lambda of the returns that the critic learns, and of GAE.
        least: responses with a score that a prompt needs, 2 where they are compared; a prompt with fewer is left out and counted.
        whiten_rewards: scale token rewards to variance 1 over the rollout, without moving their mean.
        cut_score: score of a response that ended by length, instead of the reward's; None keeps the reward's.
        seed: of prompts' order and of draws.
        max_tokens: the memory knob.
    """

    prompts: int
    samples: int
    updates: int
    sampling: Sampling
    kl: float
    gamma: float = 1.0
    lam: float = 0.95
    least: int = 1
    whiten_rewards: bool = False
    cut_score: float | None = None
    seed: int = 0
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        """Refuse plans whose updates would be empty, or whose sampler is not the distribution that is trained."""
        if not 1 <= self.updates <= self.prompts or self.samples < 1:
            raise ConfigError(
                f"got {self.prompts} prompts, {self.samples} samples, {self.updates} updates a rollout; expected at least 1 of "
                "each and no more updates than prompts"
            )
        if self.samples < self.least:
            raise ConfigError(
                f"got {self.samples} samples a prompt; expected at least {self.least}: the advantage compares the responses to one prompt"
            )
        s = self.sampling
        if s.temperature == 0 or s.top_k is not None or s.top_p < 1:
            raise ConfigError(
                f"got temperature={s.temperature}, top_k={s.top_k}, top_p={s.top_p}; training needs the whole distribution: "
                "temperature above 0, top_k None, top_p 1"
            )


@dataclass
class RolloutSource:
    """Fresh samples of the policy every ``plan.updates`` steps, with everything a policy-gradient loss reads.

    ``advantage`` is an estimator (`posttrain.losses.advantages`), None = GAE by the plan's numbers. ``value`` None = no
    critic. ``on_samples`` receives what ``samples.jsonl`` keeps.
    ``journal`` keeps rollouts, scores and values before they are used, so that a run goes on from any step; one without a
    directory keeps nothing, and a run then goes on from between rollouts only.
    """

    plan: Plan
    examples: Sequence[Example]
    prompt_ids: Sequence[Sequence[int]]
    engine: Engine
    reward: Reward
    reference: Model
    value: Model | None
    decode: Callable[[Sequence[int]], str]
    advantage: Callable[[Returns], Tensor] | None = None
    on_samples: Callable[[int, list[dict[str, Any]]], None] = lambda step, samples: None
    journal: Journal = field(default_factory=Journal)
    _tried: int | None = None  # the step at which the newest rollout began
    _begun: int | None = None  # the same, once it is at hand
    _used: int | None = None  # the step at which the rollout began that was in use when a checkpoint was saved
    _pending: list[Batch] = field(default_factory=list[Batch])
    _metrics: dict[str, float] = field(default_factory=dict[str, float])

    def __call__(self, step: int) -> Batch:
        """The batch of an update; samples anew at the first update of each rollout."""
        first = step - step % self.plan.updates
        if (
            first == step or first == self._tried != self._begun
        ):  # then its first update was skipped: the policy is the same
            self._collect(first, again=False)
        elif self._begun != first and self._used == first:
            streams = random_streams()  # what scoring drew from them lies before the checkpoint
            self._collect(first, again=True)
            restore_streams(streams)
        elif self._begun != first:
            if not self.journal.holds(first):
                raise CheckError(
                    f"step {step} wants more of a rollout that was not journalled; resume from between rollouts"
                )
            self._collect(first, again=False)  # it had no scores yet that could be used
        return self._pending[step - first]

    def metrics(self, step: int) -> Mapping[str, float]:
        """What the rollout of this step measured; given once, at its first update."""
        return self._metrics if self.fresh(step) else {}

    def fresh(self, step: int) -> bool:
        """At the first update on each rollout."""
        return step % self.plan.updates == 0

    def forget(self, step: int) -> None:
        """Delete records of rollouts that were used up before ``step``."""
        self.journal.forget(step - self.plan.updates + 1)

    def retract(self) -> None:
        """Let the newest rollout's scores be asked for again, where a run ends because they were no numbers."""
        if self._tried is not None:
            self.journal.retract(self._tried, "scores")

    def state(self, step: int) -> Any:
        """Where the journal has the rollout in use at a step; None between rollouts: all else follows from the step."""
        first = step - step % self.plan.updates
        return self.journal.state(first) if self._begun == first != step else None

    def load_state(self, state: Any) -> None:
        """See that the journal has the rollout that was in use; it is replayed when its next share is wanted."""
        if state is not None:
            self.journal.require(state)
            self._used = state["step"]

    def prompt_indices(self, rollout: int) -> list[int]:
        """The prompts of a rollout: epochs in new orders, cut into runs of ``plan.prompts`` without a gap."""
        size, first = len(self.examples), rollout * self.plan.prompts
        orders: dict[int, list[int]] = {}
        out: list[int] = []
        for place in range(first, first + self.plan.prompts):
            epoch, within = divmod(place, size)
            out.append(orders.setdefault(epoch, shuffled(size, self.plan.seed, epoch))[within])
        return out

    def _collect(self, step: int, *, again: bool) -> None:
        """Sample, score and cut one rollout, from the journal as far as it got; ``again`` = its samples were recorded."""
        plan = self.plan
        self._tried = step
        indices = self.prompt_indices(step // plan.updates)
        began = time.perf_counter()
        rollouts = self._sample(step, indices)
        sampled = time.perf_counter()
        completions = [
            Completion(
                example=self.examples[indices[i // plan.samples]],
                text=self.decode(r.ids),
                prompt_ids=r.request.ids,
                ids=r.ids,
                truncated=r.truncated,
                group=i // plan.samples,
            )
            for i, r in enumerate(rollouts)
        ]
        which = stable_hash([r.ids for r in rollouts])
        scores = self._scores(step, which, completions)
        batch = self._advantages(step, which, rollouts, scores)
        self._metrics |= {
            "time/generate": sampled - began,
            "time/score": time.perf_counter() - sampled,
            "data/epoch": (step // plan.updates + 1) * plan.prompts / len(self.examples),
        }
        self._pending, self._begun = _updates(batch, plan.updates), step
        if not again:
            self.on_samples(step, self._records(completions, scores, batch))

    def _sample(self, step: int, indices: Sequence[int]) -> list[Rollout]:
        """``samples`` responses of each prompt, in prompt order."""
        requests: list[Request] = []
        seen: dict[str, int] = {}
        for index in indices:
            name = self.examples[index].prompt_key
            occurrence = seen[name] = seen.get(name, -1) + 1
            for sample in range(self.plan.samples):
                key = (self.plan.seed, step, name, occurrence, sample)
                requests.append(Request(tuple(self.prompt_ids[index]), key))

        def generate() -> list[Any]:
            return [(r.ids, r.logp, r.stopped) for r in self.engine.generate(requests, self.plan.sampling)]

        asked = stable_hash([[r.ids, r.key] for r in requests] + [vars(self.plan.sampling)])
        found = self.journal.once(step, f"rollouts {asked}", generate)
        return [Rollout(q, tuple(ids), tuple(logp), end) for q, (ids, logp, end) in zip(requests, found, strict=True)]

    def _scores(self, step: int, which: str, completions: Sequence[Completion]) -> list[float | None]:
        """The reward of each response, a cut one's replaced if the plan says so.

        What the reward gave is journalled even where it is no number: asked again, it might give another.
        """
        values = self.journal.once(step, f"scores {which}", lambda: self._asked(completions))
        require_finite(completions, [Score(v) for v in values])
        return self._with_cuts(completions, values)

    def _asked(self, completions: Sequence[Completion]) -> list[float | None]:
        """What the reward gives now."""
        try:
            scores = self.reward(completions)
        except BadScore as error:  # found inside the reward
            if len(error.scores) != len(completions):
                raise
            scores = error.scores
        if len(scores) != len(completions):
            raise RewardError(
                f"the reward gave {len(scores)} scores for {len(completions)} responses; expected one each"
            )
        values = [s.value for s in scores]
        if all(v is None for v in self._with_cuts(completions, values)):
            raise RewardError("the reward abstained on every response of the rollout; there is nothing to learn from")
        return values

    def _with_cuts(self, completions: Sequence[Completion], values: Sequence[float | None]) -> list[float | None]:
        """Scores with ``cut_score`` in the place of those of cut responses."""
        cut = self.plan.cut_score
        return [cut if c.truncated and cut is not None else v for c, v in zip(completions, values, strict=True)]

    def _advantages(self, step: int, which: str, rollouts: Sequence[Rollout], scores: Sequence[float | None]) -> Batch:
        """The rollout as one batch with log-probabilities, values, returns and advantages a token.

        Responses without a score, and prompts with too few that have one, are masked out: they enter no mean, no whitening
        and no loss.
        """
        plan, dropped = self.plan, 0
        rows: list[Row] = []
        for start in range(0, len(rollouts), plan.samples):
            members = rollouts[start : start + plan.samples]
            marks = [scores[start + k] is not None for k in range(len(members))]
            if sum(marks) < plan.least:
                marks, dropped = [False] * len(members), dropped + 1
            branches = [
                Branch(r.ids, {"sampled": [m] * len(r.ids)}, r.truncated) for r, m in zip(members, marks, strict=True)
            ]
            rows.append(Row(members[0].request.ids, branches))
        forest = build_forest(rows)
        keep = forest.masks["sampled"]
        wide = torch.promote_types(self.reference.net.dtype, torch.float32)
        old = torch.tensor([x for r in rollouts for x in r.logp], dtype=wide)
        batch = Batch(forest, {"old_logp": old}, {}, {})
        passes = self.journal.once(step, f"ref_logp, value {which}", lambda: self._passes(batch))
        ref, value = torch.tensor(passes, dtype=wide)
        size = len(rollouts)
        score = torch.tensor([0.0 if s is None else s for s in scores], dtype=wide)
        columns = {k: to_padded(x, forest.branch, size)[0] for k, x in {"old": old, "ref": ref, "value": value}.items()}
        on, real = to_padded(keep, forest.branch, size)
        reward = token_reward(score, columns["old"], columns["ref"], on, kl=plan.kl)
        if plan.whiten_rewards:
            reward = whiten(reward, on, shift=False)
        values = columns["value"] if self.value is not None else None
        given = Returns(score=score, reward=reward, mask=on, group=forest.group, values=values)
        advantage = self.advantage or partial(whitened_gae, gamma=plan.gamma, lam=plan.lam)
        _, returns = gae(reward, columns["value"], on, gamma=plan.gamma, lam=plan.lam)
        tokens = {
            "old_logp": old,
            "ref_logp": ref,
            "advantage": advantage(given)[real],
            "return": returns[real],
            "old_value": value,
        }
        self._metrics = _rollout_metrics(rollouts, scores, forest.branch, keep, tokens)
        if plan.least > 1:
            self._metrics["groups/dropped"] = dropped / len(rows)
        self._metrics |= signs(
            batch, rollouts, scores, plan.samples, tokens, getattr(self.engine, "stop_ids", frozenset())
        )
        return Batch(forest, tokens, {"reward": score}, {})

    def _passes(self, batch: Batch) -> list[list[float]]:
        """Log-probabilities under the reference and the critic's values, 0 without one, a target each."""
        ref = self._evaluate(batch, self.reference, "logp")
        value = self._evaluate(batch, self.value, "value") if self.value is not None else torch.zeros_like(ref)
        return [ref.tolist(), value.tolist()]

    def _evaluate(self, batch: Batch, model: Model, name: str) -> Tensor:
        """One statistic a target under a model, without gradient."""
        want, temperature = frozenset({name}), self.plan.sampling.temperature
        parts = split(batch, self.plan.max_tokens, whole_groups=False)
        with torch.no_grad():
            return torch.cat([forward_stats(model, p.forest, want, temperature=temperature)[name] for p in parts]).cpu()

    def _records(
        self, completions: Sequence[Completion], scores: Sequence[float | None], batch: Batch
    ) -> list[dict[str, Any]]:
        """A line of ``samples.jsonl`` for each response."""
        gap = batch.tokens["old_logp"] - batch.tokens["ref_logp"]
        kl = segment_sum(gap, batch.forest.branch, len(completions)).tolist()
        return [
            {
                "prompt": c.example.prompt[-1].content,
                "completion": c.text,
                "reward": s,
                "kl": k,
                "length": len(c.ids),
                "truncated": c.truncated,
            }
            for c, s, k in zip(completions, scores, kl, strict=True)
        ]


def _updates(batch: Batch, updates: int) -> list[Batch]:
    """Cut a rollout into ``updates`` batches of whole prompts, each with its own counts; advantages stay as they are."""
    trees = [(t, range(len(tree.branches))) for t, tree in enumerate(batch.forest.trees)]
    out: list[Batch] = []
    for part in range(updates):
        piece = take(batch, trees[part::updates])
        sampled = piece.forest.masks["sampled"]
        counts = {"tokens": int(sampled.sum()), "branches": len(piece.forest.branch[sampled].unique())}
        out.append(Batch(piece.forest, piece.tokens, piece.branches, {k: float(max(n, 1)) for k, n in counts.items()}))
    return out


def _rollout_metrics(
    rollouts: Sequence[Rollout],
    scores: Sequence[float | None],
    branch: Tensor,
    keep: Tensor,
    tokens: Mapping[str, Tensor],
) -> dict[str, float]:
    """Means over the rollout, before any update."""
    known = torch.tensor([s for s in scores if s is not None])
    kl = segment_sum(tokens["old_logp"] - tokens["ref_logp"], branch, len(rollouts))
    returns, error = tokens["return"], tokens["return"] - tokens["old_value"]
    spread = masked_mean((returns - masked_mean(returns, keep)) ** 2, keep)
    residual = masked_mean((error - masked_mean(error, keep)) ** 2, keep)
    return {
        "reward/mean": float(known.mean()),
        "reward/std": float(known.std(correction=0)),
        "kl/mean": float(kl.mean()),
        "policy/entropy": float(-masked_mean(tokens["old_logp"], keep)),
        "value/explained": float(1 - residual / spread.clamp(min=1e-8)),
        "length/mean": sum(len(r.ids) for r in rollouts) / len(rollouts),
        "truncated/share": sum(r.truncated for r in rollouts) / len(rollouts),
        "abstained/share": sum(s is None for s in scores) / len(scores),
    }
