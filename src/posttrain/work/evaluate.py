"""The closing measurement: reward models on held-out rankings, policies on held-out prompts."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from posttrain.data.collate import prompt_ids
from posttrain.evals import results as sections
from posttrain.forest import Batch, Branch, Row, build_forest, split
from posttrain.models.load import load_policy, load_reward
from posttrain.models.policy import Model, forward_stats
from posttrain.ops.masked import segment_sum
from posttrain.rewards.model import score_rows
from posttrain.rollout.engine import Request, Rollout, Sampling
from posttrain.rollout.local import LocalEngine
from posttrain.stages import Context, Evaluate
from posttrain.train.progress import progress
from posttrain.types import Example
from posttrain.work.evaluate_reward import reward_accuracy
from posttrain.work.heldout import machine, stage_seconds
from posttrain.work.inputs import Start, choose_dtype, load_examples, start_from
from posttrain.work.reinforce import load_trained
from posttrain.work.reward import slice_rows

SCORERS = {"reward": "reward", "reward_unseen": "unseen"}  # name in tables -> input of the stage


@dataclass(frozen=True)
class Sampled:
    """One policy's rollouts on every prompt, ``[prompt][sample]``, and the seconds they took."""

    rollouts: list[list[Rollout]]
    seconds: float


def run(stage: Evaluate, ctx: Context) -> None:
    """Measure and write ``results.json``."""
    base = start_from(stage.base, ctx, "base")
    dtype = choose_dtype(stage.dtype, base.path)
    scorers = {name: load_reward(str(ctx.inputs[field]), dtype=dtype) for name, field in SCORERS.items()}
    means = {n: json.loads((ctx.inputs[f] / "reward.json").read_text())["mean"] for n, f in SCORERS.items()}
    frozen = load_policy(base.path, dtype=dtype)
    train = slice_rows(load_examples(stage, ctx, "rankings"), stage.rows)
    test = load_examples(stage, ctx, "heldout_rankings")
    accuracy, comparisons = reward_accuracy(ctx, base.tokenizer, scorers, frozen, train, test, stage.max_tokens)
    policy, samples, worst = policies(stage, ctx, base, scorers, means)
    results = sections.closing_results(
        machine=machine(),
        reward_accuracy=accuracy,
        reward_comparisons=comparisons,
        policy=policy,
        samples=samples,
        worst=worst,
        stages=stage_seconds(ctx),
    )
    sections.write_results(results, ctx.dir / "results.json")


def policies(
    stage: Evaluate, ctx: Context, base: Start, scorers: dict[str, Model], means: dict[str, float]
) -> tuple[Any, Any, Any]:
    """Sample every policy on the held-out prompts, score the answers, and compare the policies prompt by prompt."""
    examples = load_examples(stage, ctx, "heldout_prompts")[: stage.prompts]
    ids = prompt_ids(base.tokenizer, examples, max_length=2048)[0]
    dtype, sft_path = choose_dtype(stage.dtype, base.path), str(ctx.inputs["sft"])
    trained = load_trained(ctx.inputs["policy"] / "policy", sft_path, dtype)
    shared = trained.adapter is not None
    reference = Model(trained.net) if shared else load_policy(sft_path, dtype=dtype)
    models = {"base": load_policy(base.path, dtype=dtype), "sft": reference, "ppo": trained}
    sampled = {name: sample(stage, ctx, base, model, examples, ids, name) for name, model in models.items()}
    scores: dict[str, dict[str, Any]] = {name: {} for name in models}
    shape = (len(examples), stage.samples)
    for scorer, model in scorers.items():
        rows = [
            Row(ids[i], [Branch(r.ids, {}) for name in models for r in sampled[name].rollouts[i]])
            for i in range(len(ids))
        ]
        table = np.array(score_rows(model, rows, max_tokens=stage.max_tokens)) - means[scorer]
        for k, name in enumerate(models):
            scores[name][scorer] = table[:, k * stage.samples : (k + 1) * stage.samples]
    kl = {name: np.zeros(shape) if name == "sft" else kl_to(reference, s, stage) for name, s in sampled.items()}
    flat = {n: [r for row in s.rollouts for r in row] for n, s in sampled.items()}
    truncated = {n: np.array([r.truncated for r in rs]).reshape(shape) for n, rs in flat.items()}
    section = sections.policy_section(
        scores,
        kl=kl,
        length={n: np.array([len(r.ids) for r in rs]).reshape(shape) for n, rs in flat.items()},
        truncated=truncated,
        seconds={n: s.seconds for n, s in sampled.items()},
    )
    prompts = [e.prompt[-1].content for e in examples]
    answers = {n: [[base.decode(r.ids) for r in row] for row in s.rollouts] for n, s in sampled.items()}
    rows = sections.sample_rows(prompts, answers, scores, truncated=truncated)
    worst = sections.worst_rows(prompts, answers, scores, before="sft", after="ppo", truncated=truncated)
    return section, rows, worst


def sample(
    stage: Evaluate,
    ctx: Context,
    base: Start,
    model: Model,
    examples: Sequence[Example],
    ids: Sequence[list[int]],
    name: str,
) -> Sampled:
    """``stage.samples`` answers of a policy to each prompt; every policy gets the same draws."""
    requests = [
        Request(tuple(prompt), (ctx.seed, "evaluate", e.prompt_key, k))
        for e, prompt in zip(examples, ids, strict=True)
        for k in range(stage.samples)
    ]
    began = time.perf_counter()
    with progress(ctx.console, f"sample {name}", len(requests)) as update:
        engine = LocalEngine(model, base.stop_ids, stage.slots)
        sampling = Sampling(max_new_tokens=stage.max_new_tokens, temperature=stage.temperature)
        flat = engine.generate(requests, sampling, lambda done: update(done, ""))
    rows = [flat[i : i + stage.samples] for i in range(0, len(flat), stage.samples)]
    return Sampled(rows, time.perf_counter() - began)


def kl_to(reference: Model, sampled: Sampled, stage: Evaluate) -> np.ndarray:
    """``sum_t (log pi(y_t) - log pi_ref(y_t))`` of each answer under the policy that sampled it, nats, ``[prompts, samples]``."""
    rows = [Row(row[0].request.ids, [Branch(r.ids, {}) for r in row]) for row in sampled.rollouts]
    batch = Batch(build_forest(rows), {}, {}, {})
    want = frozenset({"logp"})
    with torch.no_grad():
        parts = split(batch, stage.max_tokens, whole_groups=False)
        ref = torch.cat(
            [forward_stats(reference, p.forest, want, temperature=stage.temperature)["logp"] for p in parts]
        )
    own = torch.tensor([x for row in sampled.rollouts for r in row for x in r.logp])
    return segment_sum(own - ref, batch.forest.branch, len(batch.forest.end)).reshape(len(rows), -1).numpy()
