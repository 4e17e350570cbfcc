"""What systems that go in rounds do on the small world: ``python -m benchmarks.systems.rounds`` runs what is missing, writes the page.

Claims and sizes stand here and in ``declared-rounds.md``, committed before any reported run. A run is a line of
``benchmarks/results/systems-rounds.jsonl``; gold is read here alone, and by the judge that a recipe is given.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from benchmarks import kept
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console

from posttrain.data import smallworld
from posttrain.data.collate import demonstration_rows, prompt_ids
from posttrain.evals.statistics import Interval, cluster_bootstrap
from posttrain.graph import override
from posttrain.models.load import load_policy, load_tokenizer
from posttrain.models.policy import Model
from posttrain.registry import RECIPES
from posttrain.rollout.engine import Request, Sampling
from posttrain.rollout.local import LocalEngine
from posttrain.runner import run_recipe
from posttrain.stages import PreferOnline, Recipe
from posttrain.train.reference import row_logp
from posttrain.types import Example, Message, Response

ROOT = Path(__file__).parents[2]
NAME = "systems-rounds"
PAGE, PLOT = ROOT / "docs" / "results" / "rounds.md", ROOT / "docs" / "images" / "rounds.png"
SEEDS, PROMPTS, SAMPLES, PROBE = (1, 2, 3), 48, 2, 48
JUDGE = {"judge": "posttrain.rewards.judges:noisy_gold"}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "llama3": JUDGE,
    "qwen2": {},
    "sppo": {"model": "small-base", "data": "smallworld"} | JUDGE,
    "dno": {"model": "small-base", "data": "smallworld"} | JUDGE,
    "nemotron4": {},
}
WHOLE = {"lora_rank": 0}
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "llama3": {f"{name}{k}": {"limit": 48} for name in ("asked", "own") for k in range(1, 7)},
    "sppo": {"sft": WHOLE | {"lr": 1e-3}} | {f"policy{k}": WHOLE | {"lr": 3e-4} for k in (1, 2, 3)},
    "dno": {"sft": WHOLE | {"lr": 1e-3}} | {f"policy{k}": WHOLE | {"lr": 3e-4} for k in (1, 2, 3)},
}
"""Half of the prompts, so that six rounds take a minute; and what the small base model wants that is trained whole."""
MEASURED: dict[str, list[str]] = {
    "llama3": ["start", *(f"model{k}" for k in range(1, 7)), *(f"dpo_{p}{k}" for k in (2, 4, 6) for p in "ab")],
    "qwen2": ["sft", "offline", "online", "adamw"],
    "sppo": ["sft", "policy1", "policy2", "policy3"],
    "dno": ["sft", "policy1", "policy2", "policy3"],
    "nemotron4": ["weak", "dpo1", "dpo2", "rpo1", "rpo2", "rpo3"],
}
Numbers = dict[str, dict[str, np.ndarray]]
"""By policy and quantity (``gold``, ``stopped``, ``wins``, ``probe``) a number of each prompt."""


class Claim(NamedTuple):
    """What is said of a system: a difference by prompt that lies above a bound."""

    system: str
    words: str
    difference: Callable[[Numbers], np.ndarray]
    above: float = 0.0


def less(quantity: str, one: str, two: str) -> Callable[[Numbers], np.ndarray]:
    """The difference of two policies."""
    return lambda found: found[one][quantity] - found[two][quantity]


def averages(found: Numbers) -> np.ndarray:
    """Averaged models less the mean of their parts, over rounds."""
    rounds = [
        found[f"model{k}"]["gold"] - (found[f"dpo_a{k}"]["gold"] + found[f"dpo_b{k}"]["gold"]) / 2 for k in (2, 4, 6)
    ]
    return np.mean(rounds, axis=0)


CLAIMS = [
    Claim("llama3", "gold: round 6 less start", less("gold", "model6", "start")),
    Claim("llama3", "gold: round 6 less round 1", less("gold", "model6", "model1")),
    Claim("llama3", "gold: averages less the mean of their parts", averages, -0.02),
    Claim("llama3", "share that ends: round 6 less start", less("stopped", "model6", "start"), -0.02),
    Claim("qwen2", "gold: offline DPO less SFT", less("gold", "offline", "sft")),
    Claim("qwen2", "gold: online DPO less offline DPO", less("gold", "online", "offline")),
    Claim("qwen2", "gold: merged steps less AdamW", less("gold", "online", "adamw"), -0.02),
    Claim("qwen2", "right answers, nats a token: merged steps less AdamW", less("probe", "online", "adamw")),
    *(
        Claim(system, words, difference)
        for system in ("sppo", "dno")
        for words, difference in (
            ("win rate: round 1 less one half", lambda found: found["policy1"]["wins"] - 0.5),
            ("win rate: round 2 less round 1", less("wins", "policy2", "policy1")),
            ("win rate: round 3 less round 2", less("wins", "policy3", "policy2")),
        )
    ),
    Claim("nemotron4", "gold: first iteration less weak model", less("gold", "dpo1", "weak")),
    Claim("nemotron4", "gold: second iteration less first", less("gold", "dpo2", "dpo1")),
    Claim("nemotron4", "gold: three rounds of reward-aware PO less before", less("gold", "rpo3", "dpo2")),
]


# ---------------------------------------------------------------------------- a run


def recipe(system: str) -> Recipe:
    """A system at the size that is measured; of qwen2 also its online stage without merging."""
    made = RECIPES[system](**ARGUMENTS[system])
    stages = {name: stage for name, stage in made.stages.items() if name != "measure"}
    if system == "qwen2":
        stages["adamw"] = replace(cast(PreferOnline, stages["online"]), merging="none", merging_base=None)
    return override(Recipe(system, stages), CHANGES.get(system, {}))


def one(system: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train and measure one seed."""
    began, cpu, whole = time.perf_counter(), time.process_time(), not folder.exists()
    run = run_recipe(recipe(system), root=folder, name="run", console=Console(file=StringIO(), width=160), seed=seed)
    seconds = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu, "whole": whole}
    found: Numbers = {}
    golds: dict[str, np.ndarray] = {}
    for name in MEASURED[system]:
        golds[name], found[name] = measured(run / name, seed)
        found[name]["wins"] = wins(golds[name], golds[MEASURED[system][0]])
    policies = {name: {q: np.round(v, 5).tolist() for q, v in numbers.items()} for name, numbers in found.items()}
    return {
        "label": "small world",
        "threads": kept.threads(),
        "system": system,
        "seed": seed,
        **seconds,
        "policies": policies,
    }


