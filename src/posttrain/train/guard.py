"""Numbers that are not finite: the step is skipped, what made it is kept with what replays it, and too many end the run.

A step is skipped when a number of its batch, a statistic, a term, the loss or the gradient is NaN or infinite, or when
the reward gave such a score. Weights, masters and moments stay as they were. The step's number goes on, and with it the
learning-rate schedule, the order of the data and the draws; AdamW's own count of updates does not. Metrics of the step
have ``step/skipped`` 1, and nothing of its losses.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from posttrain.errors import CheckError
from posttrain.forest import Batch, split
from posttrain.models.policy import Model
from posttrain.rewards.base import BadScore, Completion
from posttrain.rewards.base import require_finite as refuse_scores
from posttrain.train import dumps
from posttrain.train.distributed import fingerprint, world
from posttrain.train.dumps import Finding
from posttrain.train.optim import MasterAdamW, NonFiniteGradient
from posttrain.train.terms import Objective, Stats, Term, state_of, total, unmoved

StatsOf = Callable[[Batch], dict[str, dict[str, Tensor]]]


class NonFinite(CheckError):
    """A step whose numbers are not finite; nothing was changed."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.text)
        self.finding = finding


class TooManySkipped(CheckError):
    """Steps in a row that could not be made."""


class Limits(Protocol):
    """What the guard reads of a run."""

    @property
    def directory(self) -> Path:
        """Where dumps go, under ``faults``."""
        ...

    @property
    def max_tokens(self) -> int:
        """The memory knob."""
        ...

    @property
    def max_bad_steps(self) -> int:
        """How many steps in a row may be skipped before the run ends."""
        ...

    @property
    def title(self) -> str:
        """Name of the run in messages."""
        ...

    @property
    def console(self) -> Any:
        """Where messages go."""
        ...


def require_finite(
    objective: Objective, part: Batch, stats: Stats, terms: Mapping[str, Term], counts: Mapping[str, float]
) -> Tensor:
    """The loss of a micro-batch.

    Raises:
        NonFinite: it, a term, a statistic or a number of the batch is not; names the first of them.
    """
    loss = total(terms, counts)
    good = torch.isfinite(loss) & torch.stack([t.sum.detach().isfinite().all().cpu() for t in terms.values()]).all()
    finding = None if good else _first([*_terms(terms), ("loss", "loss/total", loss)])
    # a clamp may hide what is not finite from the loss, so that statistics are looked at even where it is
    finding = _first([*_columns(part, objective.mask), *_statistics(stats, part, objective.mask)]) or finding
    if finding is not None:
        raise NonFinite(finding)
    return loss


def pooled(terms: Mapping[str, float], finding: Finding | None, step: int) -> dict[str, float]:
    """Terms summed over ranks.

    Raises:
        NonFinite: on any rank; then on every rank.
    """
    found = world().gather(
        {"terms": dict(terms), "finding": asdict(finding) if finding else None}, f"losses of step {step}"
    )
    faults = [f["finding"] for f in found if f["finding"]]
    if faults:
        raise NonFinite(Finding(**faults[0]))
    out: dict[str, float] = {}
    for rank in found:
        for name, value in rank["terms"].items():
            out[name] = out.get(name, 0.0) + value
    return out


def examine(models: Mapping[str, Model], objective: Objective, part: Batch, stats_of: StatsOf) -> Finding | None:
    """The first thing that is not finite when a micro-batch is computed and back-propagated; None if all is. Gradients are cleared.

    Looks, in this order, at trained weights, the batch, statistics, terms, the loss, gradients.
    """
    finding = bad_number(models, objective, part, {})
    if finding is not None:
        return finding
    stats = stats_of(part)
    terms = objective(stats, part)
    loss = total(terms, part.counts)
    finding = _first([*_statistics(stats, part, objective.mask), *_terms(terms), ("loss", "loss/total", loss)])
    if finding is None and loss.requires_grad:
        loss.backward()
        named = [(f"{r}/{k}", p.grad) for r, m in models.items() for k, p in m.parameters().items()]
        grads = [("gradient", name, grad) for name, grad in named if grad is not None]
        norm = torch.stack([grad.float().norm() for _, _, grad in grads]).norm()  # its squares may overflow alone
        finding = _first([*grads, ("gradient", "norm", norm)])
    for model in models.values():
        for p in model.parameters().values():
            p.grad = None
    return finding


