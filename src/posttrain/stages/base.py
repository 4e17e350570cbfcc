"""What every stage is: fields, inputs, how its work is found, what it costs."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from rich.console import Console

from posttrain.machine import deterministic_kernels

Overlong = Literal["error", "drop", "truncate_prompt_left", "truncate_completion"]
History = Literal["refuse", "last", "each"]
PARAMETERS = 134.5e6  # of the default model, for forecasts made before any model is looked for
TOKENS_A_ROW = 110  # prompt and answer of the default data, in tokens


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
    """Where a stage runs: its directory, each input's by field name (``field.0`` in a tuple), and fields that ``tiny`` leaves."""

    dir: Path
    inputs: dict[str, Path]
    console: Console
    seed: int = 0
    tiny: bool = False
    typed: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of a recipe; a field whose value is a stage (or a tuple of stages) is an input.

    ``WORK`` names the function ``(stage, context)`` that does it; ``TINY`` what changes at the size of the small world;
    ``DATA`` the names of the data it reads; ``KNOBS`` fields that can't change a result.
    """

    WORK: ClassVar[str] = ""
    TINY: ClassVar[Mapping[str, Any]] = {}
    DATA: ClassVar[tuple[str, ...]] = ()
    KNOBS: ClassVar[frozenset[str]] = frozenset({"max_tokens", "checkpointing", "save_every", "keep"})

    def __init_subclass__(cls) -> None:
        """Keep the short ``repr``: a dataclass would write its inputs out whole, by paths that double with every round."""
        super().__init_subclass__()
        cls.__repr__ = Stage.__repr__

    def __repr__(self) -> str:
        """Return the class with its values; an input is named by its class."""
        return f"{type(self).__name__}({', '.join(f'{f.name}={_short(getattr(self, f.name))}' for f in fields(self))})"

    def run(self, ctx: Context) -> None:
        """Do the work, writing into ``ctx.dir``; on a second call, continue from the last checkpoint.

        Kernels whose sums have one order are chosen before.
        """
        deterministic_kernels()
        module, _, function = self.WORK.partition(":")
        getattr(importlib.import_module(module), function)(self.sized(ctx.tiny, ctx.typed), ctx)

    def sized(self, tiny: bool, typed: Collection[str] = ()) -> Any:
        """Return the stage as it will run: itself, or with the fields of ``TINY`` but those ``typed``, whose values stand."""
        free = {k: v for k, v in self.TINY.items() if k not in typed and not isinstance(getattr(self, k), Stage)}
        return replace(self, **free) if tiny else self

    def held(self, tiny: bool, typed: Collection[str]) -> list[str]:
        """Return the fields that are not as ``TINY`` says because a person typed their values."""
        small = self.TINY if tiny else {}
        kept = {k: getattr(self, k) for k in typed if k in small}
        return sorted(k for k, value in kept.items() if value != small[k] and not isinstance(value, Stage))

    def plan(self) -> Plan:
        """Forecast the work without loading anything."""
        return Plan()

    def files(self) -> list[Path]:
        """Return the data files and model weights the stage reads; their contents are part of its key."""
        from posttrain.work.inputs import stage_files

        return stage_files(self)

    def check(self) -> None:
        """Raise `ConfigError` if the model or data can't be found; called before any stage runs."""
        self.files()


def _short(value: Any) -> str:
    """Return the ``repr`` of a stage's field."""
    if isinstance(value, Stage):
        return f"<{type(value).__name__}>"
    return f"({', '.join(map(_short, value))})" if type(value) in (tuple, list) else repr(value)


@dataclass(frozen=True)
class Recipe:
    """A published system: its stages by name, in run order; ``typed`` fields, by stage, keep their values at every size."""

    name: str
    stages: dict[str, Stage]
    summary: str = ""
    typed: Mapping[str, frozenset[str]] = field(default_factory=dict[str, frozenset[str]])


def stage_model(stage: Stage) -> str | None:
    """The name of the model a stage loads itself, None if it comes from an input."""
    for item in fields(stage):
        if item.name in ("model", "base", "reference") and isinstance(getattr(stage, item.name), str):
            return getattr(stage, item.name)
    return None