def measured(directory: Path, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Gold totals ``[PROMPTS, SAMPLES]`` of a policy's answers, and their means, endings and the probe by prompt."""
    tokenizer, policy = load_tokenizer(str(directory)), load_policy(str(directory), dtype=torch.float32)
    prompts = [row["prompt"] for row in smallworld.task_prompts(PROMPTS, seed=200 + seed, split="heldout")]
    examples = [Example(prompt=(Message(role="user", content=p),)) for p in prompts]
    ids, _ = prompt_ids(tokenizer, examples, max_length=256)
    requests = [Request(tuple(p), (seed, "rounds", i, k)) for i, p in enumerate(ids) for k in range(SAMPLES)]
    engine = LocalEngine(policy, frozenset({tokenizer.convert_tokens_to_ids("<|end|>")}), 128)
    found = engine.generate(requests, Sampling(max_new_tokens=32))
    texts = [tokenizer.decode(r.ids, skip_special_tokens=True) for r in found]
    golds = [smallworld.gold(prompts[i // SAMPLES], text).total for i, text in enumerate(texts)]
    table = np.array(golds).reshape(PROMPTS, SAMPLES)
    stopped = np.array([r.stopped for r in found], dtype=float).reshape(PROMPTS, SAMPLES)
    return table, {"gold": table.mean(1), "stopped": stopped.mean(1), "probe": probe(policy, tokenizer, seed)}


def wins(table: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The chance that a sample beats one of another policy's to the same prompt, a half at ties, by prompt."""
    gap = table[:, :, None] - other[:, None, :]
    return ((gap > 0) + 0.5 * (gap == 0)).mean((1, 2))


def probe(policy: Model, tokenizer: Any, seed: int) -> np.ndarray:
    """Log-probability of right answers to held-out prompts, nats a token, ``[PROBE]``."""
    rows = [
        Example(
            prompt=(Message(role="user", content=row["prompt"]),),
            responses=(Response(messages=(Message(role="assistant", content=row["completions"][0]),)),),
        )
        for row in smallworld.rankings(PROBE, 300 + seed, "heldout")
    ]
    made, _ = demonstration_rows(tokenizer, rows, max_length=256)
    return np.array([float(x.mean()) for x in row_logp(policy, made, max_tokens=2048)])


# ---------------------------------------------------------------------------- the page


def numbers(record: dict[str, Any]) -> Numbers:
    """A line's numbers as arrays."""
    return {name: {q: np.array(v) for q, v in found.items()} for name, found in record["policies"].items()}


def verdict(claim: Claim, records: Sequence[dict[str, Any]]) -> Interval:
    """A claim's difference over all seeds, by prompt."""
    values = np.concatenate([claim.difference(numbers(r)) for r in records])
    return cluster_bootstrap(values, np.arange(len(values)))


def page(records: Sequence[dict[str, Any]]) -> str:
    """The results as Markdown."""
    out = [HEAD, "| system | claim | found | each seed | |", "|---|---|---|---|---|"]
    for claim in CLAIMS:
        mine = [r for r in records if r["system"] == claim.system]
        if not mine:
            out.append(f"| `{claim.system}` | {claim.words} | not run yet | | |")
            continue
        whole = verdict(claim, mine)
        each = ", ".join(f"{claim.difference(numbers(r)).mean():+.3f}" for r in mine)
        shown = "shown" if whole.low > claim.above else "not shown at this scale"
        bound = f", above {claim.above:g}" if claim.above else ""
        out.append(
            f"| `{claim.system}` | {claim.words}{bound} | {whole.mean:+.3f} [{whole.low:+.3f}, {whole.high:+.3f}] | {each} | {shown} |"
        )
    out += [
        "",
        "| system | seed | policy | gold | wins against the first | ends by itself | right answers, nats a token |",
    ]
    out += ["|---|--:|---|--:|--:|--:|--:|"]
    for r in sorted(records, key=lambda r: (list(MEASURED).index(r["system"]), r["seed"])):
        for name, found in numbers(r).items():
            means = " | ".join(f"{found[q].mean():.3f}" for q in ("gold", "wins", "stopped", "probe"))
            out.append(f"| `{r['system']}` | {r['seed']} | {name} | {means} |")
    out += ["", "Time of a run, training alone: "]
    timed = [r for r in records if r.get("whole", True)]  # of one that went on, the first part is not known
    out[-1] += "; ".join(f"`{r['system']}` {r['seed']}: {r['cpu']:.0f} s of one core" for r in timed) + "."
    out += ["", *(f"Made on {line}" for line in sorted({kept.origin(r) for r in records}))]
    return "\n".join(out) + "\n"


HEAD = """# Systems that go in rounds, on the small world

Made by `python -m benchmarks.systems.rounds` from `benchmarks/results/systems-rounds.jsonl`; every run is in the tables.
`benchmarks/systems/declared-rounds.md` says what was expected and how it is measured, committed before the runs; settings were
looked at on seed 10, those of `sppo` and `dno` taken from other recipes unseen. Intervals are 95 % bootstraps by prompt over all
seeds; one that contains its bound is *not shown at this scale*.

![gold by round](../images/rounds.png)
"""


def plot(records: Sequence[dict[str, Any]]) -> None:
    """Gold of each system's policies in order, a line a seed, and their mean."""
    figure = Figure(figsize=(13, 2.9), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, system in zip(figure.subplots(1, len(MEASURED), sharey=True), MEASURED, strict=True):
        names = [n for n in MEASURED[system] if not n.startswith("dpo_") and n != "adamw"]
        rows = [[numbers(r)[n]["gold"].mean() for n in names] for r in records if r["system"] == system]
        for row in rows:
            axes.plot(row, color="#57606a", linewidth=0.8, alpha=0.6)
        if rows:
            axes.plot(np.mean(rows, axis=0), color="#1f6feb", linewidth=2, marker="o", markersize=4)
        axes.set_xticks(range(len(names)), names, rotation=60, fontsize=8)
        axes.set_title(f"{system} ({len(rows)} seeds)", fontsize=10)
        axes.grid(alpha=0.25)
    figure.supylabel("gold total, held-out prompts", fontsize=9)
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, dpi=110)


def main() -> None:
    """Make what is missing, then the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--systems", nargs="+", default=list(MEASURED), choices=list(MEASURED))
    parser.add_argument("--page", action="store_true", help="only write the page")
    parser.add_argument("--name", default=NAME, help="another file of results, for pilots")
    parser.add_argument("--folder", help="where runs are kept, so that one that was cut off goes on")
    given = parser.parse_args()
    for seed in [] if given.page else given.seeds:
        for system in given.systems:
            if not any(r["system"] == system and r["seed"] == seed for r in kept.read(given.name)):
                with tempfile.TemporaryDirectory() as folder:
                    place = Path(given.folder or folder) / f"{system}-{seed}"
                    record = kept.append(given.name, one(system, seed, place))
                means = {name: round(float(np.mean(found["gold"])), 3) for name, found in record["policies"].items()}
                print(system, seed, f"{record['cpu']:.0f} s", means, flush=True)
    if given.name == NAME and (records := [r for r in kept.read(NAME) if r["seed"] in SEEDS]):
        PAGE.write_text(page(records))
        plot(records)


if __name__ == "__main__":
    main()
