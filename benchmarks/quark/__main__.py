"""Train Quark on the small world over seeds and write what was declared: ``python -m benchmarks.quark``.

Every seed appends a line to ``benchmarks/results/quark.jsonl``; lines that are there are not made again. The page is
``docs/results/quark.md``. Its declared reward counts words, so that nothing stands between score and token.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from io import StringIO
from pathlib import Path
from typing import Any

from benchmarks import kept
from benchmarks.quark import page
from rich.console import Console

from posttrain.data import smallworld
from posttrain.runner import run_recipe
from posttrain.stages import EvaluateQuark, Quark, Recipe

NAME = "quark"
SHORT = "benchmarks.quark.reward:brevity"
NUMBERS: dict[str, Any] = {
    "bins": 5, "beta": 0.05, "eta": 0.0, "lr": 2e-3, "warmup_steps": 8, "steps": 384, "explore_every": 48, "rows_per_step": 24,
    "samples_per_prompt": 2, "max_new_tokens": 24, "save_every": 384, "cut_score": -24.0,
    "dtype": "float32",
}  # fmt: skip
PROMPTS, SAMPLES = 64, 2
KEYS = ("reward/mean", "pool/size", "pool/best", "pool/worst")


def recipe(data: str) -> Recipe:
    """Quark from the small base model, and its measurement."""
    policy = Quark(model="small-base", data=data, reward=SHORT, **NUMBERS)
    measured = EvaluateQuark(
        policy=policy, reference="small-base", reward=SHORT, data=data, prompts=PROMPTS, samples=SAMPLES, max_new_tokens=24, dtype="float32"
    )  # fmt: skip
    return Recipe("quark", {"policy": policy, "evaluate": measured})


def one(seed: int, folder: Path) -> dict[str, Any]:
    """Train and measure one seed."""
    began = time.process_time()
    smallworld.write(folder / "data", seed, n_heldout_prompts=PROMPTS)
    quiet = Console(file=StringIO(), width=160)
    run = run_recipe(recipe(str(folder / "data")), root=folder, name="run", console=quiet, seed=seed)
    rows = [json.loads(x) for x in (run / "policy" / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((run / "evaluate" / "results.json").read_text())
    return {
        "seed": seed,
        "explorations": [{k: round(r[k], 4) for k in KEYS} for r in rows if "pool/size" in r],
        "kl": [round(r["kl/full"], 4) for r in rows],
        "nll": [round(r["loss/nll"], 4) for r in rows],
        "bins": results["bin_means"],
        "rank_correlation": results["rank_correlation"],
        "held": {n: row["reward"] for n, row in results["policies"].items()},
        "cpu": time.process_time() - began,
    }


def main() -> None:
    """Make what is missing, then the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--pilot", action="store_true", help="print one line a seed and keep nothing")
    given = parser.parse_args()
    for seed in given.seeds:
        if not given.pilot and any(x["seed"] == seed for x in kept.read(NAME)):
            continue
        with tempfile.TemporaryDirectory() as folder:
            line = one(seed, Path(folder))
        if given.pilot:
            print(json.dumps(line), flush=True)
        else:
            kept.append(NAME, {"threads": kept.threads(), "label": "small world", **line})
    if not given.pilot:
        page.write(kept.read(NAME))


if __name__ == "__main__":
    main()
