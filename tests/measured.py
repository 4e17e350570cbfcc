"""A recipe whose stages measure instead of training, for the tests of manifest, diff, rerun and sweep.

Values follow from the fields and the seed alone; ``time/step`` is another one every time.
"""

from __future__ import annotations

import io
import json
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from rich.console import Console

from posttrain.errors import CheckError, ConfigError
from posttrain.evals.results import closing_results, machine_section, policy_section, write_results
from posttrain.runner import run_recipe
from posttrain.stages import Context, Recipe, Stage

ROWS = 12
RUNS = Path("runs")


@dataclass(frozen=True, kw_only=True)
class Start(Stage):
    """Writes ``size`` bytes, and a line in ``calls.txt``."""

    data: str = ""
    size: int = 4
    WORK: ClassVar[str] = "measured:write"
    TINY: ClassVar[Mapping[str, Any]] = {"size": 2}

    def files(self) -> list[Path]:
        if self.data and not Path(self.data).exists():
            raise ConfigError(f"can't read the data file '{self.data}'")
        return [Path(self.data)] if self.data else []


def write(stage: Start, ctx: Context) -> None:
    """As many zeros as the stage is large."""
    called(ctx)
    (ctx.dir / "model.safetensors").write_bytes(bytes(stage.size))


@dataclass(frozen=True, kw_only=True)
class Tune(Stage):
    """Logs ``steps`` steps of a loss that falls with ``beta``; a ``beta`` above 1 fails."""

    model: Stage
    beta: float = 0.1
    effect: float = 1.0
    steps: int = 3
    betas: tuple[float, ...] = (0.9, 0.99)

    def files(self) -> list[Path]:
        return []

    def run(self, ctx: Context) -> None:
        called(ctx)
        if self.beta > 1:
            raise CheckError(f"beta {self.beta} blew up;\nexpected less")
        draw = random.Random(ctx.seed)
        lines = []
        for step in range(self.steps):
            loss = draw.random() - self.effect * self.beta * step
            lines.append({"step": step, "loss/nll": loss, "optim/lr": 0.5, "time/step": time.perf_counter()})
        (ctx.dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (ctx.dir / "model.safetensors").write_bytes(str((self.beta, ctx.seed)).encode())


@dataclass(frozen=True, kw_only=True)
class Measure(Stage):
    """Scores two policies on held-out prompts: ``tuned`` gains ``effect * beta``; seeds and prompts add their own."""

    tune: Tune
    rows: bool = True

    def files(self) -> list[Path]:
        return []

    def run(self, ctx: Context) -> None:
        called(ctx)
        hard = np.random.default_rng(7).normal(size=(ROWS, 1))
        own = 0.02 * np.random.default_rng([ctx.seed, round(1000 * self.tune.beta)]).normal(size=(ROWS, 1))
        luck = np.random.default_rng(ctx.seed).normal()
        tuned = hard + luck + own + self.tune.effect * self.tune.beta
        policy = policy_section(
            {"start": {"reward": hard}, "tuned": {"reward": tuned}}, seconds={"start": time.time(), "tuned": 1.0}
        )
        machine = machine_section(device="cpu", threads=1, fp32_gflops=time.perf_counter(), bf16_gflops=1.0)
        results = closing_results(machine=machine, policy=policy)
        write_results(
            results if self.rows else {k: v for k, v in results.items() if k != "rows"}, ctx.dir / "results.json"
        )


def called(ctx: Context) -> None:
    """Keep that a stage ran."""
    with (ctx.dir.parent.parent / "calls.txt").open("a") as log:
        log.write(f"{ctx.dir.parent.name}/{ctx.dir.name}\n")


def measured(data: str = "", effect: float = 1.0, rows: bool = True) -> Recipe:
    """Three stages: one that is the same for every beta, one that reads it, one that measures."""
    start = Start(data=data)
    tune = Tune(model=start, effect=effect)
    return Recipe("measured", {"start": start, "tune": tune, "measure": Measure(tune=tune, rows=rows)}, "measures")


def go(name: str, recipe: Recipe | None = None, **options: Any) -> Path:
    """Run a recipe in ``runs/NAME`` without a word, the measured one if None."""
    return run_recipe(recipe or measured(), root=RUNS, name=name, console=Console(file=io.StringIO()), **options)


def calls(runs: Path) -> list[str]:
    """Return the stages that ran, in order, and forget them."""
    path = runs / "calls.txt"
    found = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return found
