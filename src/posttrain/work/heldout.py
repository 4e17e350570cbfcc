"""What evaluations on held-out rankings share: the rows that fit, baselines that know less, the machine and the time."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from typing import Any

import torch

from posttrain.data.collate import ranking_rows
from posttrain.evals import results as sections
from posttrain.evals import reward as rewards
from posttrain.forest import Row
from posttrain.machine import matmul_speed
from posttrain.stages import Context, HeldOut
from posttrain.types import Example


def fitting(
    tokenizer: Any, examples: Sequence[Example], stage: HeldOut, ctx: Context, name: str = "rankings"
) -> tuple[list[Row], list[Example]]:
    """The rows that the length limit keeps, and their examples; how many were dropped is printed under ``name``."""
    rows, report = ranking_rows(tokenizer, examples, max_length=stage.max_length, overlong=stage.overlong)
    ctx.console.print(f"{name}: {report}", highlight=False)
    return rows, [examples[i] for i in report.index]


def baseline_scores(train: list[Example], test: list[Example]) -> tuple[int, dict[str, list[list[float]]]]:
    """The direction that length was given, and the scores of two baselines that know less, fitted to training rankings."""
    direction = rewards.length_direction(rewards.ranking_texts(train), rewards.ranking_ranks(train))
    scores = {
        "length": rewards.length_scores(rewards.ranking_texts(test), direction=direction),
        "bag_of_words": rewards.bag_of_words_scores(train, test),
    }
    return direction, scores


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
