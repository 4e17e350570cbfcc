"""Batches from the policy itself: sample, score, compare with the reference, estimate advantages, cut into updates."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from posttrain.errors import CheckError, ConfigError, RewardError
from posttrain.forest import Batch, split
from posttrain.losses.shaping import adaptive_kl, overlong_penalty
from posttrain.models.policy import Model, forward_stats
from posttrain.ops.masked import masked_mean
from posttrain.rewards.base import BadScore, Completion, Reward, Score, kept_score, read_score, require_finite
from posttrain.rollout.engine import Engine, Request, Rollout, Sampling, kept_rollout, read_rollout
from posttrain.train.estimates import (
    Advantage,
    divergences,
    estimate,
    group_forest,
    of_sampled,
    records,
    rollout_metrics,
    updates,
)
from posttrain.train.journal import Journal
from posttrain.train.rollout_plan import Group, Plan
from posttrain.train.signs import signs
from posttrain.train.sources import shuffled
from posttrain.train.streams import random_streams, restore_streams
from posttrain.types import Example, stable_hash

__all__ = ["Group", "Plan", "RolloutSource"]

Mismatch = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass
class RolloutSource:
    """Fresh samples of the policy every ``plan.updates`` steps, with everything a policy-gradient loss reads.

    ``advantage`` is an estimator (`posttrain.losses.advantages`), None = GAE by the plan's numbers. ``value`` None = no
    critic; ``reference`` None = the KL is neither penalised nor measured, and ``policy`` must be given. ``mismatch`` weights
    tokens where the engine is not the trainer (`posttrain.losses.shaping.mismatch_weights`), whose log-probabilities under
    ``policy`` then serve as the old ones. ``on_samples`` receives what ``samples.jsonl`` keeps.
    ``journal`` keeps rollouts, scores and values before they are used, so that a run goes on from any step; one without a
    directory keeps nothing, and a run then goes on from between rollouts only.
    """

    plan: Plan
    examples: Sequence[Example]
    prompt_ids: Sequence[Sequence[int]]
    engine: Engine
    reward: Reward
    reference: Model | None
    value: Model | None
    decode: Callable[[Sequence[int]], str]
    advantage: Advantage | None = None
    policy: Model | None = None
    mismatch: Mismatch | None = None
    on_samples: Callable[[int, list[dict[str, Any]]], None] = lambda step, samples: None
    journal: Journal = field(default_factory=Journal)
    _tried: int | None = None  # the step at which the newest rollout began
    _begun: int | None = None  # the same, once it is at hand
    _used: int | None = None  # the step at which the rollout began that was in use when a checkpoint was saved
    _kl: dict[int, float] = field(default_factory=dict[int, float])  # the coefficient by the rollout's first step
    _pending: list[Batch] = field(default_factory=list[Batch])
    _metrics: dict[str, float] = field(default_factory=dict[str, float])
    _kept: float = 1.0  # of the prompts sampled, with rounds

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
        """Where the journal has the rollout in use at a step, and the KL coefficient if it moves.

        None between rollouts of one coefficient: all else follows from the step.
        """
        first = step - step % self.plan.updates
        state = self.journal.state(first) if self._begun == first != step else None
        if self.plan.kl_target is None:
            return state
        return {**(state or {}), "kl": self.coefficient(first)}

    def load_state(self, state: Any) -> None:
        """See that the journal has the rollout that was in use; it is replayed when its next share is wanted."""
        state = dict(state or {})
        if "kl" in state:
            self._kl = {-1: state.pop("kl")}
        if state:
            self.journal.require(state)
            self._used = state["step"]

    def coefficient(self, first: int) -> float:
        """The KL coefficient of the rollout that begins at a step: the plan's, or where a target is given the newest."""
        known = [step for step in self._kl if step <= first]
        return self._kl[max(known)] if known else self.plan.kl

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
        self._tried = step
        began = time.perf_counter()
        groups, completions, spent = self._gather(step)
        self._metrics = {}
        batch = self._estimated(step, groups)
        self._metrics |= {
            "time/generate": spent,
            "time/score": time.perf_counter() - began - spent,
            "data/epoch": (step // self.plan.updates + 1) * self.plan.prompts * self.plan.rounds / len(self.examples),
        }
        self._pending, self._begun = self._cut(batch), step
        if not again:
            self.on_samples(step, self._records(completions, groups, batch))

    def _cut(self, batch: Batch) -> list[Batch]:
        """The rollout as one batch an update."""
        return updates(batch, self.plan.updates)

    def _gather(self, step: int) -> tuple[list[Group], list[Completion], float]:
        """The rollout's groups with their responses as the reward saw them, and the seconds spent on sampling.

        With rounds, prompts whose responses all score the same are passed over; each round of each rollout has a place of
        its own in the order of prompts, so that nothing depends on how many were needed before.

        Raises:
            RewardError: after the last round too few prompts have responses of differing score.
        """
        plan, spent, seen = self.plan, 0.0, dict[str, int]()
        kept: list[Group] = []
        told: list[Completion] = []
        sampled = 0
        for turn in range(plan.rounds):
            indices = self.prompt_indices(step // plan.updates * plan.rounds + turn)
            groups, completions, seconds = self._round(step, indices, seen)
            spent, sampled = spent + seconds, sampled + len(groups)
            for k, group in enumerate(groups):
                if len(kept) < plan.prompts and (plan.rounds == 1 or not group.flat):
                    kept.append(group)
                    told += completions[k * plan.samples : (k + 1) * plan.samples]
            if len(kept) == plan.prompts:
                break
        else:
            raise RewardError(
                f"step {step}: of {sampled} prompts in {plan.rounds} rounds {len(kept)} have responses of differing score, "
                f"expected {plan.prompts}; use prompts of middling difficulty, or more rounds"
            )
        if plan.rounds > 1:
            self._kept = len(kept) / sampled
        return kept, told, spent

    def _round(
        self, step: int, indices: Sequence[int], seen: dict[str, int]
    ) -> tuple[list[Group], list[Completion], float]:
        """The groups of some prompts: sampled, scored; ``seen`` counts how often each prompt was sampled in this rollout."""
        plan = self.plan
        began = time.perf_counter()
        requests, best = self._requests(step, indices, seen)
        rollouts = self._sample(step, requests, plan.sampling)
        greedy = self._sample(step, best, plan.best_guess) if plan.greedy else []
        seconds = time.perf_counter() - began
        completions = self._completions(indices, rollouts)
        scores = self._scores(step, completions)
        baselines = self._scores(step, self._completions(indices, greedy)) if greedy else []
        groups: list[Group] = []
        for k, index in enumerate(indices):
            part = slice(k * plan.samples, (k + 1) * plan.samples)
            groups.append(
                Group(
                    index=index,
                    rollouts=tuple(rollouts[part]),
                    scores=tuple(s.value for s in scores[part]),
                    baseline=baselines[k].value if baselines else None,
                    steps=tuple(s.steps for s in scores[part]) if any(s.steps for s in scores) else (),
                    parts=tuple(s.parts for s in scores[part]),
                )
            )
        return groups, completions, seconds

    def _requests(self, step: int, indices: Sequence[int], seen: dict[str, int]) -> tuple[list[Request], list[Request]]:
        """``samples`` requests of each prompt, in prompt order, and one for its greedy response."""
        requests: list[Request] = []
        best: list[Request] = []
        for index in indices:
            name, ids = self.examples[index].prompt_key, tuple(self.prompt_ids[index])
            occurrence = seen[name] = seen.get(name, -1) + 1
            key = (self.plan.seed, step, name, occurrence)
            requests += [Request(ids, (*key, sample)) for sample in range(self.plan.samples)]
            best.append(Request(ids, (*key, "greedy")))
        return requests, best

    def _sample(self, step: int, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        """One response a request, from the journal if they are there."""

        def generate() -> list[Any]:
            return [kept_rollout(r) for r in self.engine.generate(requests, sampling)]

        asked = stable_hash([[r.ids, r.key] for r in requests] + [vars(sampling)])
        found = self.journal.once(step, f"rollouts {asked}", generate)
        return [read_rollout(q, kept) for q, kept in zip(requests, found, strict=True)]

    def _completions(self, indices: Sequence[int], rollouts: Sequence[Rollout]) -> list[Completion]:
        """What the reward sees of the responses, as many to each prompt."""
        each = len(rollouts) // len(indices)
        return [
            Completion(
                example=self.examples[indices[i // each]],
                text=r.turns[-1].content if r.turns else self.decode(r.ids),
                prompt_ids=r.request.ids,
                ids=r.ids,
                truncated=r.truncated,
                group=i // each,
                turns=r.turns,
            )
            for i, r in enumerate(rollouts)
        ]

    def _scores(self, step: int, completions: Sequence[Completion]) -> list[Score]:
        """The reward of each response, a cut one's replaced and a long one's lowered if the plan says so.

        What the reward gave is journalled even where it is no number: asked again, it might give another.
        """
        which = stable_hash([[c.prompt_ids, c.ids] for c in completions])
        found = [
            read_score(x) for x in self.journal.once(step, f"scores {which}", lambda: self._asked(step, completions))
        ]
        require_finite(completions, found)
        shaped = self._with_cuts(completions, [s.value for s in found])
        if self.plan.overlong_share:
            shaped = [None if v is None else v + self._overlong(c) for c, v in zip(completions, shaped, strict=True)]
        return [replace(s, value=v) for v, s in zip(shaped, found, strict=True)]

    def _overlong(self, completion: Completion) -> float:
        """What a response's length takes from its score."""
        longest = float(self.plan.sampling.max_new_tokens)
        length = torch.tensor(float(len(completion.ids)))
        return float(overlong_penalty(length, longest=longest, buffer=self.plan.overlong_share * longest))

    def _asked(self, step: int, completions: Sequence[Completion]) -> list[Any]:
        """What the reward gives now; one whose weights move is told the step."""
        if callable(begin := getattr(self.reward, "begin", None)):
            begin(step)
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
        if all(v is None for v in self._with_cuts(completions, [s.value for s in scores])):
            raise RewardError("the reward abstained on every response of the rollout; there is nothing to learn from")
        return [kept_score(s) for s in scores]

    def _with_cuts(self, completions: Sequence[Completion], values: Sequence[float | None]) -> list[float | None]:
        """Scores with ``cut_score`` in the place of those of cut responses."""
        cut = self.plan.cut_score
        return [cut if c.truncated and cut is not None else v for c, v in zip(completions, values, strict=True)]

    def _estimated(self, step: int, groups: Sequence[Group]) -> Batch:
        """The rollout as one batch with log-probabilities, values, returns and advantages a token.

        Responses without a score, and prompts with too few that have one, are masked out: they enter no mean, no whitening
        and no loss.
        """
        plan, rollouts = self.plan, [r for g in groups for r in g.rollouts]
        forest, live = group_forest(groups, plan)
        if not bool(live.any()):
            raise RewardError(
                "no prompt of the rollout has enough responses with a score (and, where it is asked for, a baseline)"
            )
        model = self.reference or self.policy
        if model is None or (self.reference is None and plan.kl):
            raise ConfigError(
                f"got no reference, kl={plan.kl:g}; expected kl=0 and the policy where there is no reference"
            )
        wide = torch.promote_types(model.net.dtype, torch.float32)
        sampled = torch.tensor([x for r in rollouts for x in r.logp], dtype=wide)
        batch = Batch(forest, {"old_logp": sampled}, {}, {})
        which = stable_hash([r.ids for r in rollouts])
        roles = {
            "ref_logp": self.reference,
            "old_logp": self.policy if self.mismatch else None,
            "old_value": self.value,
        }
        wanted = {name: model for name, model in roles.items() if model is not None}
        found = self.journal.once(
            step,
            f"{', '.join(wanted)} {which}",
            lambda: [
                self._evaluate(batch, model, "value" if name == "old_value" else "logp").tolist()
                for name, model in wanted.items()
            ],
        )
        tokens = {"old_logp": sampled} | {k: torch.tensor(x, dtype=wide) for k, x in zip(wanted, found, strict=True)}
        tokens = of_sampled(tokens, rollouts)
        kl = self.coefficient(step)
        new, score = estimate(groups, plan, self.advantage, forest, live, tokens, kl)
        tokens |= new
        if self.value is None:
            del tokens["return"]
        if self.mismatch is not None:
            tokens["mismatch"] = self._mismatch(tokens["old_logp"], sampled, batch)
        self._metrics |= rollout_metrics(groups, plan, forest, live, tokens)
        scores = [s for g in groups for s in g.scores]
        stops: frozenset[int] = getattr(self.engine, "stop_ids", frozenset())
        self._metrics |= signs(batch, rollouts, scores, plan.samples, tokens, stops)
        if plan.rounds > 1:
            self._metrics["groups/kept"] = self._kept
        if plan.kl_target is not None:
            self._metrics["kl/coefficient"] = kl
            moved = adaptive_kl(
                kl, self._metrics["kl/mean"], sequences=len(rollouts), target=plan.kl_target, horizon=plan.kl_horizon
            )
            self._kl |= {step: kl, step + plan.updates: moved}
        return Batch(forest, tokens, {"reward": score}, {})

    def _mismatch(self, old: Tensor, sampled: Tensor, batch: Batch) -> Tensor:
        """Weights of tokens ``[M]`` by how far the trainer's log-probabilities are from the sampler's."""
        assert self.mismatch is not None
        mask = batch.forest.masks["sampled"]
        weight = self.mismatch(old, sampled, mask, batch.forest.branch)
        gap = sampled - old
        self._metrics |= {
            "mismatch/weight": float(masked_mean(weight, mask)),
            "mismatch/zero": float(masked_mean((weight == 0).to(weight.dtype), mask)),
            "mismatch/kl": float(masked_mean(torch.exp(-gap) - 1 + gap, mask)),
        }
        return weight

    def _evaluate(self, batch: Batch, model: Model, name: str) -> Tensor:
        """One statistic a target under a model, without gradient."""
        want, temperature = frozenset({name}), self.plan.sampling.temperature
        parts = split(batch, self.plan.max_tokens, whole_groups=False)
        with torch.no_grad():
            return torch.cat([forward_stats(model, p.forest, want, temperature=temperature)[name] for p in parts]).cpu()

    def _records(
        self, completions: Sequence[Completion], groups: Sequence[Group], batch: Batch
    ) -> list[dict[str, Any]]:
        """A line of ``samples.jsonl`` for each response."""
        return records(completions, groups, [{"kl": kl} for kl in divergences(batch, len(completions))])
