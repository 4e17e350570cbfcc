"""The closing measurement: reward models on held-out rankings, policies on held-out prompts."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from posttrain.data.collate import prompt_ids, ranking_rows
from posttrain.evals import results as sections
from posttrain.evals import reward as rewards
from posttrain.forest import Batch, Branch, Row, build_forest, split
from posttrain.machine import matmul_speed
from posttrain.models.load import load_policy, load_reward
from posttrain.models.policy import Model, forward_stats, hidden_states
from posttrain.ops.masked import segment_sum
from posttrain.rewards.model import score_rows
from posttrain.rollout.engine import Request, Rollout, Sampling
from posttrain.rollout.local import LocalEngine
from posttrain.stages import Context, Evaluate
from posttrain.train.progress import progress
from posttrain.types import Example
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
    accuracy, comparisons = reward_accuracy(stage, ctx, base, scorers)
    policy, samples, worst = policies(stage, ctx, base, scorers, means)
    machine = sections.machine_section(
        device=platform.processor() or platform.machine(),
        threads=torch.get_num_threads(),
        fp32_gflops=matmul_speed("fp32"),
        bf16_gflops=matmul_speed("bf16"),
    )
    results = sections.closing_results(
        machine=machine,
        reward_accuracy=accuracy,
        reward_comparisons=comparisons,
        policy=policy,
        samples=samples,
        worst=worst,
        stages=stage_seconds(ctx),
    )
    sections.write_results(results, ctx.dir / "results.json")


def stage_seconds(ctx: Context) -> dict[str, float]:
    """Seconds of the stages finished so far, in the order they ended."""
    done = sorted(ctx.dir.parent.glob("*/done.json"), key=lambda p: p.stat().st_mtime)
    return {path.parent.name: json.loads(path.read_text())["seconds"] for path in done}


def reward_accuracy(stage: Evaluate, ctx: Context, base: Start, scorers: dict[str, Model]) -> tuple[Any, Any]:
    """Accuracy on held-out rankings of both reward models and of three baselines fitted to the first one's rankings."""
    train = slice_rows(load_examples(stage, ctx, "rankings"), stage.rows)
    test = load_examples(stage, ctx, "heldout_rankings")
    train_rows, test_rows = (ranking_rows(base.tokenizer, e, max_length=2048)[0] for e in (train, test))
    train_ranks, ranks, failures = (
        rewards.ranking_ranks(train),
        rewards.ranking_ranks(test),
        rewards.ranking_failures(test),
    )
    direction = rewards.length_direction(rewards.ranking_texts(train), train_ranks)
    frozen = load_policy(base.path, dtype=choose_dtype(stage.dtype, base.path))
    total = len(scorers) * len(test_rows) + len(train_rows) + len(test_rows)
    with progress(ctx.console, "reward models", total) as update:
        scores: dict[str, Any] = {}
        for k, (name, model) in enumerate(scorers.items()):
            scores[name] = score_rows(model, test_rows, max_tokens=stage.max_tokens)
            update((k + 1) * len(test_rows), name)
        features = branch_features(frozen, train_rows, stage.max_tokens)
        update(total - len(test_rows), "frozen base")
        weight = rewards.frozen_head(features, train_ranks)
        scores["length"] = rewards.length_scores(rewards.ranking_texts(test), direction=direction)
        scores["bag_of_words"] = rewards.bag_of_words_scores(train, test)
        scores["frozen_base"] = rewards.head_scores(branch_features(frozen, test_rows, stage.max_tokens), weight)
        update(total, "done")
    outcomes = {name: rewards.pair_outcomes(s, ranks, failures) for name, s in scores.items()}
    return sections.reward_section(outcomes, length_direction=direction), sections.compare_rewards(outcomes)


def branch_features(model: Model, rows: Sequence[Row], max_tokens: int) -> list[np.ndarray]:
    """The trunk's state at each response's last token, ``[K, d]`` a row."""
    batch = Batch(build_forest(rows), {}, {}, {})
    parts: list[torch.Tensor] = []
    with torch.no_grad():
        for part in split(batch, max_tokens, whole_groups=False):
            parts.append(hidden_states(model, part.forest).index_select(0, part.forest.end).float())
    flat = torch.cat(parts).numpy()
    ends = np.cumsum([len(row.branches) for row in rows])
    return np.split(flat, ends[:-1])


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
