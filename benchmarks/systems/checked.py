"""What systems on checked answers do on the small world, over seeds: ``python -m benchmarks.systems.checked [--seeds 1 2 3]``.

``dapo``: the recipe beside GRPO of the same numbers without what DAPO adds, from one start. ``deepseek_r1``: accuracy after each
stage. ``deepseek_v2``: two stages beside both kinds of prompts in every step. ``tool_use``: conversations with a search. What is
expected was declared before, in ``declared-checked.md``. Lines of ``benchmarks/results/systems-checked.jsonl`` that are there are
not made again; ``--page`` prints the tables of those that are.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks import kept
from rich.console import Console

from posttrain.data import smallworld
from posttrain.data.collate import prompt_ids
from posttrain.evals.statistics import cluster_bootstrap
from posttrain.graph import override
from posttrain.machine import deterministic_kernels
from posttrain.models.load import load_policy, load_tokenizer
from posttrain.recipes.deepseek_v2 import mixed
from posttrain.registry import RECIPES
from posttrain.rollout.engine import Request, Sampling
from posttrain.rollout.local import LocalEngine
from posttrain.runner import run_recipe
from posttrain.stages import Merge, Recipe
from posttrain.types import Example, Message

NAME = "systems-checked"
PROMPTS, SAMPLES = 48, 2
PLAIN: dict[str, Any] = {
    "algorithm": "grpo", "penalty": "none", "options": {}, "rounds": 1, "overlong_share": 0.0, "mask_cut": False,
}  # fmt: skip
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "dapo": {},
    "deepseek_r1": {},
    "deepseek_v2": {},
    "tool_use": {},
}


def trained(recipe: Recipe, seed: int, folder: Path) -> Path:
    """Run a recipe whole; its directory."""
    quiet = Console(file=StringIO(), width=160)
    return run_recipe(recipe, root=folder, name=recipe.name, console=quiet, seed=seed)


def rows(run: Path, stage: str, column: str = "reward") -> dict[str, list[float]]:
    """A column of an evaluation by prompt, of each policy."""
    found = json.loads((run / stage / "results.json").read_text())["rows"]
    return {key.split("/")[1]: found[key] for key in found if key.endswith(f"/{column}")}


def logged(run: Path, stage: str, column: str) -> list[float]:
    """A column of a stage's metrics, a number a rollout."""
    lines = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
    return [line[column] for line in lines if column in line]


