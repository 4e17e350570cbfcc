"""Batches from data that is there: rows shuffled by (seed, epoch), so that a step says all about where a run stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from posttrain.errors import ConfigError
from posttrain.forest import Batch, Row, build_forest


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

    def resumable(self, step: int) -> bool:
        """Always: a step's rows follow from its number."""
        return True

    def state(self) -> Any:
        """None: everything follows from the step."""
        return None

    def load_state(self, state: Any) -> None:
        """Nothing to restore."""


def demonstration_source(rows: Sequence[Row], *, per_step: int, seed: int) -> DataSource:
    """Demonstrations; counts tokens under the "loss" mask."""

    def make(indices: Sequence[int]) -> Batch:
        forest = build_forest([rows[i] for i in indices])
        counts = {"tokens": float(forest.masks["loss"].sum()), "branches": float(len(forest.end))}
        return Batch(forest, {}, {}, counts)

    return DataSource(len(rows), per_step, seed, make)


def ranking_source(rows: Sequence[Row], ranks: Sequence[Sequence[int]], *, per_step: int, seed: int) -> DataSource:
    """Ranked responses, ``ranks[row][response]`` with 0 = best; counts prompts and responses."""

    def make(indices: Sequence[int]) -> Batch:
        forest = build_forest([rows[i] for i in indices])
        rank = torch.tensor([r for i in indices for r in ranks[i]])
        counts = {"prompts": float(len(indices)), "branches": float(len(forest.end))}
        return Batch(forest, {}, {"rank": rank}, counts)

    return DataSource(len(rows), per_step, seed, make)
