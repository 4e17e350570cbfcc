"""The only training loop. It knows batches, objectives and roles, and no method by name."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from posttrain.forest import Batch, split
from posttrain.models.policy import Model, forward_stats
from posttrain.train.coupled import linearised
from posttrain.train.diagnose import first_step
from posttrain.train.distributed import Share, world
from posttrain.train.guard import Guard, NonFinite, TooManySkipped, pooled, replay_if_asked, require_finite
from posttrain.train.log import METRICS, MetricsLog
from posttrain.train.optim import MasterAdamW, Optim, schedule_factor
from posttrain.train.progress import bar
from posttrain.train.saver import Saver
from posttrain.train.signals import Terminated, finish_step
from posttrain.train.sources import Source
from posttrain.train.state import capture, restore
from posttrain.train.terms import Objective


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run: where it writes, how long it is, and the memory knobs, which can't change a result.

    ``max_tokens`` is the most packed tokens of one forward pass, ``checkpointing`` computes layers again in the backward
    pass instead of keeping what they computed; ``save_every`` counts steps. The newest ``keep`` checkpoints
    stay, and the best by the metric ``best`` (``-NAME``: less is better). ``max_bad_steps`` steps in a row that are not
    finite end the run.
    """

    directory: Path
    steps: int
    max_tokens: int
    save_every: int
    console: Console
    title: str = "train"
    keep: int = 2
    best: str = ""
    max_bad_steps: int = 3
    checkpointing: bool = False


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
        CheckError: a self-check of the first step failed, or too many steps in a row were skipped (`posttrain.train.guard`);
            weights are as they were before them.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the step was finished and saved.
        OSError: a checkpoint could not be written; those before it are as they were.
    """
    models = {r: replace(m, checkpointing=m.checkpointing or run.checkpointing) for r, m in models.items()}
    optimizer = MasterAdamW({role: model.parameters() for role, model in models.items()}, optim)
    place = run.directory / "checkpoints"
    start, length = restore(place, run.title, run.steps, optimizer, source, objective, run.console)
    world().agree(start, "start of the run")
    guard = Guard(models, objective, source, optimizer, run, partial(_stats, models, objective))
    guard.go_on(start)
    replay_if_asked(guard)
    log = MetricsLog(run.directory, start, length)
    with ExitStack() as stack:
        stack.callback(log.close)
        saver = stack.enter_context(
            Saver(world().own(place), start=start, keep=run.keep, best=run.best, known=list(METRICS))
        )
        optimizer.before_change = saver.settle
        advance = stack.enter_context(bar(run.console, run.title, start, run.steps))
        stopping = stack.enter_context(finish_step())

        def save(step: int, metrics: Mapping[str, float]) -> None:
            with saver.holding_up():
                source.forget(saver.oldest())
                state = capture(optimizer, source, objective, step, log.length())
                saver.save(step, optimizer.tensors(), state, metrics, first=log.sync)

        for step in range(start, run.steps):
            began = time.perf_counter()
            try:
                metrics = guard.attempt(step, partial(_update, guard, optim, run, first=step == start))
            except TooManySkipped:
                if world().writes and step > start and step % run.save_every:  # else that one is there
                    save(step, {})
                raise
            metrics |= _clock(began, metrics) | {"time/save": saver.held_up()}
            log.write(step, metrics)
            for hook in hooks:
                hook(step, metrics)
            advance(metrics)
            done = step + 1
            saver.check()
            stop = any(world().gather(bool(stopping()), f"end of step {step}"))
            if world().writes and (stop or done % run.save_every == 0 or done == run.steps):
                save(done, metrics)
            if stop:
                saver.join()
                if not stopping():
                    raise Terminated  # another rank was asked
                break
        saver.join()  # a signal that comes now is delivered once the last checkpoint is there


def _update(guard: Guard, optim: Optim, run: Run, step: int, batch: Batch, *, first: bool) -> dict[str, float]:
    """One optimiser step on a batch, of which this rank computes its share; returns its metrics."""
    models, objective, source = guard.models, guard.objective, guard.source
    if first and source.fresh(step):
        first_step(models, objective, source, batch, guard.stats_of, run, step)
    share = world().share(batch)
    parts = split(share.batch, run.max_tokens, objective.whole_groups) if share.batch else []
    factor = schedule_factor(optim, step, run.steps)
    terms, finding = dict[str, float](), None
    try:
        terms = _accumulate(models, objective, batch, parts, step, share, guard.optimizer.last_pass(factor))
    except NonFinite as fault:
        finding = fault.finding
    metrics = pooled(terms, finding, step)
    world().sum_gradients(models, f"gradients of step {step}")
    metrics["optim/grad_norm"] = guard.optimizer.step(factor)
    metrics["optim/lr"] = factor * optim.lr
    return metrics | source.metrics(step) | {"speed/tokens": float(len(batch.forest.ids))}


def _stats(models: Mapping[str, Model], objective: Objective, part: Batch) -> dict[str, dict[str, Tensor]]:
    """One forward pass a role over a micro-batch, beside the frozen role ``reference`` where a statistic is one of both."""
    mask, other = part.forest.masks[objective.mask] if objective.mask else None, models.get("reference")
    return {
        role: forward_stats(
            models[role], part.forest, wanted, mask=mask, temperature=objective.temperature, other=other
        )
        for role, wanted in objective.reads.items()
    }


def _accumulate(
    models: Mapping[str, Model],
    objective: Objective,
    batch: Batch,
    parts: Sequence[Batch],
    step: int,
    share: Share | None = None,
    last: AbstractContextManager[None] | None = None,
) -> dict[str, float]:
    """Back-propagate every micro-batch into the same gradients, the last one within ``last``; returns the terms by their counts."""
    totals: dict[str, Tensor] = {}
    loss_total = torch.zeros((), dtype=torch.float64)
    stats_of = partial(_stats, models, objective)
    terms_of = (
        linearised(objective, stats_of, batch, parts, share, f"statistics of step {step}")
        if objective.coupled
        else objective
    )
    for part in parts:
        stats = stats_of(part)
        terms = terms_of(stats, part)
        loss = require_finite(objective, part, stats, terms, batch.counts)
        if loss.requires_grad:
            with last if last is not None and part is parts[-1] else nullcontext():
                loss.backward()
        loss_total += loss.detach().cpu()
        for name, term in terms.items():
            value = term.sum.detach().double().cpu() / batch.counts[term.unit]
            totals[name] = totals.get(name, torch.zeros((), dtype=torch.float64)) + value
    return {"loss/total": float(loss_total)} | {name: float(value) for name, value in totals.items()}


def _clock(began: float, metrics: Mapping[str, float]) -> dict[str, float]:
    """Time, speed and memory of a step; the only metrics that differ between equal runs."""
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    return {"time/step": seconds, "speed/tokens": metrics.get("speed/tokens", 0.0) / seconds, "memory/peak": peak}
