"""Accuracy of reward models on held-out rankings, beside baselines that know less."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from posttrain.data.collate import ranking_rows
from posttrain.data.views import rankings
from posttrain.evals import results as sections
from posttrain.evals import reward as rewards
from posttrain.forest import Batch, Row, build_forest, split
from posttrain.models.load import load_policy, load_reward
from posttrain.models.policy import Model, hidden_states
from posttrain.rewards.model import score_rows
from posttrain.stages import Context, EvaluateReward
from posttrain.train.progress import progress
from posttrain.types import Example
from posttrain.work.heldout import baseline_scores, fitting, machine, stage_seconds
from posttrain.work.inputs import choose_dtype, load_examples, read_part, start_from, test_file


def run(stage: EvaluateReward, ctx: Context) -> None:
    """Measure and write ``results.json``."""
    start = start_from(stage.base, ctx, "base")
    dtype = choose_dtype(stage.dtype, start.path)
    test = read_part(test_file(stage), ctx, stage.test_limit, stage.skip_bad)
    train = rankings(load_examples(stage, ctx, "rankings"))
    kept = [fitting(start.tokenizer, examples, stage, ctx)[1] for examples in (train, rankings(test))]
    frozen = load_policy(start.path, dtype=dtype)
    scorers = {"reward": load_reward(str(ctx.inputs["reward"]), dtype=dtype)}
    accuracy, comparisons = reward_accuracy(ctx, start.tokenizer, scorers, frozen, kept[0], kept[1], stage.max_tokens)
    results = sections.closing_results(
        machine=machine(), reward_accuracy=accuracy, reward_comparisons=comparisons, stages=stage_seconds(ctx)
    )
    sections.write_results(results, ctx.dir / "results.json")


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
    direction, baselines = baseline_scores(train, test)
    total = len(scorers) * len(test_rows) + len(train_rows) + len(test_rows)
    with progress(ctx.console, "reward models", total) as update:
        scores: dict[str, Any] = {}
        for k, (name, model) in enumerate(scorers.items()):
            scores[name] = score_rows(model, test_rows, max_tokens=max_tokens)
            update((k + 1) * len(test_rows), name)
        features = branch_features(frozen, train_rows, max_tokens)
        update(total - len(test_rows), "frozen base")
        weight = rewards.frozen_head(features, train_ranks)
        scores |= baselines
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
