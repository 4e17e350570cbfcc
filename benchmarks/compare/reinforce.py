"""Our side of the rows ``grpo`` and ``ppo``: updates on given completions, and whole steps that sample, score and update."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from benchmarks.compare.measure import DTYPES, Clock, settle
from benchmarks.compare.rollouts import ForcedEngine
from torch import Tensor

from posttrain.forest import Batch, Branch, Row, build_forest
from posttrain.losses.advantages import group_z
from posttrain.models import lora
from posttrain.models.load import load_policy, load_tokenizer, new_reward, value_role
from posttrain.models.policy import Model
from posttrain.ops.masked import masked_sum
from posttrain.rewards.base import Completion, Score
from posttrain.rollout.engine import Sampling
from posttrain.train.algorithms import ALGORITHMS
from posttrain.train.estimates import Advantage
from posttrain.train.log import METRICS, Metric
from posttrain.train.policy_gradient import PolicyGradient, estimator, policy_gradient
from posttrain.train.reference import row_logp
from posttrain.train.rollouts import Plan, RolloutSource
from posttrain.train.sources import DataSource, Source, shuffled
from posttrain.train.terms import Stats, Term
from posttrain.types import Example, Message

Job = dict[str, Any]
Made = tuple[dict[str, Model], Any, Source]

LOOSE = 5.0
"""Tolerance of the ratio before updates: given log-probabilities are off by some noise."""


METRICS["logp/mean"] = Metric("nats a token", "mean log-probability of the completions' tokens under the policy")


@dataclass(frozen=True, kw_only=True)
class Watched(PolicyGradient):
    """Clipped policy gradient that also says the mean log-probability of the completions' tokens, as the peer's side does."""

    def __call__(self, stats: Stats, batch: Batch) -> dict[str, Term]:
        """The loss, and ``logp/mean``."""
        logp, mask = stats["policy"]["logp"].detach(), batch.forest.masks["sampled"]
        return super().__call__(stats, batch) | {"logp/mean": Term(masked_sum(logp, mask), "tokens", 0.0)}


def trained(job: Job) -> Model:
    """The policy, all of its weights trained."""
    policy = load_policy(job["model"], dtype=DTYPES[job["dtype"]], train=True)
    policy.net.to(job["device"])
    return policy


def in_order(rows: list[Any]) -> list[Any]:
    """Rows placed so that a source that shuffles by seed 0 visits them as they are."""
    placed = list(rows)
    for row, place in zip(rows, shuffled(len(rows), 0, 0), strict=True):
        placed[place] = row
    return placed


def sampled_row(item: Mapping[str, Any]) -> Row:
    """A prompt and its completions, every token of which was sampled."""
    return Row(item["prompt"], [Branch(b, {"sampled": [True] * len(b)}) for b in item["branches"]])


def grpo_update(job: Job, found: dict[str, Any]) -> Made:
    """GRPO on given completions, advantages and old log-probabilities; no reference."""
    items = in_order(job["rows"])

    def make(indices: Sequence[int]) -> Batch:
        chosen = [items[i] for i in indices]
        forest = build_forest([sampled_row(item) for item in chosen])
        old = [x for item in chosen for branch in item["old_logp"] for x in branch]
        advantage = torch.tensor([a for item in chosen for a in item["advantage"]], dtype=torch.float32)
        tokens = {"old_logp": torch.tensor(old, dtype=torch.float32), "advantage": advantage[forest.branch]}
        return Batch(forest, tokens, {}, {"tokens": float(len(old)), "branches": float(len(advantage))})

    objective = Watched(critic=False, ratio_tolerance=LOOSE)
    return {"policy": trained(job)}, objective, DataSource(len(items), job["per_step"], 0, make)


def grpo_step(job: Job, found: dict[str, Any]) -> Made:
    """GRPO from rollout to update; no reference."""
    found["sync"] = adapter_sync(job)
    policy = trained(job)
    source = rollout_source(job, policy, advantage=group_z, least=2)
    return {"policy": policy}, PolicyGradient(critic=False, ratio_tolerance=tolerance(job)), source


def ppo(job: Job, found: dict[str, Any]) -> Made:
    """PPO from rollout to one update of policy and critic, with a frozen reference."""
    row, dtype, policy = ALGORITHMS["ppo"], DTYPES[job["dtype"]], trained(job)
    reference = load_policy(job["model"], dtype=dtype)
    value = value_role(new_reward(job["model"], dtype=dtype), lora=None, seed=0)
    for model in (reference, value):
        model.net.to(job["device"])
    advantage = estimator(row, gamma=1.0, lam=0.95)
    source = rollout_source(job, policy, reference, value, advantage=advantage, kl=row.numbers["kl"])
    objective = policy_gradient(row, longest=job["longest"], ratio_tolerance=tolerance(job))
    return {"policy": policy, "value": value}, objective, source


def tolerance(job: Job) -> float:
    """By how much sampler and trainer may differ: as in the stages."""
    return 1e-4 if job["dtype"] == "fp32" else 0.1


def rollout_source(
    job: Job,
    policy: Model,
    reference: Model | None = None,
    value: Model | None = None,
    *,
    advantage: Advantage,
    kl: float = 0.0,
    least: int = 1,
) -> RolloutSource:
    """Samples of the job's prompts with their forced lengths, scored by length."""
    items, longest = in_order(job["rows"]), job["longest"]

    def by_length(completions: Sequence[Completion]) -> list[Score]:
        return [Score(len(c.ids) / longest) for c in completions]

    return RolloutSource(
        plan=Plan(
            prompts=job["per_step"],
            samples=len(items[0]["lengths"]),
            updates=1,
            sampling=Sampling(max_new_tokens=longest),
            kl=kl,
            least=least,
            max_tokens=2 * job["max_tokens"],
        ),
        examples=[Example(prompt=(Message(role="user", content=str(k)),)) for k in range(len(items))],
        prompt_ids=[item["prompt"] for item in items],
        engine=ForcedEngine(policy, frozenset(job["stops"]), forced={tuple(i["prompt"]): i["lengths"] for i in items}),
        reward=by_length,
        reference=reference,
        value=value,
        decode=load_tokenizer(job["model"]).decode,
        advantage=advantage,
        policy=policy,
    )


