"""Sources and objectives that stand around others: what they do not say themselves is what the inner one says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.forest import Batch
from posttrain.train.sources import Source
from posttrain.train.terms import Check, Stats


@dataclass
class AroundSource:
    """A source whose batches are made of another's; where a run stands is what that one says."""

    inner: Source

    def __call__(self, step: int) -> Batch:
        """The inner batch."""
        return self.inner(step)

    def metrics(self, step: int) -> Mapping[str, float]:
        """What the inner source measured."""
        return self.inner.metrics(step)

    def fresh(self, step: int) -> bool:
        """As the inner source says."""
        return self.inner.fresh(step)

    def forget(self, step: int) -> None:
        """Let the inner source forget."""
        self.inner.forget(step)

    def state(self, step: int) -> Any:
        """The inner source's; what is added follows from the step."""
        return self.inner.state(step)

    def load_state(self, state: Any) -> None:
        """Restore the inner source."""
        self.inner.load_state(state)

    def __getattr__(self, name: str) -> Any:
        """Its reference, its reward, and all else that an inner source may have."""
        if name == "inner":  # before it is set
            raise AttributeError(name)
        return getattr(self.inner, name)


@dataclass(frozen=True, kw_only=True)
class AroundObjective:
    """An objective whose terms are made of another's; a subclass says its ``mask``."""

    inner: Any

    @property
    def reads(self) -> Mapping[str, frozenset[str]]:
        """As the inner objective."""
        return self.inner.reads

    @property
    def temperature(self) -> float:
        """As the inner objective."""
        return self.inner.temperature

    @property
    def whole_groups(self) -> bool:
        """As the inner objective."""
        return self.inner.whole_groups

    @property
    def coupled(self) -> bool:
        """As the inner objective."""
        return self.inner.coupled

    def check(self, stats: Stats, batch: Batch, step: int) -> list[Check]:
        """The inner objective's lines."""
        return self.inner.check(stats, batch, step)

    def __getattr__(self, name: str) -> Any:
        """Its tolerance, its state, and all else that an inner objective may have."""
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)