def gold(directory: Path, seed: int) -> list[float]:
    """Gold totals of a policy's answers to held-out requests of the small world, by prompt; the same draws for every policy."""
    tokenizer = load_tokenizer(str(directory))
    asked = smallworld.task_prompts(PROMPTS, seed=100 + seed, split="heldout")
    examples = [Example(prompt=(Message(role="user", content=row["prompt"]),)) for row in asked]
    ids, _ = prompt_ids(tokenizer, examples, max_length=256)
    requests = [Request(tuple(p), (seed, "gold", i, k)) for i, p in enumerate(ids) for k in range(SAMPLES)]
    engine = LocalEngine(
        load_policy(str(directory), dtype=torch.float32),
        frozenset({tokenizer.convert_tokens_to_ids("<|end|>")}),
        slots=64,
    )
    texts = [
        tokenizer.decode(r.ids, skip_special_tokens=True)
        for r in engine.generate(requests, Sampling(max_new_tokens=64))
    ]
    totals = [
        smallworld.gold(asked[i // SAMPLES]["prompt"], t).total if t.strip() else 0.0 for i, t in enumerate(texts)
    ]
    return np.array(totals).reshape(PROMPTS, SAMPLES).mean(1).tolist()


def dapo_run(seed: int, folder: Path) -> dict[str, Any]:
    """DAPO and plain GRPO from one start, with as many updates on as many prompts."""
    base = override(RECIPES["dapo"](), CHANGES["dapo"])
    cold, tuned, evaluate = (base.stages[name] for name in ("cold", "tuned", "evaluate"))
    plain = replace(tuned, **PLAIN)
    policy, grpo = (Merge(policy=stage, base=cold) for stage in (tuned, plain))
    stages = {"cold": cold, "tuned": tuned, "policy": policy, "plain": plain, "grpo": grpo}
    stages |= {"evaluate": replace(evaluate, policies=(cold, policy, grpo))}
    run = trained(Recipe("dapo", stages), seed, folder)
    learnt = (("policy", "tuned"), ("grpo", "plain"))
    entropy = {name: logged(run, stage, "policy/entropy") for name, stage in learnt}
    flat = {name: logged(run, stage, "groups/flat") for name, stage in learnt}
    return {
        "accuracy": rows(run, "evaluate"),
        "entropy": entropy,
        "flat": flat,
        "kept": logged(run, "tuned", "groups/kept"),
    }


def r1_run(seed: int, folder: Path) -> dict[str, Any]:
    """Accuracy and form after each stage, and gold on other requests before and after the last."""
    run = trained(override(RECIPES["deepseek_r1"](), CHANGES["deepseek_r1"]), seed, folder)
    found = {name: rows(run, "evaluate", name) for name in ("accuracy", "format")}
    return found | {"gold": {name: gold(run / name, seed) for name in ("sft", "final")}}


def v2_run(seed: int, folder: Path) -> dict[str, Any]:
    """Two stages, and both kinds of prompts at once, from starts and rewards of the same seed."""
    found: dict[str, Any] = {"accuracy": {}, "preference": {}, "gold": {}}
    for make in (RECIPES["deepseek_v2"], mixed):
        run = trained(override(make(), CHANGES["deepseek_v2"]), seed, folder)
        prefix = "mixed/" if make is mixed else ""
        for name, stage in (("accuracy", "checks"), ("preference", "tastes")):
            found[name] |= {prefix + policy: values for policy, values in rows(run, stage).items()}
        found["gold"] |= {prefix + n: gold(run / n, seed) for n in ("sft", "reason", "prefer") if (run / n).exists()}
    return found


def tool_run(seed: int, folder: Path) -> dict[str, Any]:
    """How often a policy looks, is right and is supported, before and after."""
    run = trained(override(RECIPES["tool_use"](), CHANGES["tool_use"]), seed, folder)
    return {name: rows(run, "evaluate", name) for name in ("reward", "accuracy", "looked")}


WHAT: dict[str, Callable[[int, Path], dict[str, Any]]] = {
    "dapo": dapo_run, "deepseek_r1": r1_run, "deepseek_v2": v2_run, "tool_use": tool_run,
}  # fmt: skip
DECLARED: list[tuple[str, str, str, str, float]] = [  # system, quantity, of, less that of, expected above
    ("dapo", "accuracy", "policy", "cold", 0.0),
    ("dapo", "accuracy", "policy", "grpo", -0.02),
    ("dapo", "entropy", "policy", "grpo", 0.0),
    ("deepseek_r1", "accuracy", "reason", "cold", 0.0),
    ("deepseek_r1", "accuracy", "sft", "cold", 0.0),
    ("deepseek_r1", "accuracy", "final", "sft", -0.02),
    ("deepseek_r1", "gold", "final", "sft", 0.0),
    ("deepseek_v2", "accuracy", "reason", "sft", 0.0),
    ("deepseek_v2", "accuracy", "reason", "mixed/prefer", 0.0),
    ("deepseek_v2", "preference", "prefer", "reason", 0.0),
    ("deepseek_v2", "accuracy", "prefer", "reason", -0.05),
    ("tool_use", "reward", "policy", "cold", 0.0),
    ("tool_use", "looked", "policy", "cold", 0.0),
]


def difference(records: list[Mapping[str, Any]], quantity: str, of: str, than: str) -> tuple[Any, list[float]]:
    """The difference over all seeds, clustered by prompt (entropy: by rollout of the last quarter), and each seed's mean."""
    gaps: list[np.ndarray] = []
    for record in records:
        one, two = (np.array(record[quantity][name]) for name in (of, than))
        if quantity == "entropy":
            last = max(1, min(len(one), len(two)) // 4)
            one, two = one[-last:], two[-last:]
        gaps.append(one - two)
    flat = np.concatenate(gaps)
    return cluster_bootstrap(flat, np.arange(len(flat))), [float(g.mean()) for g in gaps]


def page() -> str:
    """What was declared beside what was measured, then means of everything by seed."""
    lines = ["| system | quantity | expected | measured [95 %] | by seed | |", "|---|---|---|---|---|---|"]
    for system, quantity, of, than, bound in DECLARED:
        known = [r for r in kept.read(NAME) if r["what"] == system]
        if not known:
            continue
        found, seeds = difference(known, quantity, of, than)
        low = found.mean if found.low is None else found.low
        verdict = "shown" if low > bound else "not shown at this scale"
        each = ", ".join(f"{s:+.3f}" for s in seeds)
        lines.append(
            f"| {system} | {quantity}: {of} less {than} | above {bound:g} | {found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}] "
            f"| {each} | {verdict} |"
        )
    return "\n".join([*lines, "", *means()])


def means() -> list[str]:
    """A table of means, a row for each system, quantity and policy."""
    lines = ["| system | quantity | policy | mean by seed |", "|---|---|---|---|"]
    for system in WHAT:
        known = [r for r in kept.read(NAME) if r["what"] == system]
        for quantity in (
            [k for k, v in known[0].items() if isinstance(v, dict) and k not in ("machine", "versions")]
            if known
            else []
        ):
            for policy in known[0][quantity]:
                each = ", ".join(f"{float(np.mean(r[quantity][policy])):.3f}" for r in known)
                lines.append(f"| {system} | {quantity} | {policy} | {each} |")
    return lines


def main() -> None:
    """Make what is missing, or print the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--what", nargs="+", default=list(WHAT), choices=list(WHAT))
    parser.add_argument("--pilot", action="store_true", help="print and keep nothing")
    parser.add_argument("--page", action="store_true")
    given = parser.parse_args()
    if given.page:
        print(page())
        return
    deterministic_kernels()
    known = {(r["what"], r["seed"]) for r in kept.read(NAME)}
    for seed in given.seeds:
        for what in given.what:
            if (what, seed) in known and not given.pilot:
                continue
            began, wall = time.process_time(), time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                found = WHAT[what](seed, Path(folder))
            times = {"cpu": time.process_time() - began, "seconds": time.perf_counter() - wall}
            record = {"what": what, "seed": seed, "threads": kept.threads(), **times, **found}
            if given.pilot:
                short = {
                    k: {n: round(float(np.mean(x)), 3) for n, x in v.items()}
                    for k, v in found.items()
                    if isinstance(v, dict)
                }
                print(json.dumps({"what": what, "seed": seed, **times, **short}), flush=True)
            else:
                kept.append(NAME, record)


if __name__ == "__main__":
    main()
