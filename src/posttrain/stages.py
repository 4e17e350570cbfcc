"""Stages of a recipe: what each reads, does and writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a stage will cost, known before anything is loaded.

    ``rows`` of data or prompts, ``tokens`` computed, ``flops``, peak ``memory`` in bytes.
    """

    rows: int = 0
    tokens: int = 0
    flops: float = 0.0
    memory: float = 0.0
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Context:
    """Where a stage runs: its directory, and each input's by field name (``field.0`` in a tuple)."""

    dir: Path
    inputs: dict[str, Path]
    console: Console
    seed: int = 0
    tiny: bool = False


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of a recipe; a field whose value is a stage (or a tuple of stages) is an input."""

    def run(self, ctx: Context) -> None:
        """Do the work, writing into ``ctx.dir``; on a second call, continue from the last checkpoint."""
        raise NotImplementedError

    def plan(self) -> Plan:
        """Forecast the work without loading anything."""
        return Plan()

    def files(self) -> list[Path]:
        """Return the data files the stage reads; their contents are part of its key."""
        return []

    def check(self) -> None:
        """Raise `PosttrainError` if the stage can't start; called before any stage runs."""


@dataclass(frozen=True)
class Recipe:
    """A published system: its stages by name, in run order."""

    name: str
    stages: dict[str, Stage]
    summary: str = ""
