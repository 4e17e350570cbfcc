"""What a run directory holds, read once for the terminal and the page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import ConfigError, DataError, suggest
from posttrain.evals.plots import read_metrics
from posttrain.evals.results import read_results


@dataclass(frozen=True, kw_only=True)
class StageView:
    """One stage: its class, configuration, the seconds it took (None = not finished) and metrics by step."""

    kind: str
    config: Mapping[str, Any]
    seconds: float | None
    metrics: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, kw_only=True)
class RunView:
    """A run: ``run.json``, its stages in run order, and ``results.json`` if an evaluation finished."""

    directory: Path
    run: Mapping[str, Any]
    stages: Mapping[str, StageView]
    results: Mapping[str, Any] | None

    @property
    def models(self) -> tuple[str, ...]:
        """The models that the stages name, in order, without repeats."""
        named = [self.run.get("model"), *(stage.config.get("model") for stage in self.stages.values())]
        return tuple(dict.fromkeys(name for name in named if isinstance(name, str)))

    @property
    def logs(self) -> dict[str, tuple[Mapping[str, Any], ...]]:
        """Metrics by stage, of the stages that have any."""
        return {name: stage.metrics for name, stage in self.stages.items() if stage.metrics}


def read_run(directory: Path) -> RunView:
    """Read a run directory, finished or not.

    Raises:
        ConfigError: the directory is not a run.
        DataError: a file in it is not what it should be.
    """
    _check_run(directory)
    run = _read_object(directory / "run.json")
    recorded = run.get("stages", {})
    present = sorted(path.parent.name for path in directory.glob("*/stage.json"))
    names = list(dict.fromkeys([*recorded, *present]))
    stages = {name: _read_stage(directory / name, recorded.get(name, {})) for name in names}
    found = [directory / "evaluate" / "results.json", *sorted(directory.glob("*/results.json"))]
    path = next((path for path in found if path.is_file()), None)
    return RunView(directory=directory, run=run, stages=stages, results=read_results(path) if path else None)


def _read_stage(directory: Path, planned: Mapping[str, Any]) -> StageView:
    """Read a stage, started or not; it is finished if ``done.json`` has the key of ``stage.json``."""
    stage, done, log = (directory / name for name in ("stage.json", "done.json", "metrics.jsonl"))
    described = _read_object(stage) if stage.is_file() else planned
    finished = _read_object(done) if done.is_file() else {}
    known = "seconds" in finished and finished.get("key") == described.get("key")
    return StageView(
        kind=str(described.get("class", "")),
        config=described.get("config", {}),
        seconds=float(finished["seconds"]) if known else None,
        metrics=tuple(read_metrics(log)) if log.is_file() else (),
    )


def _check_run(directory: Path) -> None:
    """Refuse what is not a run, naming what might have been meant."""
    if (directory / "run.json").is_file():
        return
    if not directory.is_dir():
        beside = [path.parent.name for path in directory.parent.glob("*/run.json")]
        hint = suggest(directory.name, beside) if beside else "expected runs/NAME, as printed when the run started"
        raise ConfigError(f"no directory {directory}; {hint}")
    if (directory / "stage.json").is_file():
        raise ConfigError(f"{directory} is one stage of a run; expected the run: {directory.parent}")
    inside = sorted(path.parent.name for path in directory.glob("*/run.json"))
    hint = f"give one of the runs in it: {', '.join(inside)}" if inside else "expected runs/NAME, which holds one"
    raise ConfigError(f"{directory} is not a run directory: it has no run.json; {hint}")


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}; run again into a fresh directory") from error
    if not isinstance(value, dict):
        raise DataError(
            f"{path} holds {type(value).__name__}; expected a JSON object; run again into a fresh directory"
        )
    return value
