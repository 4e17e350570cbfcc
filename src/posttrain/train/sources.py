"""Batches from data that is there: rows shuffled by (seed, epoch), so that a step says all about where a run stands."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from posttrain.errors import ConfigError
from posttrain.forest import Batch, Forest, Row, build_forest


class Source(Protocol):
    """Where `posttrain.train.loop.fit` gets batches from; one call a step."""

    def __call__(self, step: int) -> Batch:
        """The whole optimiser step's batch."""
        ...

    def metrics(self, step: int) -> Mapping[str, float]:
        """What the source measured while it made that batch."""
        ...

    def fresh(self, step: int) -> bool:
        """Whether the step's batch is made with the weights that it then trains (not so at the second update on samples)."""
        ...

    def forget(self, step: int) -> None:
        """No run will go on from before ``step``: what only that would need may go."""
        ...

    def state(self, step: int) -> Any:
        """JSON state with which to go on at a step, beyond what follows from its number."""
        ...

    def load_state(self, state: Any) -> None:
        """Restore it; raises `posttrain.train.checkpoint.Unusable` where something that it needs is gone."""
        ...


def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """A permutation of ``range(count)`` that depends on (seed, epoch) only."""
    return np.random.Generator(np.random.Philox(key=(seed << 32) + epoch)).permutation(count).tolist()


@dataclass(frozen=True)
class DataSource:
    """``per_step`` rows a step, each epoch in a new order; the last step of an epoch may be smaller.

    ``make_batch`` turns row indices into the step's batch.
    """

    size: int
    per_step: int
    seed: int
    make_batch: Callable[[Sequence[int]], Batch]

    def __post_init__(self) -> None:
        """Refuse an empty data set."""
        if self.size < 1 or self.per_step < 1:
            raise ConfigError(f"got {self.size} rows and {self.per_step} rows a step; expected at least 1 of each")

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one pass."""
        return -(-self.size // self.per_step)

    def __call__(self, step: int) -> Batch:
        """The rows of a step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = shuffled(self.size, self.seed, epoch)
        return self.make_batch(order[place * self.per_step : (place + 1) * self.per_step])

    def metrics(self, step: int) -> Mapping[str, float]:
        """How far into the data a step is."""
        return {"data/epoch": (step + 1) / self.steps_per_epoch}

    def fresh(self, step: int) -> bool:
        """Always: rows are as they are."""
        return True

    def forget(self, step: int) -> None:
        """Nothing is kept."""

    def state(self, step: int) -> Any:
        """None: everything follows from the step."""
        return None

    def load_state(self, state: Any) -> None:
        """Nothing to restore."""


def demonstration_source(
    rows: Sequence[Row], *, per_step: int, seed: int, weights: Sequence[float] | None = None
) -> DataSource:
    """Demonstrations, ``weights`` one a row (1 if not given); counts weighted tokens under the "loss" mask."""
    used, weight = weighted_rows(len(rows), weights)

    def make(indices: Sequence[int]) -> Batch:
        forest, w = _forest(rows, weight, [used[i] for i in indices])
        counts = {"tokens": _tokens(forest, w), "branches": float(len(forest.end))}
        return Batch(forest, {}, {"weight": w}, counts)

    return DataSource(len(used), per_step, seed, make)


def ranking_source(
    rows: Sequence[Row],
    ranks: Sequence[Sequence[int]],
    *,
    per_step: int,
    seed: int,
    weights: Sequence[float] | None = None,
    ref_logp: Sequence[Tensor] | None = None,
    columns: Mapping[str, Sequence[Sequence[float]]] | None = None,
    tokens: Mapping[str, Sequence[Tensor]] | None = None,
) -> DataSource:
    """Ranked responses, ``ranks[row][response]`` with 0 = best; pairs are rankings of two.

    Counts prompts and tokens by weight, and responses. ``weights`` are one a row (1 if not given); ``ref_logp`` one
    tensor a row, the reference's log-probabilities of all its responses' tokens (`posttrain.train.reference`); ``columns``
    other numbers of responses, by name, row and response; ``tokens`` other tensors a row.
    """
    given = dict(tokens or {}) | ({} if ref_logp is None else {"ref_logp": ref_logp})
    return response_source(
        rows, {"rank": ranks, **(columns or {})}, given, per_step=per_step, seed=seed, weights=weights
    )


