"""What the proofs share: small networks trained on rows, scores of held-out answers, and lines of results."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from posttrain.data.formats import parse_rows
from posttrain.data.judged_rows import conditioned
from posttrain.evals.reward import PairOutcome, pair_outcomes, ranking_ranks
from posttrain.evals.statistics import cluster_bootstrap
from posttrain.machine import deterministic_kernels
from posttrain.models.load import load_tokenizer, new_reward
from posttrain.models.policy import Model
from posttrain.models.small import small_path
from posttrain.rewards.trained import Scorer
from posttrain.train.loop import Run, fit
from posttrain.train.optim import Optim
from posttrain.train.sources import response_source
from posttrain.types import Example

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "reward_kinds.jsonl"
TOKENIZER = load_tokenizer(str(small_path()))


def examples_of(rows: Sequence[Mapping[str, Any]]) -> list[Example]:
    """Rows of the small world as examples."""
    return [e for k, row in enumerate(rows) for e in parse_rows(dict(row), "small world", k + 1)]


def new_model(seed: int) -> Model:
    """A reward model from the small instruct model."""
    deterministic_kernels()
    return new_reward(str(small_path()), dtype=torch.float32, seed=seed)


def train(
    model: Model,
    objective: Any,
    rows: Any,
    columns: Any,
    *,
    epochs: float,
    seed: int,
    tokens: Any = None,
    lr: float = 1e-3,
) -> Model:
    """Train in place, in a directory that goes away."""
    source = response_source(rows, columns, tokens or {}, per_step=8, seed=seed)
    steps = round(epochs * source.steps_per_epoch)
    with tempfile.TemporaryDirectory() as place:
        run = Run(
            directory=Path(place),
            steps=steps,
            max_tokens=2048,
            save_every=steps,
            console=Console(file=StringIO()),
            keep=1,
        )
        optim = Optim(lr=lr, schedule="cosine", warmup_steps=4)
        fit({"reward": model}, objective, source, optim=optim, run=run)
    return model


def scorer_of(model: Model, form: str = "responses", **record: Any) -> Scorer:
    """The model as it would be read back."""
    base = {
        "kind": form,
        "form": form,
        "sign": 1,
        "mean": 0.0,
        "outputs": [],
        "aggregation": "product",
        "separator": "\n",
    }
    return Scorer(model, TOKENIZER, base | record, 2048)


def outcomes(scorer: Scorer, rankings: Sequence[Example]) -> list[PairOutcome]:
    """Every pair of held-out rankings."""
    return pair_outcomes(scorer.values(rankings), ranking_ranks(rankings))


def by_domain(rankings: Sequence[Example], domains: Mapping[str, str]) -> list[Example]:
    """The rankings under the system prompts of their kinds."""
    return conditioned(rankings, domains)


def write(proof: str, seed: int, began: float, **measured: Any) -> None:
    """Append a line; ``began`` is `time.process_time` at the start."""
    line = {"proof": proof, "seed": seed, **measured, "cpu_seconds": round(time.process_time() - began, 1)}
    RESULTS.parent.mkdir(exist_ok=True)
    name = RESULTS if seed < 100 else Path(tempfile.gettempdir()) / "reward_kinds_pilot.jsonl"
    with name.open("a") as file:
        file.write(json.dumps(line) + "\n")
    shown = {k: v for k, v in line.items() if not isinstance(v, list)}
    print(json.dumps(shown), flush=True)


def pooled(values: Sequence[Sequence[float]], clusters: Sequence[Sequence[int]]) -> tuple[float, float, float]:
    """Mean and 95 % interval of values of all seeds, clusters of different seeds being different."""
    flat = np.array([x for row in values for x in row])
    names = [(s, c) for s, row in enumerate(clusters) for c in row]
    found = cluster_bootstrap(flat, names)
    return found.mean, found.low, found.high
