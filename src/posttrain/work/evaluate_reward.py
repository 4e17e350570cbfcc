"""Accuracy of reward models on held-out rankings, beside baselines that know less."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from posttrain.data.collate import ranking_rows
from posttrain.data.views import rankings
from posttrain.evals import results as sections
from posttrain.evals import reward as rewards
from posttrain.forest import Batch, Row, build_forest, split
from posttrain.machine import matmul_speed
from posttrain.models.load import load_policy, load_reward
from posttrain.models.policy import Model, hidden_states
from posttrain.rewards.model import score_rows
from posttrain.stages import Context, EvaluateReward
from posttrain.train.progress import progress
from posttrain.types import Example
from posttrain.work.inputs import choose_dtype, data_files, load_examples, read_part, start_from


def run(stage: EvaluateReward, ctx: Context) -> None:
    """Measure and write ``results.json``."""
    start = start_from(stage.base, ctx, "base")
    dtype = choose_dtype(stage.dtype, start.path)
    files = data_files(stage.test, stage.base)
    test = read_part(files.get("heldout_rankings", files["rankings"]), ctx, stage.test_limit, stage.skip_bad)
    train = rankings(load_examples(stage, ctx, "rankings"))
    kept = [fitting(start.tokenizer, examples, stage, ctx) for examples in (train, rankings(test))]
    frozen = load_policy(start.path, dtype=dtype)
    scorers = {"reward": load_reward(str(ctx.inputs["reward"]), dtype=dtype)}
    accuracy, comparisons = reward_accuracy(ctx, start.tokenizer, scorers, frozen, kept[0], kept[1], stage.max_tokens)
    results = sections.closing_results(
        machine=machine(), reward_accuracy=accuracy, reward_comparisons=comparisons, stages=stage_seconds(ctx)
    )
    sections.write_results(results, ctx.dir / "results.json")


def fitting(tokenizer: Any, examples: Sequence[Example], stage: EvaluateReward, ctx: Context) -> list[Example]:
    """The examples that the length limit keeps; how many were dropped is printed."""
    _, report = ranking_rows(tokenizer, examples, max_length=stage.max_length, overlong=stage.overlong)
    ctx.console.print(f"rankings: {report}", highlight=False)
    return [examples[i] for i in report.index]


def machine() -> dict[str, Any]:
    """The line that says what computed the tables, and how fast it multiplies."""
    return sections.machine_section(
        device=platform.processor() or platform.machine(),
        threads=torch.get_num_threads(),
        fp32_gflops=matmul_speed("fp32"),
        bf16_gflops=matmul_speed("bf16"),
    )


def stage_seconds(ctx: Context) -> dict[str, float]:
    """Seconds of the stages finished so far, in the order they ended."""
    done = sorted(ctx.dir.parent.glob("*/done.json"), key=lambda p: p.stat().st_mtime)
    return {path.parent.name: json.loads(path.read_text())["seconds"] for path in done}


def reward_accuracy(
    ctx: Context,
    tokenizer: Any,
    scorers: Mapping[str, Model],
    frozen: Model,
    train: list[Example],
    test: list[Example],
    max_tokens: int,
) -> tuple[Any, Any]:
    """Accuracy on held-out rankings of reward models and of three baselines fitted to the first one's rankings."""
    train_rows, test_rows = (ranking_rows(tokenizer, e, max_length=1 << 20)[0] for e in (train, test))
    train_ranks, ranks, failures = (
        rewards.ranking_ranks(train),
        rewards.ranking_ranks(test),
        rewards.ranking_failures(test),
    )
    direction = rewards.length_direction(rewards.ranking_texts(train), train_ranks)
    total = len(scorers) * len(test_rows) + len(train_rows) + len(test_rows)
    with progress(ctx.console, "reward models", total) as update:
        scores: dict[str, Any] = {}
        for k, (name, model) in enumerate(scorers.items()):
            scores[name] = score_rows(model, test_rows, max_tokens=max_tokens)
            update((k + 1) * len(test_rows), name)
        features = branch_features(frozen, train_rows, max_tokens)
        update(total - len(test_rows), "frozen base")
        weight = rewards.frozen_head(features, train_ranks)
        scores["length"] = rewards.length_scores(rewards.ranking_texts(test), direction=direction)
        scores["bag_of_words"] = rewards.bag_of_words_scores(train, test)
        scores["frozen_base"] = rewards.head_scores(branch_features(frozen, test_rows, max_tokens), weight)
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