def response_source(
    rows: Sequence[Row],
    columns: Mapping[str, Sequence[Sequence[float]]],
    tokens: Mapping[str, Sequence[Tensor]],
    *,
    per_step: int,
    seed: int,
    weights: Sequence[float] | None = None,
) -> DataSource:
    """Responses with numbers of each, ``columns[name][row][response]``, and of each token, ``tokens[name][row]``.

    Counts prompts by weight, responses, tokens by weight where there are any of ``tokens``; where there is a ``label``, also
    ``good``, ``bad`` and ``mismatched`` responses by weight. Whole numbers become int64 columns, others float64.
    """
    used, weight = weighted_rows(len(rows), weights)

    def make(indices: Sequence[int]) -> Batch:
        chosen = [used[i] for i in indices]
        forest, w = _forest(rows, weight, chosen)
        branches = {name: _column([x for i in chosen for x in values[i]]) for name, values in columns.items()}
        counts = {"prompts": sum(weight[i] for i in chosen), "branches": float(len(forest.end))}
        if tokens:
            counts["tokens"] = _tokens(forest, w)
        if "label" in branches:
            counts |= label_counts(branches["label"], branches["matched"], w)
        found = {name: torch.cat([values[i] for i in chosen]) for name, values in tokens.items()}
        return Batch(forest, found, branches | {"weight": w}, counts)

    return DataSource(len(used), per_step, seed, make)


def with_mismatched(rows: Sequence[Row], *, max_length: int, seed: int) -> list[Row]:
    """Rows of one response, each with a second one that answers another prompt, picked once by ``seed``.

    The next response in a shuffled order whose prompt is another and which fits into ``max_length`` tokens; a row that
    none fits stays as it is. So the pairs are the same whatever the batches are, and a reference can be kept.
    """
    order = shuffled(len(rows), seed, 0)
    out = list(rows)
    for place, index in enumerate(order):
        row = rows[index]
        for step in range(1, len(rows)):
            other = rows[order[(place + step) % len(rows)]]
            if list(other.prompt) != list(row.prompt) and len(row.prompt) + len(other.branches[0].ids) <= max_length:
                out[index] = Row(row.prompt, [row.branches[0], other.branches[0]])
                break
    return out


def label_counts(label: Tensor, matched: Tensor, weight: Tensor) -> dict[str, float]:
    """Good and bad responses to their own prompts, and those to others, by weight."""
    kinds = {"good": (matched > 0) & (label > 0), "bad": (matched > 0) & (label <= 0), "mismatched": matched <= 0}
    return {name: float(weight[where].sum()) for name, where in kinds.items()}


def _column(values: Sequence[float]) -> Tensor:
    """Numbers of responses."""
    return torch.tensor(values, dtype=torch.long if all(isinstance(x, int) for x in values) else torch.float64)


def weighted_rows(count: int, weights: Sequence[float] | None) -> tuple[list[int], list[float]]:
    """The rows that are visited, those of weight above 0, and all weights.

    Raises:
        ConfigError: another number of weights than rows, or one that is negative or not finite.
    """
    weight = [1.0] * count if weights is None else list(weights)
    if len(weight) != count:
        raise ConfigError(f"got {len(weight)} weights for {count} rows; expected one a row")
    for i, w in enumerate(weight):
        if not (math.isfinite(w) and w >= 0):
            raise ConfigError(f"row {i} (from 0) has weight {w}; expected a finite number, at least 0")
    return [i for i, w in enumerate(weight) if w > 0], weight


def _forest(rows: Sequence[Row], weight: Sequence[float], chosen: Sequence[int]) -> tuple[Forest, Tensor]:
    """The chosen rows as a forest, and each response's weight ``[B]``."""
    per_branch = [weight[i] for i in chosen for _ in rows[i].branches]
    return build_forest([rows[i] for i in chosen]), torch.tensor(per_branch, dtype=torch.float64)


def _tokens(forest: Forest, weight: Tensor) -> float:
    """The sum of weights over trained tokens."""
    return float(weight[forest.branch][forest.masks["loss"]].sum())
