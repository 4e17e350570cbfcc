"""SmolLM2 with LoRA on a task of reasoning-gym: accuracy as PPO, RLOO, GRPO and DAPO go on. One seed, every prompt new.

``python -m benchmarks.reasoning --find`` samples the start on tasks that might be of the right difficulty. ``python -m
benchmarks.reasoning [--algorithms ppo rloo grpo dapo] [--steps N]`` trains what is missing and appends to
``benchmarks/results/reasoning.jsonl``; ``--page`` prints the curves as tables, ``--draw FILE`` as an image.

A prompt is trained on once, so what a rollout scores is accuracy on prompts that were never seen; a point of a curve is the mean over
`WINDOW` rollouts with its 95 % bootstrap interval by prompt. Only answers that the checker finds wholly right count.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks import kept
from rich.console import Console

from posttrain.evals.statistics import cluster_bootstrap
from posttrain.machine import deterministic_kernels
from posttrain.runner import run_recipe
from posttrain.stages import Generate, Label, Recipe, Reinforce

NAME = "reasoning"
TASK = "chain_sum,max_terms=2,max_digits=1"
CANDIDATES = (
    "chain_sum,max_terms=2,max_digits=1",
    "chain_sum,max_terms=2,max_digits=2",
    "basic_arithmetic,max_terms=2,max_digits=1",
    "products,max_digits=1",
    "gcd,max_value=20",
    "letter_counting,max_words=5",
    "spell_backward,max_word_len=4",
    "number_sorting,max_numbers=4",
    "coin_flip",
)
ALGORITHMS = ("ppo", "rloo", "grpo", "dapo")
PROMPTS, SAMPLES, WINDOW = 16, 8, 4
TEMPERATURE = 0.7  # at 1 the small quantised model wanders off; it is trained at the temperature that it is sampled at
COMMON: dict[str, Any] = {
    "model": "smollm2", "reward": "reasoning_gym", "lora_rank": 16, "warmup_steps": 2, "prompts_per_step": PROMPTS,
    "max_new_tokens": 24, "lr": 3e-4, "value_lr": 1e-3, "temperature": TEMPERATURE, "cut_score": 0.0, "slots": 64, "save_every": 1000,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {  # equal samples a step: PPO has none to compare, DAPO draws more where all are alike
    "ppo": {"samples_per_prompt": SAMPLES, "updates_per_rollout": 2, "kl": 0.02},
    "rloo": {"samples_per_prompt": SAMPLES, "updates_per_rollout": 1, "kl": 0.02},
    "grpo": {"samples_per_prompt": SAMPLES, "updates_per_rollout": 1, "kl": 0.02},
    "dapo": {"samples_per_prompt": SAMPLES, "updates_per_rollout": 2, "rounds": 4, "overlong_share": 0.25},
}


def quiet() -> Console:
    """A console that prints nowhere."""
    return Console(file=StringIO(), width=160)


def find(prompts: int, samples: int) -> None:
    """Print how often the start solves each candidate, with an answer to look at."""
    for task in CANDIDATES:
        began = time.process_time()
        made = Generate(
            model="smollm2",
            data=f"reasoning_gym:{task},size={prompts}",
            samples=samples,
            max_new_tokens=24,
            slots=64,
            temperature=TEMPERATURE,
        )
        scored = Label(data=made, reward="reasoning_gym", cut_score=0.0)
        with tempfile.TemporaryDirectory() as folder:
            run = run_recipe(
                Recipe("find", {"made": made, "scored": scored}), root=Path(folder), console=quiet(), seed=10
            )
            rows = [json.loads(x) for x in (run / "scored/data/samples.jsonl").read_text().splitlines()]
        solved = np.array([[r["score"] >= 1 for r in row["responses"]] for row in rows], dtype=float)
        shown = rows[0]["responses"][0]["messages"][0]["content"][:60]
        mixed = float(((solved.mean(1) > 0) & (solved.mean(1) < 1)).mean())
        seconds = time.process_time() - began
        print(f"{task:45} solved {solved.mean():.3f} differing {mixed:.2f} cpu {seconds:4.0f} s  {shown!r}", flush=True)


def train(algorithm: str, steps: int, seed: int) -> dict[str, Any]:
    """Train and return what each rollout scored: by prompt the share of answers that are right."""
    rounds = OWN[algorithm].get("rounds", 1)
    size = steps // OWN[algorithm]["updates_per_rollout"] * PROMPTS * rounds
    stage = Reinforce(
        data=f"reasoning_gym:{TASK},size={size}", algorithm=algorithm, steps=steps, **COMMON, **OWN[algorithm]
    )
    began, wall = time.process_time(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run = run_recipe(Recipe("reasoning", {"policy": stage}), root=Path(folder), console=quiet(), seed=seed)
        samples = [json.loads(x) for x in (run / "policy/samples.jsonl").read_text().splitlines()]
        metrics = [json.loads(x) for x in (run / "policy/metrics.jsonl").read_text().splitlines()]
    rollouts: dict[int, dict[str, list[float]]] = {}
    for s in samples:
        rollouts.setdefault(s["step"], {}).setdefault(s["prompt"], []).append(float((s["reward"] or 0.0) >= 1))
    return {
        "algorithm": algorithm,
        "task": TASK,
        "steps": steps,
        "seed": seed,
        "threads": kept.threads(),
        "cpu": time.process_time() - began,
        "seconds": time.perf_counter() - wall,
        "label": "SmolLM2-135M-Instruct, dequantised Q4_1",
        "right": [[float(np.mean(x)) for x in by.values()] for _, by in sorted(rollouts.items())],
        "kept": [m["groups/kept"] for m in metrics if "groups/kept" in m],
        "kl": [m["kl/mean"] for m in metrics if "kl/mean" in m],
        "entropy": [m["policy/entropy"] for m in metrics if "policy/entropy" in m],
    }


def curve(record: dict[str, Any]) -> list[tuple[int, float, float, float]]:
    """Points (updates made, accuracy, low, high). With dynamic sampling, samples are of the prompts that were kept."""
    updates = OWN[record["algorithm"]]["updates_per_rollout"]
    out: list[tuple[int, float, float, float]] = []
    for first in range(0, len(record["right"]), WINDOW):
        values = np.concatenate(record["right"][first : first + WINDOW])
        found = cluster_bootstrap(values, np.arange(len(values)))
        low, high = (found.mean if x is None else x for x in (found.low, found.high))
        out.append((first * updates, found.mean, low, high))
    return out


def page() -> str:
    """A table of each curve's points."""
    lines = [f"Task `{TASK}`; {PROMPTS} prompts, {SAMPLES} answers each a rollout; a point is {WINDOW} rollouts.", ""]
    lines += ["| algorithm | updates before | accuracy [95 %] |", "|---|---|---|"]
    for record in kept.read(NAME):
        points = curve(record)
        lines += [f"| {record['algorithm']} | {u} | {m:.3f} [{low:.3f}, {high:.3f}] |" for u, m, low, high in points]
    lines += ["", "| algorithm | updates | minutes | CPU minutes | prompts kept |", "|---|---|---|---|---|"]
    for r in kept.read(NAME):
        share = f"{np.mean(r['kept']):.2f}" if r["kept"] else "all"
        lines.append(f"| {r['algorithm']} | {r['steps']} | {r['seconds'] / 60:.1f} | {r['cpu'] / 60:.1f} | {share} |")
    return "\n".join(lines)