@dataclass
class Guard:
    """Tries each step, and skips it where its numbers are not finite.

    ``bad`` counts the steps in a row that were skipped; a run that goes on reads it from ``metrics.jsonl``.
    """

    models: Mapping[str, Model]
    objective: Any
    source: Any
    optimizer: MasterAdamW
    run: Limits
    stats_of: StatsOf
    bad: int = 0
    _last: list[Path] = field(default_factory=list[Path])

    def attempt(self, step: int, work: Callable[[int, Batch], dict[str, float]]) -> dict[str, float]:
        """Fetch the step's batch and make the step; returns its metrics. The objective's state stays where it is skipped.

        Raises:
            TooManySkipped: it is the last of ``max_bad_steps`` in a row that could not be made.
        """
        batch, before = None, state_of(self.objective)
        try:
            batch = self.source(step)
            world().agree(fingerprint(batch) if world().size > 1 else "", f"batch of step {step}")
            metrics = work(step, batch)
        except (NonFiniteGradient, NonFinite, BadScore) as error:
            if before is not None:
                self.objective.load_state(before)
            gradient = Finding("gradient", "norm", "not finite", 0, 1, 1)
            fault = NonFinite(gradient) if isinstance(error, NonFiniteGradient) else error
            with unmoved(self.objective):
                return self._skip(step, fault, batch)
        self.bad = 0
        return metrics | {"step/skipped": 0.0}

    def go_on(self, start: int) -> None:
        """Count the skipped steps right before ``start``."""
        skipped = {row["step"]: row.get("step/skipped", 0.0) for row in read_rows(self.run.directory)}
        self.bad = 0
        while skipped.get(start - 1 - self.bad, 0.0):
            self.bad += 1
        if world().size > 1:
            self.bad = world().gather(self.bad, "skipped steps so far")[0]

    def _skip(self, step: int, fault: NonFinite | BadScore, batch: Batch | None) -> dict[str, float]:
        """Undo the step, keep what made it, and say so."""
        self.optimizer.clear()
        self.bad += 1
        finding = str(fault)
        if world().writes:
            path, finding = self._dump(step, fault, batch)
            self.run.console.print(
                f"{self.run.title}: step {step} is skipped, weights are unchanged: {finding}; kept in {path}; "
                f"to see it again: posttrain replay {path}",
                style="yellow", highlight=False, markup=False, soft_wrap=True,
            )  # fmt: skip
        if self.bad >= self.run.max_bad_steps:
            if isinstance(fault, BadScore):
                self.source.retract()  # a person mends the reward, which is then asked again
            raise TooManySkipped(
                f"{self.run.title}: {self.bad} steps in a row were skipped, the last is step {step} ({finding}); the weights are "
                f"those before the first of them; look at {self.run.directory / 'faults'} with posttrain replay"
            )
        measured = self.source.metrics(step) if isinstance(fault, NonFinite) else {}
        return {k: v for k, v in measured.items() if math.isfinite(v)} | {"step/skipped": 1.0}

    def _dump(self, step: int, fault: NonFinite | BadScore, batch: Batch | None) -> tuple[Path, str]:
        """Write what replays the fault; returns where, and what was not finite."""
        target = self.run.directory / "faults" / f"step-{step:08d}"
        if isinstance(fault, BadScore):
            dumps.write_scores(target, step, self.run.title, fault)
            return target, str(fault)
        assert batch is not None  # it was there before anything could be computed
        part, finding = self._locate(batch, fault.finding)
        earlier = self._last[-1] if self._last and self.bad > 1 else None  # weights have not moved since
        dumps.write(target, step, self.run.title, part, finding, self.models, weights_in=earlier)
        self._last = [earlier or target]
        return target, finding.text

    def _locate(self, batch: Batch, finding: Finding) -> tuple[Batch, Finding]:
        """The first micro-batch that is not finite by itself, and what in it; the whole step if none is."""
        parts = [batch] if self.objective.coupled else split(batch, self.run.max_tokens, self.objective.whole_groups)
        for part in parts:
            found = examine(self.models, self.objective, part, self.stats_of)
            if found is not None:
                return part, found
        return batch, finding


class Replayed(CheckError):
    """A replay is done; the message says what was found."""


