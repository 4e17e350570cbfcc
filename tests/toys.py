"""Stages that count instead of training, for the tests of the runner and the command line."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from posttrain.errors import ConfigError
from posttrain.stages import Context, Plan, Recipe, Stage


@dataclass(frozen=True, kw_only=True)
class Count(Stage):
    """Adds ``rate`` a step to its inputs' totals; each step is kept; ``fault`` strikes once, at ``at``."""

    start: Stage | None = None
    others: tuple[Stage, ...] = ()
    steps: int = 3
    rate: float = 1.0
    label: str | None = None
    flip: bool = False
    mode: Literal["up", "down"] = "up"
    betas: tuple[float, ...] = (0.9, 0.99)
    data: str = ""
    fault: str = ""
    at: int = 0

    def files(self) -> list[Path]:
        return [Path(self.data)] if self.data else []

    def check(self) -> None:
        if self.label == "nobody":
            raise ConfigError("unknown label 'nobody'; expected somebody")

    def plan(self) -> Plan:
        return Plan(rows=10, tokens=1_200_000, flops=3e12 * self.steps, memory=2.0 * 1024**3, note="counts")

    def run(self, ctx: Context) -> None:
        kept = ctx.dir / "checkpoints" / "step.json"
        state = {"step": 0, "total": sum(total(path) for path in ctx.inputs.values())}
        if kept.exists():
            state = json.loads(kept.read_text())
        with (ctx.dir.parent / "calls.txt").open("a") as log:
            log.write(f"{ctx.dir.name} from {state['step']}\n")
        while state["step"] < self.steps:
            struck = ctx.dir / "checkpoints" / "struck"
            if self.fault and state["step"] == self.at and not struck.exists():
                struck.parent.mkdir(exist_ok=True)
                struck.touch()
                strike(self.fault)
            state = {"step": state["step"] + 1, "total": state["total"] + self.rate * (1 + ctx.seed)}
            kept.parent.mkdir(exist_ok=True)
            kept.write_text(json.dumps(state))
        (ctx.dir / "total.json").write_text(json.dumps(state["total"]))


def total(path: Path) -> float:
    """Read what a finished stage counted."""
    return json.loads((path / "total.json").read_text())


def strike(fault: str) -> None:
    """Do what stops a stage."""
    if fault in ("sigint", "sigterm", "kill"):
        name = {"sigint": signal.SIGINT, "sigterm": signal.SIGTERM, "kill": signal.SIGKILL}[fault]
        os.kill(os.getpid(), name)
        time.sleep(30)
    raise {
        "ctrl-c": KeyboardInterrupt(),
        "disk": OSError(28, "No space left on device"),
        "memory": MemoryError(),
        "torch": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        "bug": ZeroDivisionError("a bug"),
        "config": ConfigError("a name that\nnobody knows"),
    }[fault]


def chain(model: str = "toy", data: str = "default", width: int = 2, fault: str = "", data_file: str = "") -> Recipe:
    """Three stages: the last reads the second and, in a tuple, the first two."""
    if model != "toy":
        raise ConfigError(f"unknown model '{model}'; did you mean 'toy'?")
    if data != "default":
        raise ConfigError(f"unknown data '{data}'; did you mean 'default'?")
    first = Count(steps=width, data=data_file)
    second = Count(start=first, fault=fault, at=1)
    last = Count(start=second, others=(first, second), steps=1)
    return Recipe("chain", {"first": first, "second": second, "last": last}, "counts [three] times")