def draw(file: Path) -> None:
    """All curves in one image."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for record in kept.read(NAME):
        updates, mean, low, high = (np.array(x) for x in zip(*curve(record), strict=True))
        (line,) = axes.plot(updates, mean, marker="o", label=record["algorithm"])
        axes.fill_between(updates, low, high, alpha=0.15, color=line.get_color())
    axes.set_xlabel("updates made")
    axes.set_ylabel("answers wholly right, on prompts not seen before")
    axes.set_ylim(0, 1)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    """Find a task, train what is missing, or show what is there."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--find", action="store_true")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS), choices=ALGORITHMS)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pilot", action="store_true", help="print and keep nothing")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--draw", type=Path)
    given = parser.parse_args()
    if given.page:
        print(page())
    elif given.draw:
        draw(given.draw)
    elif given.find:
        find(given.prompts, 4)
    else:
        deterministic_kernels()
        known = {(r["algorithm"], r["task"], r["seed"]) for r in kept.read(NAME)}
        for algorithm in given.algorithms:
            if given.pilot:
                found = train(algorithm, given.steps, given.seed)
                print(
                    json.dumps({k: v for k, v in found.items() if k != "right"} | {"curve": curve(found)}), flush=True
                )
            elif (algorithm, TASK, given.seed) not in known:
                kept.append(NAME, train(algorithm, given.steps, given.seed))


if __name__ == "__main__":
    main()
