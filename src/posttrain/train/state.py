"""All that shapes a run's future, in one place: what a checkpoint holds besides tensors, and going on from one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.markup import escape

from posttrain.train.checkpoint import Checkpoint, Unusable, newest_checkpoint
from posttrain.train.optim import MasterAdamW
from posttrain.train.streams import random_streams, restore_streams

FORMAT = 2
"""Of ``state.json``."""


class Stateful(Protocol):
    """A source or objective whose future depends on more than the step."""

    def state(self) -> Any:
        """JSON state."""
        ...

    def load_state(self, state: Any) -> None:
        """Restore it; raises `posttrain.train.checkpoint.Unusable` where something that it needs is gone."""
        ...


def capture(source: Stateful, objective: Any, lines: int) -> dict[str, Any]:
    """Everything but tensors, as JSON; ``lines`` is the length of ``metrics.jsonl`` in bytes.

    Weights, masters and moments are the optimiser's tensors; the schedule follows from the step.
    """
    return {
        "format": FORMAT,
        "source": source.state(),
        "objective": objective.state() if hasattr(objective, "state") else None,
        "streams": random_streams(),
        "metrics": lines,
        "machine": machine(),
    }


def restore(
    directory: Path, title: str, steps: int, optimizer: MasterAdamW, source: Stateful, objective: Any, console: Console
) -> tuple[int, int]:
    """Go on from the newest checkpoint that can be used; returns its step (0: none) and the length of ``metrics.jsonl``.

    What is wrong with newer ones is printed, and so is a machine on which the last bits may differ.
    """

    def accept(found: Checkpoint) -> None:
        if found.state.get("format") != FORMAT:
            raise Unusable(f"state.json has format {found.state.get('format')}, expected {FORMAT}")
        source.load_state(found.state["source"])

    found, faults = newest_checkpoint(directory, accept)
    for fault in faults:
        console.print(f"[yellow]{title}: {escape(fault)}[/]", soft_wrap=True)
    if found is None:
        return 0, 0
    optimizer.load(found.tensors)
    if hasattr(objective, "load_state"):
        objective.load_state(found.state["objective"])
    restore_streams(found.state["streams"])
    console.print(f"[dim]{title}: continuing after step {found.step} of {steps}[/]")
    changed = [f"{k} was {v}, is {machine()[k]}" for k, v in found.state["machine"].items() if v != machine()[k]]
    if changed:
        console.print(f"[yellow]{title}: {'; '.join(changed)}: the last bits of results may differ[/]")
    if found.step >= steps:
        console.print(f"[dim]{title}: all {steps} steps are done; nothing is trained[/]")
    return found.step, found.state["metrics"]


def machine() -> dict[str, Any]:
    """What besides the library's input decides the last bits of a sum."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
