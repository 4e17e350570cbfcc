"""Does merging at every step keep old skills at equal reward? ``python -m benchmarks.merging`` runs what is missing, writes the page.

Arms, sizes, seeds, numbers and expected directions stand here, committed before any reported run.
Rate and sizes were chosen on seed 100 with AdamW alone; alpha and keep were set without a trial.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from posttrain.data import smallworld
from posttrain.data.collate import prompt_ids, ranking_rows
from posttrain.data.smallworld_language import OPENINGS, TASKS, Draw
from posttrain.evals.statistics import paired_test
from posttrain.models.load import find_model, load_policy, load_tokenizer
from posttrain.models.policy import Model
from posttrain.models.stored import open_model
from posttrain.rollout.engine import Request, Sampling
from posttrain.rollout.local import LocalEngine
from posttrain.train.loop import Run, fit
from posttrain.train.objectives import Preference
from posttrain.train.online_merging import OnlineMerge, task_vectors
from posttrain.train.optim import Optim
from posttrain.train.reference import row_logp
from posttrain.train.sources import ranking_source
from posttrain.types import Example, Message, Response

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "benchmarks" / "results" / "merging-small.jsonl"
PAGE = ROOT / "docs" / "results" / "merging.md"
SEEDS = (0, 1, 2)
GIVEN = {
    "pairs": 192,
    "per_step": 16,
    "steps": 60,
    "every": 60,
    "prompts": 330,
    "beta": 0.1,
    "warmup": 5,
}
ARMS: dict[str, dict[str, Any]] = {
    "adamw": {"rule": "none", "lr": 3e-4},
    "adamw, half the rate": {"rule": "none", "lr": 1.5e-4},
    "ondare": {"rule": "ondare", "lr": 3e-4, "alpha": 1e-4, "keep": 0.5},
    "onties": {"rule": "onties", "lr": 3e-4, "alpha": 1e-4, "keep": 0.5},
}
COLUMNS = ("reward", "new", "old")
CLAIMS = (  # number, arm, against, the difference lies above this
    ("reward", "ondare", "adamw", -0.05, "`ondare` earns the reward of `adamw`, to 0.05"),
    ("reward", "onties", "adamw", -0.05, "`onties` earns the reward of `adamw`, to 0.05"),
    ("old", "ondare", "adamw", 0.0, "`ondare` keeps more of the old skill than `adamw`"),
    ("old", "onties", "adamw", 0.0, "`onties` keeps more of the old skill than `adamw`"),
    ("old", "ondare", "adamw, half the rate", 0.0, "and more than AdamW with steps as short as its own"),
)
NEW = ("describe", "advise", "rewrite")
"""Kinds of request that the pairs are of: chosen is a right answer with an opening, rejected the same without."""


def example(prompt: str, *answers: str) -> Example:
    """A prompt, with answers from best to worst."""
    responses = tuple(Response(messages=(Message(role="assistant", content=a),), rank=k) for k, a in enumerate(answers))
    return Example(prompt=(Message(role="user", content=prompt),), responses=responses)


def pairs(count: int, seed: int) -> list[Example]:
    """Pairs of a polite and a bare right answer, of the training contents of the new kinds."""
    found = []
    for k, row in enumerate(smallworld.task_prompts(8 * count, 1000 + seed)):
        if row["kind"] in NEW and len(found) < count:
            kind, fields = smallworld.parse(row["prompt"])
            draw = Draw("merging", seed, k)
            core = draw.pick(TASKS[kind].cores(fields)) + "."
            found.append(example(row["prompt"], f"{draw.pick(OPENINGS)} {core}", core))
    return found


class Meter:
    """Measures a policy on held-out prompts, greedily: politeness on the new kinds, helpfulness on all others."""

    def __init__(self, tokenizer: Any, prompts: int) -> None:
        self.tokenizer = tokenizer
        self.rows = smallworld.task_prompts(prompts, 77, "heldout")
        self.ids = prompt_ids(tokenizer, [example(r["prompt"]) for r in self.rows], max_length=512)[0]
        self.new = np.array([row["kind"] in NEW for row in self.rows])

    def __call__(self, policy: Model) -> tuple[float, float, float]:
        """Share of polite answers to the new kinds, their helpfulness, and helpfulness on the others."""
        engine = LocalEngine(policy, frozenset([self.tokenizer.eos_token_id]), 128)
        requests = [Request(tuple(ids), (0, "meter", k)) for k, ids in enumerate(self.ids)]
        out = engine.generate(requests, Sampling(max_new_tokens=32, temperature=0.0))
        texts = [self.tokenizer.decode(o.ids, skip_special_tokens=True) for o in out]
        gold = [smallworld.gold(row["prompt"], text) for row, text in zip(self.rows, texts, strict=True)]
        polite, helps = np.array([g.format >= 0.99 for g in gold]), np.array([g.helpfulness for g in gold])
        return float(polite[self.new].mean()), float(helps[self.new].mean()), float(helps[~self.new].mean())


def train(arm: dict[str, Any], seed: int, given: dict[str, Any]) -> list[list[float]]:
    """Direct preference optimisation of the small model; rows of step, and what `Meter` says, from step 0."""
    torch.manual_seed(seed)
    base, start = find_model("small-base").path, find_model("small").path
    tokenizer = load_tokenizer(start)
    rows = ranking_rows(tokenizer, pairs(given["pairs"], seed), max_length=512)[0]
    policy = load_policy(start, dtype=torch.float32, train=True, seed=seed)
    reference = replace(policy, trained=False)
    source = ranking_source(
        rows,
        [[0, 1]] * len(rows),
        per_step=given["per_step"],
        seed=seed,
        ref_logp=row_logp(reference, rows, max_tokens=2048),
    )
    merge = None
    if arm["rule"] != "none":
        task = task_vectors(policy.parameters(), open_model(base), arm["rule"], arm["keep"])
        merge = OnlineMerge(rule=arm["rule"], alpha=arm["alpha"], keep=arm["keep"], task={"policy": task}, seed=seed)
    meter = Meter(tokenizer, given["prompts"])
    trail = [[0.0, *meter(policy)]]

    def hook(step: int, _: Any) -> None:
        if (step + 1) % given["every"] == 0:
            trail.append([step + 1.0, *meter(policy)])

    with tempfile.TemporaryDirectory() as folder:
        run = Run(
            directory=Path(folder),
            steps=given["steps"],
            max_tokens=4096,
            save_every=10_000,
            console=Console(file=StringIO()),
        )
        optim = Optim(lr=arm["lr"], warmup_steps=given["warmup"], merge=merge)
        objective = Preference("dpo", {"beta": given["beta"]})
        fit({"policy": policy}, objective, source, optim=optim, run=run, hooks=[hook])
    return trail


def runs() -> dict[tuple[str, int], dict[str, Any]]:
    """Runs that are finished, by arm and seed; of one that was done twice, the first."""
    lines = [json.loads(line) for line in RUNS.read_text().splitlines()] if RUNS.exists() else []
    return {(run["arm"], run["seed"]): run for run in reversed(lines)}


def complete(names: Sequence[str]) -> None:
    """Run what is missing of some arms, and append each run as it ends."""
    RUNS.parent.mkdir(parents=True, exist_ok=True)
    for seed in SEEDS:
        for name in names:
            if (name, seed) in runs():
                continue
            arm = ARMS[name]
            began = time.process_time()
            first, *_, last = train(arm, seed, GIVEN)
            row = {"arm": name, "seed": seed, "settings": arm | GIVEN, "seconds": round(time.process_time() - began, 1)}
            row |= {
                "start": dict(zip(COLUMNS, first[1:], strict=True)),
                "end": dict(zip(COLUMNS, last[1:], strict=True)),
            }
            with RUNS.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


def page(found: dict[tuple[str, int], dict[str, Any]]) -> str:
    """The page: every run, and each claim with its interval over seeds."""
    done = [seed for seed in SEEDS if all((arm, seed) in found for arm in ARMS)]
    lines = [
        INTRO,
        "| arm | seed | reward | helpfulness, new kinds | helpfulness, other kinds | CPU s |",
        "|---|---|---|---|---|---|",
    ]
    starts = [run["start"] for run in found.values()]
    if starts:
        lines.append("| start | | " + " | ".join(f"{starts[0][c]:.3f}" for c in COLUMNS) + " | |")
    for (arm, seed), run in sorted(found.items(), key=lambda item: (list(ARMS).index(item[0][0]), item[0][1])):
        lines.append(
            f"| {arm} | {seed} | " + " | ".join(f"{run['end'][c]:.3f}" for c in COLUMNS) + f" | {run['seconds']} |"
        )
    if len(done) < 2:
        return "\n".join([*lines, "", "Not measured yet: fewer than two seeds have all their arms."]) + "\n"
    counted = f"{len(done)} of {len(SEEDS)} declared seeds"
    lines += ["", f"Differences over {counted}, paired by seed, 95 % intervals (bootstrap, widened for few seeds):", ""]
    lines += ["| expected | difference | interval | |", "|---|---|---|---|"]
    for number, arm, against, bound, says in CLAIMS:
        one, two = ([found[name, seed]["end"][number] for seed in done] for name in (arm, against))
        interval, _ = paired_test(one, two)
        shown = (
            "shown"
            if interval.low > bound
            else ("the opposite is shown" if interval.high < bound else "not shown at this scale")
        )
        lines.append(f"| {says} | {interval.mean:+.4f} | [{interval.low:+.4f}, {interval.high:+.4f}] | {shown} |")
    return "\n".join(lines) + "\n"


INTRO = """# Merging at every step, on the small model

Made by `python -m benchmarks.merging`, in which arms, sizes, seeds and expected directions were committed before the first run.
Rate and sizes were chosen with AdamW alone on seed 100, which is not reported; alpha and keep were set without a trial.

The small instruct model (the start; its base is the small base) learns by DPO from {pairs} pairs of a polite and a bare right
answer, of three of eleven kinds of request: {steps} steps of {per_step} pairs. Measured at the end, greedily, on {prompts} held-out
prompts: the *reward*, the share of polite answers to those three kinds; their gold helpfulness; and the *old skill*, gold helpfulness of
the answers to the other eight kinds, of which no pair was seen. `ondare` and `onties` have alpha {alpha:g}, keep {keep:g} and the rate
{lr:g} of `adamw`; since half of every step is dropped, AdamW at half the rate stands beside them.
""".format(**GIVEN, **{k: ARMS["ondare"][k] for k in ("alpha", "keep", "lr")})


if __name__ == "__main__":
    complete(sys.argv[1:] or list(ARMS))
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page(runs()))
    print(f"wrote {PAGE.relative_to(ROOT)}")
