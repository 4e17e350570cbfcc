"""Train under a limit on cost and without one, over seeds, and write what was declared: ``python -m benchmarks.safety``.

Every seed and arm appends a line to ``benchmarks/results/safety.jsonl``; lines that are there are not made again. The page is
``docs/results/safety.md``. Reward and cost are declared functions of the text (`posttrain.data.smallworld_safety`).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from io import StringIO
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks import kept
from benchmarks.safety import page
from rich.console import Console

from posttrain.data import smallworld_safety as world
from posttrain.data.collate import prompt_ids
from posttrain.models.load import load_policy, load_tokenizer
from posttrain.rollout.engine import Request, Sampling
from posttrain.rollout.local import LocalEngine
from posttrain.runner import run_recipe
from posttrain.stages import SFT, Recipe, ReinforceSafely
from posttrain.types import Example, Message

NAME = "safety"
USEFUL, COST = (f"posttrain.data.smallworld_safety:{name}" for name in ("usefulness", "cost"))
LIMIT = -0.7
POLICY: dict[str, Any] = {
    "cost_limit": LIMIT, "multiplier": 0.3, "multiplier_rate": 0.5, "multiplier_most": 5.0, "window": 128, "steps": 64,
    "prompts_per_step": 16, "samples_per_prompt": 4, "lora_rank": 8, "lr": 1.5e-3, "value_lr": 3e-3, "kl": 0.02, "lam": 1.0,
    "warmup_steps": 2, "max_new_tokens": 24, "cut_score": 0.0, "save_every": 64, "dtype": "float32", "schedule": "constant",
}  # fmt: skip
PROMPTS, SAMPLES = 128, 2


def recipe(data: str, arm: str) -> Recipe:
    """Imitation, then the stage under the limit, or with its multiplier at 0."""
    sft = SFT(model="small-base", data=data, epochs=2.0, lr=1e-3, prompts_per_step=16, dtype="float32")
    numbers = POLICY | ({"multiplier": 0.0} if arm == "reward_only" else {})
    return Recipe(
        "safety", {"sft": sft, "policy": ReinforceSafely(model=sft, data=data, reward=USEFUL, cost=COST, **numbers)}
    )


def gold_of(directory: Path, prompts: Path, seed: int) -> dict[str, float]:
    """Mean reward, mean cost and share of unsafe answers of a policy on some prompts; every policy gets the same draws."""
    asked = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
    tokenizer = load_tokenizer(str(directory))
    examples = [Example(prompt=(Message(role="user", content=p),)) for p in asked]
    ids, _ = prompt_ids(tokenizer, examples, max_length=256)
    requests = [Request(tuple(p), (seed, "gold", i, k)) for i, p in enumerate(ids) for k in range(SAMPLES)]
    model = load_policy(str(directory), dtype=torch.float32)
    engine = LocalEngine(model, frozenset({tokenizer.convert_tokens_to_ids("<|end|>")}), slots=64)
    found = engine.generate(requests, Sampling(max_new_tokens=24))
    texts = [tokenizer.decode(r.ids, skip_special_tokens=True) for r in found]
    pairs = [(asked[i // SAMPLES], text) for i, text in enumerate(texts)]
    return {
        "reward": float(np.mean([world.usefulness(p, t) for p, t in pairs])),
        "cost": float(np.mean([world.cost(p, t) for p, t in pairs])),
        "unsafe": float(np.mean([world.unsafe(p, t) for p, t in pairs])),
    }


def one(seed: int, arm: str, folder: Path) -> dict[str, Any]:
    """Train and measure one seed of an arm."""
    began = time.process_time()
    files = world.write(folder / "data", seed, n_prompts=PROMPTS)
    quiet = Console(file=StringIO(), width=160)
    run = run_recipe(recipe(str(folder / "data"), arm), root=folder, name="run", console=quiet, seed=seed)
    rows = [json.loads(x) for x in (run / "policy" / "metrics.jsonl").read_text().splitlines()]
    return {
        "seed": seed, "arm": arm, "limit": LIMIT, "window": POLICY["window"],
        "curve": {k: [round(r[k], 5) for r in rows] for k in page.KEYS},
        "start": gold_of(run / "sft", files["prompts"], seed),
        "held": {name: gold_of(run / name, files["heldout_prompts"], seed) for name in ("sft", "policy")},
        "cpu": time.process_time() - began,
    }  # fmt: skip


def main() -> None:
    """Make what is missing, then the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--arms", nargs="*", default=list(page.ARMS))
    parser.add_argument("--no-page", action="store_true", help="for processes beside each other: only add lines")
    parser.add_argument("--pilot", action="store_true", help="print one line a seed and keep nothing")
    given = parser.parse_args()
    for seed, arm in product(given.seeds, given.arms):
        if not given.pilot and any((x["seed"], x["arm"]) == (seed, arm) for x in kept.read(NAME)):
            continue
        with tempfile.TemporaryDirectory() as folder:
            line = one(seed, arm, Path(folder))
        if given.pilot:
            print(json.dumps(line), flush=True)
        else:
            kept.append(NAME, {"threads": kept.threads(), "label": "small world", **line})
    if not given.pilot and not given.no_page:
        page.write(kept.read(NAME))


if __name__ == "__main__":
    main()
