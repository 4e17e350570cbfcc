"""Every preference loss on the same rows with several seeds: runs appended to a JSONL file, one process, models loaded once."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.preference import lab as lab_module
from benchmarks.preference.lab import Lab, Setting, append, each, finished, from_rows, measured, scored, single, train
from benchmarks.preference.targets import losses

from posttrain.data import read, smallworld
from posttrain.data.load import resolve_data
from posttrain.losses import find_loss, listwise_losses, unpaired_losses, valued_losses
from posttrain.models.lora import Lora
from posttrain.types import Example

RESULTS = Path(__file__).parents[1] / "results"
SCORE_SCALE = 8.0
"""Gold scores are between 0 and 1; times this, gaps are log-odds of a size that a judge might give."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A table: model, losses, how long, on what; ``rows(seed)`` to train on, ``held()`` to measure on.

    Setting and sizes were chosen on seed 100, with twelve of the losses; every loss has its own default options.
    """

    model: str
    losses: tuple[str, ...]
    setting: Setting
    rows: Callable[[int], list[Example]]
    held: Callable[[], list[Example]]
    lora: Lora | None = None
    max_new_tokens: int = 40
    world: bool = True
    about: str = ""

    @property
    def file(self) -> Path:
        """Where its runs are."""
        return RESULTS / f"preference-{self.model}.jsonl"


def small_rows(seed: int) -> list[Example]:
    """128 rankings of four answers, others for every seed, each answer with its scaled gold score."""
    return scored(from_rows(smallworld.rankings(128, seed=seed)), SCORE_SCALE)


def small_held() -> list[Example]:
    """64 rankings of contents that no training row has: the best answer against the three others."""
    rows = from_rows(smallworld.rankings(64, seed=0, split="heldout"))
    return best_first(rows)


def best_first(examples: Sequence[Example]) -> list[Example]:
    """Rankings in which the best answer stands before all others, and these are tied."""
    return [replace(e, responses=tuple(replace(r, rank=min(r.rank or 0, 1)) for r in e.responses)) for e in examples]


def best_and_another(examples: Sequence[Example]) -> list[Example]:
    """Pairs: the best answer and, from row to row in turn, one of the others."""
    out = []
    for i, example in enumerate(examples):
        order = sorted(example.responses, key=lambda r: r.rank or 0)
        pair = (order[0], order[1 + i % (len(order) - 1)])
        out.append(replace(example, responses=tuple(replace(r, rank=k) for k, r in enumerate(pair))))
    return out


def default_rows(part: str, count: int) -> list[Example]:
    """Rankings of the default data; less its rank is an answer's score."""
    found = read(resolve_data("default")[part])[:count]
    return [
        replace(e, responses=tuple(replace(r, score=-float(r.rank or 0), failure=None) for r in e.responses))
        for e in found
    ]


PLANS = {
    "small": Plan(
        model="small-base",
        losses=tuple(losses()),
        setting=Setting(lr=5e-4, epochs=1),
        rows=small_rows,
        held=small_held,
        about="the small base model (1.8M parameters, all trained), 128 pairs a seed (rankings of four for losses of lists), 16 steps of 8",
    ),
    "smollm2": Plan(
        model="smollm2",
        losses=("dpo", "ipo", "simpo", "orpo", "kto", "tdpo2", "dpop", "reward_aware_po"),
        setting=Setting(lr=2e-4, epochs=1),
        rows=lambda seed: default_rows("rankings", 96),
        held=lambda: best_and_another(default_rows("heldout_rankings", 32)),
        lora=Lora(rank=16, alpha=32),
        max_new_tokens=32,
        world=False,
        about="SmolLM2-135M-Instruct with LoRA of rank 16, 96 pairs of the default data, 12 steps of 8",
    ),
}


def data_for(loss: str, examples: list[Example]) -> list[Example]:
    """Rankings as a loss reads them: whole, or the best answer and another, or these two apart as good and bad, or all rated."""
    kind = find_loss(loss)
    if kind is listwise_losses:
        return examples
    if kind is valued_losses:
        return each(examples)
    return single(best_and_another(examples)) if kind is unpaired_losses else best_and_another(examples)


def attempt(plan: Plan, names: Sequence[str]) -> None:
    """Eight rows of seed 100 through every step of a run, printed and not kept: whether it works, and how long it takes."""
    lab = Lab(plan.model, lora=plan.lora, max_new_tokens=8)
    held = lab.held(plan.held()[:4])
    few = replace(plan, rows=lambda seed: plan.rows(seed)[:8])
    for loss in names:
        row = one(lab, few, held, loss, 100)
        print(f"{loss}: {row['cpu']:.1f} s of the processor, {row['memory']:.0f} MiB, {row['numbers']}", flush=True)


def run(plan: Plan, seeds: Sequence[int], names: Sequence[str], budget: float | None) -> None:
    """Make the runs that are missing, seed by seed; with ``budget`` seconds spent, stop before the next run."""
    began = time.perf_counter()
    done = {(row["loss"], row["seed"]) for row in finished(plan.file)}
    wanted = [(loss, seed) for seed in seeds for loss in ("start", *names) if (loss, seed) not in done]
    print(f"{plan.file}: {len(done)} runs there, {len(wanted)} missing")
    if not wanted:
        return
    lab = Lab(plan.model, lora=plan.lora, max_new_tokens=plan.max_new_tokens)
    held = lab.held(plan.held())
    for loss, seed in wanted:
        if budget is not None and time.perf_counter() - began > budget:
            print("out of time; the same command goes on")
            return
        row = one(lab, plan, held, loss, seed)
        append(plan.file, row)
        print(
            f"{loss} seed {seed}: {row['cpu']:.1f} s of the processor, accuracy {row['numbers']['accuracy']:.3f}",
            flush=True,
        )


def one(lab: Lab, plan: Plan, held: Any, loss: str, seed: int) -> dict[str, Any]:
    """One run and its numbers; "start" trains nothing."""
    began = time.process_time()
    if loss == "start":
        numbers, spent, clock = measured(lab, lab.reference, held, seed=seed, world=plan.world), 0.0, 0.0
        last: Mapping[str, float] = {}
    else:
        found = train(lab, loss, data_for(loss, plan.rows(seed)), seed=seed, setting=plan.setting)
        numbers = measured(lab, found.policy, held, seed=seed, world=plan.world)
        spent, clock, last = found.cpu, found.clock, found.metrics[-1]
    return {
        "loss": loss,
        "seed": seed,
        "numbers": numbers,
        "last": {k: v for k, v in last.items() if k.startswith(("loss/", "kl/", "logratio/", "reward/"))},
        "setting": asdict(plan.setting),
        "cpu": time.process_time() - began,
        "training": spent,
        "clock": clock,
        "memory": lab_module.peak_memory(),
    }


def main(arguments: Sequence[str]) -> None:
    """``python -m benchmarks.preference run small|smollm2``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preference run", description=__doc__)
    parser.add_argument("plan", choices=PLANS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--losses", nargs="+")
    parser.add_argument("--budget", type=float, help="seconds after which no further run begins")
    parser.add_argument("--try", action="store_true", dest="attempt", help="eight rows, printed and not kept")
    given = parser.parse_args(arguments)
    plan = PLANS[given.plan]
    if given.attempt:
        return attempt(plan, given.losses or plan.losses)
    run(plan, given.seeds, given.losses or plan.losses, given.budget)