MAKERS = {"update": grpo_update, "step": grpo_step, "ppo": ppo}


def by_phase(source: Source, clock: Clock) -> None:
    """Let the clock tell sampling and passes without gradient from the rest of a step."""
    if isinstance(source, RolloutSource):
        source.engine.generate = clock.timed("rollout", source.engine.generate)
        source._evaluate = clock.timed("reference", source._evaluate)


def adapter_sync(job: Job, times: int = 3) -> float:
    """Seconds to give the engine the weights of an adapter: merged before it samples, and taken out again after.

    Where all weights are trained there is nothing to give: the engine reads the trainer's own.
    """
    model = load_policy(job["model"], dtype=DTYPES[job["dtype"]], lora=lora.Lora(rank=16, alpha=32), train=True)
    model.net.to(job["device"])
    for name, weight in model.parameters().items():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.01)
    spent: list[float] = []
    for _ in range(times + 1):
        began = time.perf_counter()
        with lora.merged(model.net, model.adapter):
            pass
        settle(job["device"])
        spent.append(time.perf_counter() - began)
    return median(spent[1:])


def write_old_logp(model: str, file: str, noise: float = 0.1) -> None:
    """Add ``old_logp`` to rows in a file: the model's own log-probabilities in fp32, a little off, as after an update.

    The noise makes the clip of the ratio, at 0.2, bind for some tokens.
    """
    items, draw = json.loads(Path(file).read_text()), random.Random(0)
    found: list[Tensor] = row_logp(
        load_policy(model, dtype=torch.float32), [sampled_row(i) for i in items], max_tokens=1024, mask="sampled"
    )
    for item, logp in zip(items, found, strict=True):
        parts = logp.split([len(b) for b in item["branches"]])
        item["old_logp"] = [[x + draw.gauss(0.0, noise) for x in part.tolist()] for part in parts]
    Path(file).write_text(json.dumps(items))
