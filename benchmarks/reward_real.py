"""Reward models of SmolLM2 on public data: ``POSTTRAIN_REAL_DATA=FOLDER python -m benchmarks.reward_real``.

One Bradley-Terry model is trained for an epoch, adapters of rank 16, on 128 pairs of hh-rlhf's helpful-base, 128 of its harmless-base
and 96 of an UltraFeedback slice. It is measured, beside the length of an answer and a bag of words fitted to the same pairs, on
held-out pairs of all three, on RM-Bench's chat and safety rows, and by correlation with Prometheus' ratings, bounded to the rows
in ``TESTS``. Each step is skipped where it is finished, so the command can be repeated after a stop. Written are
``OUT/results.json`` and ``OUT/report.html``, and one line a model to ``benchmarks/results/reward_real.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from posttrain.data.collate import ranking_rows
from posttrain.data.load import read
from posttrain.data.write import write_jsonl
from posttrain.evals.reward_page import reward_model_grids
from posttrain.evals.tables import rich_grid
from posttrain.models.load import find_model, load_tokenizer, new_reward, save_merged
from posttrain.models.lora import Lora
from posttrain.rewards.panel import load_panel
from posttrain.train.loop import Run, fit
from posttrain.train.objectives import RewardModel
from posttrain.train.optim import Optim
from posttrain.train.sources import ranking_source
from posttrain.types import Example
from posttrain.work.inputs import choose_dtype
from posttrain.work.reward_bench import comparable, evaluate, read_tests

HELPFUL, HARMLESS = "pairs__hh-helpful-base", "pairs__hh-harmless-base"
ULTRA = "pairs__ultrafeedback-slice__train.jsonl.gz"
LONGEST = 400  # tokens, prompt included: longer rows are left out and counted
ULTRA_TRAIN, ULTRA_TEST, HH_TRAIN = 96, 100, 128
TESTS = {  # file -> rows
    f"{HELPFUL}__test.jsonl.gz": 150,
    f"{HARMLESS}__test.jsonl.gz": 150,
    "kwise__rm-bench-chat__eval.jsonl.gz": 30,
    "kwise__rm-bench-safety-refuse__eval.jsonl.gz": 20,
    "kwise__rm-bench-safety-response__eval.jsonl.gz": 20,
    "rated__prometheus-mtbench__eval.jsonl.gz": 160,
}
RESULTS = Path(__file__).parent / "results" / "reward_real.jsonl"


def main() -> None:
    """Train and measure what is not there yet."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("reward-real"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(os.environ.get("POSTTRAIN_REAL_DATA", ""))
    if not (folder / ULTRA).exists():
        raise SystemExit("POSTTRAIN_REAL_DATA must name the folder that holds the public data")
    console = Console()
    train = [*hh(folder), *ultra(folder)[:ULTRA_TRAIN]]
    directory, place = options.out / "reward", options.out / "eval"
    if not (directory / "reward.json").exists():
        fit_reward(directory, train, options.seed, console)
    if (place / "results.json").exists():
        raise SystemExit(f"{place} is finished; remove it to measure again")
    started, cpu = time.time(), time.process_time()
    panel = load_panel(str(directory), dtype=choose_dtype("auto", str(directory)), max_length=4 * LONGEST)
    tests = read_tests([str(file) for file in tests_files(options.out, folder)])
    results = evaluate([panel], tests, place, train=train, edits=24, say=say)
    for grid in reward_model_grids(results):
        console.print(rich_grid(grid))
    spent = {"seconds": round(time.time() - started, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
    record = json.loads((directory / "reward.json").read_text())
    row = {"seed": options.seed, "train": record, "evaluate": spent, "results": results}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")


def say(what: str, done: int, total: int) -> None:
    """Print a line every 64 prompts."""
    if done % 64 == 0 or done == total:
        print(f"{what}: {done} of {total}", flush=True)


def hh(folder: Path) -> list[Example]:
    """Pairs of both halves of hh-rlhf that fit, one after the other."""
    found: list[Example] = []
    for name in (HELPFUL, HARMLESS):
        found += fitting(read(folder / f"{name}__train.jsonl.gz", skip_bad=100), HH_TRAIN)
    return found


def ultra(folder: Path) -> list[Example]:
    """Pairs of the UltraFeedback slice that fit, those whose two scores tie left out."""
    return fitting(comparable(read(folder / ULTRA, skip_bad=100))[0], ULTRA_TRAIN + ULTRA_TEST)


def fitting(examples: Sequence[Example], count: int) -> list[Example]:
    """The first rows of at most ``LONGEST`` tokens."""
    tokenizer = load_tokenizer(find_model("smollm2").path)
    _, report = ranking_rows(tokenizer, examples[: 4 * count], max_length=LONGEST, overlong="drop")
    print(f"{examples[0].file}: {report}")
    return [examples[i] for i in report.index][:count]


def tests_files(out: Path, folder: Path) -> list[Path]:
    """The test rows, bounded, one file a source; those of UltraFeedback are the ones after the training rows."""
    files = []
    for name, rows in TESTS.items():
        place = out / "tests" / (name.removesuffix(".gz"))
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            short = name.split("__")[1]
            write_jsonl(place, [replace(e, kind=short) for e in read(folder / name, skip_bad=100)[:rows]])
        files.append(place)
    place = out / "tests" / "ultrafeedback.jsonl"
    if not place.exists():
        write_jsonl(place, [replace(e, kind="ultrafeedback") for e in ultra(folder)[ULTRA_TRAIN:]])
    return [*files, place]


def fit_reward(directory: Path, examples: Sequence[Example], seed: int, console: Console) -> None:
    """One epoch of Bradley-Terry on adapters; an interrupted one goes on from its checkpoint."""
    path = find_model("smollm2").path
    tokenizer = load_tokenizer(path)
    rows, _ = ranking_rows(tokenizer, examples, max_length=LONGEST)
    ranks = [[r.rank or 0 for r in e.responses] for e in examples]
    model = new_reward(path, dtype=choose_dtype("auto", path), lora=Lora(rank=16), seed=seed)
    source = ranking_source(rows, ranks, per_step=8, seed=seed)
    directory.mkdir(parents=True, exist_ok=True)
    run = Run(
        directory=directory,
        steps=source.steps_per_epoch,
        max_tokens=2048,
        save_every=8,
        console=console,
        title=directory.name,
    )
    started, cpu = time.time(), time.process_time()
    fit({"reward": model}, RewardModel(), source, optim=Optim(lr=2e-4, schedule="cosine", warmup_steps=4), run=run)
    save_merged(model, path, directory, tokenizer)
    record: dict[str, Any] = {
        "mean": 0.0,
        "pairs": len(rows),
        "seconds": round(time.time() - started, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "threads": torch.get_num_threads(),
    }
    (directory / "reward.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
