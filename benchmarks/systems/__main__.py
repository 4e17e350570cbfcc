"""Run ``rso``, ``slic_hf`` and ``spin`` on the small world over seeds and write what was declared: ``python -m benchmarks.systems``.

Every run appends a line to ``benchmarks/results/systems.jsonl``; lines that are there are not made again. Gold scores are read
here alone, never in training.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from posttrain.data import read, smallworld
from posttrain.data.collate import prompt_ids
from posttrain.evals.statistics import cluster_bootstrap, paired_bootstrap
from posttrain.graph import override
from posttrain.models.load import load_policy, load_tokenizer
from posttrain.registry import RECIPES
from posttrain.rewards.builders import draws, score
from posttrain.rewards.selection import statistical_rejection
from posttrain.rollout.engine import Request, Sampling
from posttrain.rollout.local import LocalEngine
from posttrain.runner import run_recipe
from posttrain.types import Example, Message

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "systems.jsonl"
PAGE = ROOT / "docs" / "systems" / "self-made-pairs.md"
START, END = "<!-- made by python -m benchmarks.systems -->\n", "<!-- end -->"
SEEDS = (0, 1, 2)
LIMIT = 20.5
"""The 99.9 % point of chi-square with 5 degrees of freedom."""
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "rso": {"policy": {"lr": 3e-4, "epochs": 2.0}},
    "slic_hf": {"policy": {"lr": 1e-4}},
    "spin": {f"policy{k}": {"lr": 3e-4, "epochs": 2.0} for k in range(3)},
}
LAST = {"rso": "policy", "slic_hf": "policy", "spin": "policy2"}
PROMPTS, SAMPLES = 64, 4


def gold_of(directory: Path, seed: int) -> np.ndarray:
    """Gold totals of a policy's samples on held-out prompts, ``[PROMPTS, SAMPLES]``; every policy gets the same draws."""
    tokenizer = load_tokenizer(str(directory))
    rows = smallworld.task_prompts(PROMPTS, seed=100 + seed, split="heldout")
    examples = [Example(prompt=(Message(role="user", content=row["prompt"]),)) for row in rows]
    ids, _ = prompt_ids(tokenizer, examples, max_length=256)
    requests = [Request(tuple(p), (seed, "gold", i, k)) for i, p in enumerate(ids) for k in range(SAMPLES)]
    model = load_policy(str(directory), dtype=torch.float32)
    engine = LocalEngine(model, frozenset({tokenizer.convert_tokens_to_ids("<|end|>")}), slots=64)
    found = engine.generate(requests, Sampling(max_new_tokens=32))
    texts = [tokenizer.decode(r.ids, skip_special_tokens=True) for r in found]
    totals = [smallworld.gold(rows[i // SAMPLES]["prompt"], t).total if t.strip() else 0.0 for i, t in enumerate(texts)]
    return np.array(totals).reshape(PROMPTS, SAMPLES)


def acceptance(file: Path, seed: int, beta: float = 0.5) -> dict[str, float]:
    """How rejection sampling took the run's own candidates: mean scores, and a chi-square against the exact chances.

    Different candidates are taken two by two, and of each two one is accepted: where the worse stands first, the better is
    with chance ``1 - exp(-gap / beta)``, the law of one pass. The statistic is over five ranges of that chance.
    """
    hits, chances, taken, given = [], [], [], []
    for example in read(file):
        scores = {r.text: score(r) for r in example.responses}
        values = list(scores.values())
        given.append(float(np.mean(values)))
        accepted = statistical_rejection(
            list(scores), values, draws(seed, "acceptance", example.prompt_key), samples=min(4, len(values)), beta=beta
        )
        taken.append(float(np.mean([values[i] for i in accepted])))
        for a, b in zip(values[::2], values[1::2], strict=False):
            if a < b:
                chances.append(1 - np.exp((a - b) / beta))
                key = draws(seed, "pair", example.prompt_key, len(chances))
                hits.append(statistical_rejection([0, 1], [a, b], key, samples=1, beta=beta)[0] == 1)
    chance, hit = np.array(chances), np.array(hits)
    bins = np.minimum((chance * 5).astype(int), 4)
    chi = sum(
        (hit[bins == k].sum() - chance[bins == k].sum()) ** 2 / (chance[bins == k] * (1 - chance[bins == k])).sum()
        for k in range(5)
        if (bins == k).sum() >= 5
    )
    return {
        "accepted": float(np.mean(taken)),
        "candidates": float(np.mean(given)),
        "chi2": float(chi),
        "pairs": len(hit),
    }


def one(recipe: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train and measure one seed."""
    chosen = override(RECIPES[recipe](), CHANGES[recipe])
    quiet = Console(file=StringIO(), width=160)
    run = run_recipe(
        chosen, root=folder, name=f"{recipe}-{seed}", until=LAST[recipe], console=quiet, seed=seed, tiny=True
    )
    before, after = gold_of(run / "sft", seed), gold_of(run / LAST[recipe], seed)
    gain = paired_bootstrap(after.ravel(), before.ravel(), np.repeat(np.arange(PROMPTS), SAMPLES))
    line: dict[str, Any] = {"recipe": recipe, "seed": seed, "sft": before.mean(), "policy": after.mean()}
    line |= {"gain": gain.mean, "low": gain.low, "high": gain.high}
    line["per_prompt"] = (after - before).mean(1).tolist()
    if recipe == "rso":
        line |= acceptance(run / "scored/data/samples.jsonl", seed)
    return line


def table(lines: list[dict[str, Any]]) -> str:
    """The lines as a page's tables: each seed, and what was declared with what was found over all seeds."""
    out = ["| recipe | seed | gold after SFT | gold after | gain [95 %] |", "|---|---|---|---|---|"]
    row = "| {recipe} | {seed} | {sft:.3f} | {policy:.3f} | {gain:+.3f} [{low:+.3f}, {high:+.3f}] |"
    out += [row.format(**x) for name in CHANGES for x in lines if x["recipe"] == name]
    out += ["", "| recipe | expected | found | |", "|---|---|---|---|"]
    for name in CHANGES:
        mine = [x for x in lines if x["recipe"] == name]
        if mine:
            gains = np.concatenate([x["per_prompt"] for x in mine])
            whole = cluster_bootstrap(gains, np.arange(len(gains)))
            found = f"{whole.mean:+.3f} [{whole.low:+.3f}, {whole.high:+.3f}]"
            out.append(f"| {name} | gold above the SFT policy's | {found} | {verdict(whole.low > 0, mine)} |")
    sampled = [x for x in lines if "chi2" in x]
    if sampled:
        above = [x["accepted"] - x["candidates"] for x in sampled]
        said, shown = ", ".join(f"{x:+.2f}" for x in above), verdict(min(above) > 0, sampled)
        out.append(f"| rso | accepted candidates score above all, each seed | {said} | {shown} |")
        fit, pairs = [x["chi2"] for x in sampled], ", ".join(str(x["pairs"]) for x in sampled)
        said, shown = ", ".join(f"{x:.1f}" for x in fit), verdict(max(fit) < LIMIT, sampled)
        out.append(f"| rso | chi-square of {pairs} choices below {LIMIT}, each seed | {said} | {shown} |")
    return "\n".join(out) + "\n"


def verdict(shown: bool, lines: list[dict[str, Any]]) -> str:
    """A finding in words, once all declared seeds are there."""
    if len(lines) < len(SEEDS):
        return f"{len(lines)} of {len(SEEDS)} seeds so far"
    return "shown" if shown else "not shown at this scale"


def page(lines: list[dict[str, Any]]) -> str:
    """The page with the table of these lines between its marks."""
    before, rest = PAGE.read_text().split(START)
    return before + START + table(lines) + END + rest.split(END)[1]


def kept(file: Path = RESULTS) -> list[dict[str, Any]]:
    """What was measured, by recipe and seed."""
    lines = [json.loads(x) for x in file.read_text().splitlines()] if file.exists() else []
    found = {(list(CHANGES).index(x["recipe"]), x["seed"]): x for x in lines}
    return [found[key] for key in sorted(found)]


def main() -> None:
    """Make what is missing, then print the table and put it into the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--recipes", nargs="+", default=list(CHANGES))
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    known = kept(given.out)
    for seed in given.seeds:
        for recipe in given.recipes:
            if not any(x["recipe"] == recipe and x["seed"] == seed for x in known):
                with tempfile.TemporaryDirectory() as folder:
                    known.append(one(recipe, seed, Path(folder)))
                with given.out.open("a") as file:
                    file.write(json.dumps(known[-1]) + "\n")
                print({k: v for k, v in known[-1].items() if k != "per_prompt"}, flush=True)
    print(table(kept(given.out)))
    if given.out == RESULTS:
        PAGE.write_text(page(kept()))


if __name__ == "__main__":
    main()
