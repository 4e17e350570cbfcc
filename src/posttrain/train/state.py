"""All that shapes a run's future, in one place: what a checkpoint holds besides tensors, and going on from one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.markup import escape

from posttrain.errors import CheckError
from posttrain.train.checkpoint import Checkpoint, Unusable, newest_checkpoint
from posttrain.train.distributed import world
from posttrain.train.optim import MasterAdamW
from posttrain.train.streams import random_streams, restore_streams
from posttrain.train.terms import state_of

FORMAT = 2
"""Of ``state.json``."""


class Stateful(Protocol):
    """A source or objective whose future depends on more than the step."""

    def state(self, step: int) -> Any:
        """JSON state with which to go on at a step."""
        ...

    def load_state(self, state: Any) -> None:
        """Restore it; raises `posttrain.train.checkpoint.Unusable` where something that it needs is gone."""
        ...


def capture(optimizer: MasterAdamW, source: Stateful, objective: Any, step: int, lines: int) -> dict[str, Any]:
    """Everything but tensors with which to go on at ``step``, as JSON; ``lines`` is the length of ``metrics.jsonl`` in bytes.

    Weights, masters and moments are the optimiser's tensors; the schedule follows from the step.
    """
    return {
        "format": FORMAT,
        "source": source.state(step),
        "objective": state_of(objective),
        "streams": random_streams(),
        "metrics": lines,
        "machine": machine(),
        "dtypes": optimizer.dtypes(),
    }


def restore(
    directory: Path, title: str, steps: int, optimizer: MasterAdamW, source: Stateful, objective: Any, console: Console
) -> tuple[int, int]:
    """Go on from the newest checkpoint that can be used; returns its step (0: none) and the length of ``metrics.jsonl``.

    What is wrong with newer ones is printed, and so is a machine on which the last bits may differ.

    Raises:
        CheckError: that one has made more than ``steps``, or is of another model.
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
    if found.step > steps:  # what is there was trained for longer than asked
        raise CheckError(
            f"{title}: the newest checkpoint has made {found.step} steps, the run now asks for {steps}; ask for at least as many, "
            "or start again: in another directory, or with --restart-changed"
        )
    optimizer.load(found.tensors)
    if hasattr(objective, "load_state"):
        objective.load_state(found.state["objective"])
    restore_streams(found.state["streams"])
    console.print(f"[dim]{title}: continuing after step {found.step} of {steps}[/]")
    was, now = found.state["machine"], machine()
    changed = [f"{k} was {was.get(k)}, is {v}" for k, v in now.items() if was.get(k) != v]
    if changed:
        console.print(f"[yellow]{title}: {'; '.join(changed)}: the last bits of results may differ[/]")
    for role, dtype in optimizer.dtypes().items():
        if (before := found.state["dtypes"].get(role)) != dtype:  # "auto" chose otherwise, on another processor
            line = f"the {role} was trained in {before} and is in {dtype} now; the run goes on, not as it would have"
            console.print(f"[yellow]{title}: {line}[/]", soft_wrap=True)
    if found.step == steps:
        console.print(f"[dim]{title}: all {steps} steps are done; nothing is trained[/]")
    return found.step, found.state["metrics"]


def machine() -> dict[str, Any]:
    """What besides the library's input decides the last bits of a sum."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "ranks": world().size,
    }
