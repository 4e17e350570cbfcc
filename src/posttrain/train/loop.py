"""The only training loop. It knows batches, objectives and roles, and no method by name."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from torch import Tensor

from posttrain.errors import CheckError
from posttrain.forest import Batch, split
from posttrain.models.policy import Model, forward_stats
from posttrain.train.checkpoint import load_checkpoint, save_checkpoint
from posttrain.train.log import MetricsLog
from posttrain.train.objectives import Check, Objective
from posttrain.train.optim import MasterAdamW, Optim, schedule_factor
from posttrain.train.progress import bar, check_table


class Source(Protocol):
    """Where batches come from; one call a step."""

    def __call__(self, step: int) -> Batch:
        """The whole optimiser step's batch."""
        ...

    def metrics(self, step: int) -> Mapping[str, float]:
        """What the source measured while it made that batch."""
        ...

    def resumable(self, step: int) -> bool:
        """Whether a run may be continued from before ``step`` (not, say, between two updates on one set of samples)."""
        ...

    def state(self) -> Any:
        """JSON state, beyond what follows from the step."""
        ...

    def load_state(self, state: Any) -> None:
        """Restore it."""
        ...


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run: where it writes, how long it is, and the memory knob, which can't change a result.

    ``max_tokens`` is the most packed tokens of one forward pass; ``save_every`` counts steps.
    """

    directory: Path
    steps: int
    max_tokens: int
    save_every: int
    console: Console
    title: str = "train"


Hook = Callable[[int, Mapping[str, float]], None]


def fit(
    models: Mapping[str, Model],
    objective: Objective,
    source: Source,
    *,
    optim: Optim,
    run: Run,
    hooks: Sequence[Hook] = (),
) -> None:
    """Train the roles in ``models`` on ``source`` until ``run.steps``, continuing from the newest good checkpoint.

    A step's loss is the sum over terms of ``coefficient * sum / counts[unit]``, counts being those of the whole step, so
    packing and micro-batches can't change it. Hooks hear every step's metrics.

    Raises:
        CheckError: a self-check of the first step failed, or a loss or gradient is not finite; weights are unchanged.
    """
    optimizer = MasterAdamW({role: model.parameters() for role, model in models.items()}, optim)
    start = _restore(run, optimizer, source)
    log = MetricsLog(run.directory, start)
    with ExitStack() as stack:
        stack.callback(log.close)
        advance = stack.enter_context(bar(run.console, run.title, start, run.steps))
        for step in range(start, run.steps):
            began = time.perf_counter()
            batch = source(step)
            parts = split(batch, run.max_tokens, objective.whole_groups)
            if step == start:
                _check(models, objective, next((p for p in parts if _has_targets(p, objective)), parts[0]), run)
            metrics = _accumulate(models, objective, batch, parts, step)
            factor = schedule_factor(optim, step, run.steps)
            metrics["optim/grad_norm"] = optimizer.step(factor)
            metrics["optim/lr"] = factor * optim.lr
            metrics |= source.metrics(step)
            metrics |= _clock(began, batch)
            log.write(step, metrics)
            for hook in hooks:
                hook(step, metrics)
            advance(metrics)
            done = step + 1
            if source.resumable(done) and (done % run.save_every == 0 or done == run.steps):
                state = {"source": source.state()}
                save_checkpoint(run.directory / "checkpoints", done, optimizer.tensors(), state)


def _restore(run: Run, optimizer: MasterAdamW, source: Source) -> int:
    """Load the newest good checkpoint, if any; returns the step to go on from."""
    found = load_checkpoint(run.directory / "checkpoints")
    if found is None:
        return 0
    step, tensors, state, faults = found
    for fault in faults:
        run.console.print(f"[yellow]{fault}[/]")
    if step < 0:
        return 0
    optimizer.load(tensors)
    source.load_state(state["source"])
    run.console.print(f"[dim]{run.title}: continuing after step {step} of {run.steps}[/]")
    return step


def _has_targets(part: Batch, objective: Objective) -> bool:
    """Whether the objective's mask leaves a micro-batch anything to read."""
    return objective.mask is None or bool(part.forest.masks[objective.mask].any())


def _stats(models: Mapping[str, Model], objective: Objective, part: Batch) -> dict[str, dict[str, Tensor]]:
    """One forward pass a role over a micro-batch."""
    mask = part.forest.masks[objective.mask] if objective.mask else None
    return {
        role: forward_stats(models[role], part.forest, wanted, mask=mask, temperature=objective.temperature)
        for role, wanted in objective.reads.items()
    }


def _check(models: Mapping[str, Model], objective: Objective, part: Batch, run: Run) -> None:
    """Print the table of self-checks on the first micro-batch, and refuse to train if one fails."""
    with torch.no_grad():
        checks: list[Check] = objective.check(_stats(models, objective, part), part)
    run.console.print(check_table(run.title, checks))
    failed = [c for c in checks if c.ok is False]
    if failed:
        lines = "; ".join(f"{c.name}: got {c.value}, expected {c.expected}" for c in failed)
        raise CheckError(f"{run.title}: a check of the first step failed, nothing was trained: {lines}")


def _accumulate(
    models: Mapping[str, Model], objective: Objective, batch: Batch, parts: Sequence[Batch], step: int
) -> dict[str, float]:
    """Back-propagate every micro-batch into the same gradients; returns the terms, each divided by its count."""
    totals: dict[str, Tensor] = {}
    loss_total = torch.zeros((), dtype=torch.float64)
    for part in parts:
        terms = objective(_stats(models, objective, part), part)
        losses = [t.coefficient * t.sum / batch.counts[t.unit] for t in terms.values() if t.coefficient]
        loss = torch.stack([x.double() for x in losses]).sum()
        if not torch.isfinite(loss):
            raise CheckError(f"the loss is {loss.item()} at step {step}; weights are unchanged")
        if loss.requires_grad:
            loss.backward()
        loss_total += loss.detach().cpu()
        for name, term in terms.items():
            value = term.sum.detach().double().cpu() / batch.counts[term.unit]
            totals[name] = totals.get(name, torch.zeros((), dtype=torch.float64)) + value
    return {"loss/total": float(loss_total)} | {name: float(value) for name, value in totals.items()}


def _clock(began: float, batch: Batch) -> dict[str, float]:
    """Time, speed and memory of a step; the only metrics that differ between equal runs."""
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    return {"time/step": seconds, "speed/tokens": len(batch.forest.ids) / seconds, "memory/peak": peak}