_REPLAY: list[Path] = []


def replay_if_asked(guard: Guard) -> None:
    """Within `replaying`: compute the dumped step with the roles and the objective of a run, instead of training.

    Raises:
        Replayed: always, then.
    """
    if not _REPLAY:
        return
    fault = dumps.read_fault(_REPLAY[0])
    if "completions" in fault:
        raise Replayed(replay_scores(fault, guard.source))
    raise Replayed(replay(_REPLAY[0], guard.models, guard.objective, guard.stats_of))


@contextmanager
def replaying(dump: Path) -> Iterator[None]:
    """Let the next `posttrain.train.loop.fit` replay a dump and raise `Replayed`."""
    _REPLAY.append(dump)
    try:
        yield
    finally:
        _REPLAY.clear()


def replay(dump: Path, models: Mapping[str, Model], objective: Objective, stats_of: StatsOf) -> str:
    """Compute a dumped micro-batch with its own weights; says what is not finite, and whether that is what was found then."""
    then = Finding(**dumps.read_fault(dump)["finding"])
    dumps.load_weights(dump, models)
    now = examine(models, objective, dumps.read_batch(dump), stats_of)
    if now is None:
        return f"all finite now; then: {then.text} (another machine, thread count or library version?)"
    return f"{now.text}{', as then' if now == then else f'; then: {then.text}'}"


def replay_scores(fault: Mapping[str, Any], source: Any) -> str:
    """Score the dumped responses again; says which score is not finite, and whether it was that then."""
    examples = {e.prompt_key: e for e in source.examples}
    rows = fault["completions"]
    completions = [
        Completion(
            example=examples[r["prompt_key"]],
            text=r["text"],
            prompt_ids=tuple(r["prompt_ids"]),
            ids=tuple(r["ids"]),
            truncated=r["truncated"],
            group=r["group"],
        )
        for r in rows
    ]
    try:
        scores = source.reward(completions)
        refuse_scores(completions, scores)
    except BadScore as error:
        same = [str(s.value) for s in error.scores] == [str(None) if r["score"] is None else r["score"] for r in rows]
        return f"{error}{', as then' if same else '; then: ' + fault['message']}"
    return f"all scores are finite now; then: {fault['message']}"


def read_rows(directory: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's ``metrics.jsonl``."""
    path = directory / "metrics.jsonl"
    rows: list[dict[str, Any]] = []
    for line in path.read_text().split("\n") if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # the last line of a killed process
            break
    return rows


Named = tuple[str, str, Tensor]  # kind, name, values


def bad_number(models: Mapping[str, Model], objective: Objective, part: Batch, stats: Stats) -> Finding | None:
    """The first trained weight, column of a batch or statistic that is not finite where the objective's mask lets it count."""
    weights = [("weight", f"{r}/{k}", p.detach()) for r, m in models.items() for k, p in m.parameters().items()]
    return _first([*weights, *_columns(part, objective.mask), *_statistics(stats, part, objective.mask)])


def _columns(part: Batch, mask: str | None) -> Iterator[Named]:
    """Numbers the batch brings, where the objective's mask lets them count."""
    on = part.forest.masks[mask] if mask else slice(None)
    for name, x in part.tokens.items():
        yield "batch", name, x[on]
    for name, x in part.branches.items():
        yield "batch", name, x


def _statistics(stats: Stats, part: Batch, mask: str | None) -> Iterator[Named]:
    """Statistics, where the objective's mask lets them count."""
    on = part.forest.masks[mask] if mask else slice(None)
    for role, found in stats.items():
        for name, x in found.items():
            yield "statistic", f"{role}/{name}", x.detach() if name == "score" else x.detach()[on]


def _terms(terms: Mapping[str, Term]) -> Iterator[Named]:
    """Sums of the objective."""
    for name, term in terms.items():
        yield "term", name, term.sum.detach()


def _first(named: Sequence[Named] | Iterator[Named]) -> Finding | None:
    """The first tensor with an entry that is not finite."""
    for kind, name, x in named:
        if x.dtype.is_floating_point and not bool(x.isfinite().all()):
            flat = x.detach().flatten()
            bad = (~flat.isfinite()).nonzero()[:, 0]
            return Finding(kind, name, str(float(flat[bad[0]])), int(bad[0]), len(bad), flat.numel())
    return None
