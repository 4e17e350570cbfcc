"""One recipe at several settings and seeds: run what is missing, compare every point with one of them, say what is shown."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from posttrain.errors import ConfigError, PosttrainError, suggest
from posttrain.evals.run_view import read_run
from posttrain.evals.statistics import holm, paired_test
from posttrain.graph import decide, describe, ordered, read_json, stage_config
from posttrain.run_numbers import choose_metric, numbers, rows_of
from posttrain.runner import Stopped, duration, run_recipe, say, write_json
from posttrain.stages import Recipe

SCHEMA = 1
LEVEL = 0.95
FEWEST_SEEDS = 3
"""With fewer, seeds say nothing of their own spread, and held-out prompts are resampled instead."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One setting of a sweep: the swept options with their values, as typed, and the recipe they give."""

    options: Mapping[str, str]
    recipe: Recipe

    @property
    def name(self) -> str:
        """The first part of its runs' directories, ``beta-0.1_lr-1e-4``."""
        parts = [f"{key.rpartition('.')[2]}-{value}" for key, value in self.options.items()]
        return re.sub(r"[^\w.+-]+", "-", "_".join(parts))[:120].strip("-") or "as-given"

    @property
    def label(self) -> str:
        """What tables call it: ``dpo.beta 0.1``, a line an option."""
        return "\n".join(f"{key} {value}" for key, value in self.options.items()) or "as given"


def grid(axes: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """Return every combination of the axes' values, the last axis changing fastest; one empty one without axes."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def check_points(points: Sequence[Point], tiny: bool) -> None:
    """Refuse points that would run the same, or in the same directory.

    Raises:
        ConfigError: two points with one resolved configuration (a value twice).
    """
    seen: dict[str, Point] = {}
    for point in points:
        stages, typed = ordered(point.recipe).items(), point.recipe.typed
        sized = {name: stage_config(stage.sized(tiny, typed.get(name, ()))) for name, stage in stages}
        resolved = json.dumps(sized, sort_keys=True)
        if resolved in seen:
            pair = " and ".join(one.label.replace("\n", ", ") for one in (seen[resolved], point))
            raise ConfigError(f"{pair} would run the same: a value stands there twice")
        seen[resolved] = point
    names = [point.name for point in points]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(
            f"two points would be kept under the name '{twice}'; give values that differ in letters or digits"
        )


def run_sweep(
    points: Sequence[Point],
    *,
    directory: Path,
    seeds: int = 3,
    metric: str | None = None,
    baseline: str | None = None,
    fixed: Mapping[str, str] | None = None,
    console: Console | None = None,
    tiny: bool = False,
    command: str = "",
) -> dict[str, Any]:
    """Run every point with every seed, compare them, write ``directory/sweep.json`` and return what it holds.

    A finished run is skipped; one cut off goes on; a stage that another run of the sweep finished with the same key is
    taken from there. A run that fails is kept in the table as failed, and the others go on.

    Args:
        points: the settings, in the order of the table.
        directory: of the sweep; a run is ``directory/POINT-seedN``, what it printed ``directory/POINT-seedN.log``.
        seeds: how many, from 0.
        metric: the number to compare, by its name in `posttrain.run_numbers.numbers`; the default one if None.
        baseline: the point that others are compared with; the first if None.
        fixed: options that hold for every point, kept so that a sweep is not continued with others.
        console: where progress is printed.
        tiny: whether stages run at the size of the small world.
        command: what continues the sweep.

    Raises:
        ConfigError: fewer than one seed, an unknown baseline or metric, a directory of another sweep, no run that finished.
        Stopped: as `run_recipe`.
    """
    console = console or Console()
    if seeds < 1:
        raise ConfigError(f"got {seeds} seeds; expected at least 1, and {FEWEST_SEEDS} for an interval over seeds")
    check_points(points, tiny)
    base = find_baseline(points, baseline)
    plan = {"schema": SCHEMA, "recipe": points[0].recipe.name, "fixed": dict(fixed or {}), "tiny": tiny}
    for point in points:  # a model or file that can't be found is a fault of the command, not of a run
        for stage in ordered(point.recipe).values():
            stage.check()
    _claim(directory, plan)
    failed = _run_points(points, directory, seeds, metric, console, tiny, command)
    found = plan | {"name": directory.name, "command": command, "seeds": list(range(seeds))}
    found |= compare_points(points, directory, seeds, metric, base, failed)
    write_json(directory / "sweep.json", found)
    return found


def find_baseline(points: Sequence[Point], asked: str | None) -> Point:
    """Return the point that a name, a label, or a bare value means; the first if None."""
    known = {name: point for point in points for name in (point.label.replace("\n", ", "), point.name)}
    known |= {value: point for point in points for value in point.options.values() if len(point.options) == 1}
    if asked is not None and asked not in known:
        raise ConfigError(f"no point '{asked}' to compare with; {suggest(asked, [point.name for point in points])}")
    return points[0] if asked is None else known[asked]


# ---------------------------------------------------------------------------- runs


def _claim(directory: Path, plan: Mapping[str, Any]) -> None:
    """Make the sweep's directory, or refuse one that belongs to other options, whose runs would be cleared."""
    there = read_json(directory / "sweep.json")
    for key in plan:
        if there is not None and there.get(key) != plan[key]:
            was, now = (_shown(key, side.get(key)) for side in (there, plan))
            raise ConfigError(f"{directory} is a sweep with {was}, not {now}; choose another --name")
    if there is None and (directory / "run.json").exists():
        raise ConfigError(f"{directory} is a single run; choose another --name")
    directory.mkdir(parents=True, exist_ok=True)
    if there is None:
        write_json(directory / "sweep.json", plan)


def _shown(key: str, value: Any) -> str:
    """Write a part of a sweep's plan as one would type it."""
    if key != "fixed":
        return f"{key} {value}"
    return (
        " ".join(f"--{option} {text}" for option, text in (value or {}).items()) or "no options beside the swept ones"
    )


def _run_points(
    points: Sequence[Point], directory: Path, seeds: int, metric: str | None, console: Console, tiny: bool, command: str
) -> dict[str, str]:
    """Run every point with every seed, a line each; return the runs that failed, and why."""
    failed: dict[str, str] = {}
    runs = [(point, seed) for seed in range(seeds) for point in points]
    for number, (point, seed) in enumerate(runs, 1):
        name = f"{point.name}-seed{seed}"
        head = f"[{number}/{len(runs)}] {point.label.replace(chr(10), ', ')}, seed {seed}"
        try:
            line = _run_point(point.recipe, directory, name, seed, console, tiny, command, head)
        except PosttrainError as error:
            failed[name] = " ".join(str(error).split())
            line = f"failed: {failed[name]}"
        say(console, f"{head}: {line}")
        if metric is not None and name not in failed:  # a wrong name is told after one run, not after all
            choose_metric(metric, numbers(read_run(directory / name)))
    return failed


def _run_point(
    recipe: Recipe, directory: Path, name: str, seed: int, console: Console, tiny: bool, command: str, head: str
) -> str:
    """Run one point with one seed, its output into a log; return what happened."""
    stages = ordered(recipe)
    described = describe(stages, seed=seed, tiny=tiny, typed=recipe.typed)
    run = directory / name
    if (run / "run.json").exists() and all(decide(run / key, described[key]).what == "skip" for key in stages):
        return "finished earlier, skipped"
    shared = [stage for stage in stages if _adopt(run / stage, described[stage], directory)]
    began = time.monotonic()
    try:
        with (directory / f"{name}.log").open("a") as log, console.status(head, spinner_style="dim"):
            quiet = Console(file=log, width=120, force_terminal=False)
            run_recipe(recipe, root=directory, name=name, console=quiet, seed=seed, tiny=tiny, command=command)
    except Stopped as stopped:
        say(console, stopped.line)
        raise
    taken = f" ({', '.join(shared)} shared)" if shared else ""
    return duration(time.monotonic() - began) + taken


def _adopt(stage: Path, described: Mapping[str, Any], sweep: Path) -> bool:
    """Link a stage that another run of the sweep finished with the same key: the same work would give the same files."""
    if stage.exists():
        return False
    for other in sorted(sweep.glob(f"*-seed*/{stage.name}")):
        if decide(other, described).what == "skip":
            partial = stage.with_name(f".shared-{stage.name}")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(other, partial, copy_function=_link, ignore=shutil.ignore_patterns("checkpoints"))
            os.replace(partial, stage)
            return True
    return False


def _link(source: str, target: str) -> None:
    """Link a file, or copy it where the file system has no links; finished stages are never written in place."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


# ---------------------------------------------------------------------------- comparison


def compare_points(
    points: Sequence[Point], directory: Path, seeds: int, metric: str | None, base: Point, failed: Mapping[str, str]
) -> dict[str, Any]:
    """Return the metric, each point's values, and each point's difference from the baseline with interval and p.

    Raises:
        ConfigError: no run finished, or an unknown metric.
    """
    views = {
        (point.name, seed): read_run(directory / f"{point.name}-seed{seed}")
        for point in points
        for seed in range(seeds)
        if f"{point.name}-seed{seed}" not in failed
    }
    if not views:
        raise ConfigError(f"every run failed; first: {next(iter(failed.values()))}")
    tables = {key: numbers(view) for key, view in views.items()}
    metric = choose_metric(metric, next(iter(tables.values())))
    rows = {key: rows_of(view, metric) for key, view in views.items()}
    entries = [_point_entry(point, seeds, tables, metric, failed) for point in points]
    compared = [_comparison(point, base, seeds, tables, rows, metric) for point in points if point is not base]
    known = [entry for entry in compared if entry["p"] is not None]
    for entry, corrected in zip(known, holm([entry["p"] for entry in known]) if known else [], strict=True):
        entry["p_holm"] = float(corrected)
        entry["shown"] = bool(corrected <= 1 - LEVEL)
    return {
        "metric": metric,
        "metrics": sorted(next(iter(tables.values()))),
        "level": LEVEL,
        "baseline": base.name,
        "points": entries,
        "comparisons": compared,
    }


def _point_entry(
    point: Point,
    seeds: int,
    tables: Mapping[tuple[str, int], Mapping[str, float]],
    metric: str,
    failed: Mapping[str, str],
) -> dict[str, Any]:
    """Return a point's options, its value of the metric by seed and on average, and all its numbers by seed."""
    runs = {seed: f"{point.name}-seed{seed}" for seed in range(seeds)}
    found = [tables.get((point.name, seed), {}) for seed in range(seeds)]
    values = [table.get(metric) for table in found]
    finite = [value for value in values if value is not None]
    return {
        "name": point.name,
        "label": point.label,
        "options": dict(point.options),
        "runs": list(runs.values()),
        "failed": {run: failed[run] for run in runs.values() if run in failed},
        "values": values,
        "mean": float(np.mean(finite)) if finite else None,
        "numbers": {name: [table.get(name) for table in found] for name in dict.fromkeys(itertools.chain(*found))},
    }


def _comparison(
    point: Point,
    base: Point,
    seeds: int,
    tables: Mapping[tuple[str, int], Mapping[str, float]],
    rows: Mapping[tuple[str, int], list[float] | None],
    metric: str,
) -> dict[str, Any]:
    """Compare a point with the baseline over the seeds that both finished, or over prompts where seeds are too few."""
    keys = [((point.name, seed), (base.name, seed)) for seed in range(seeds)]
    keys = [pair for pair in keys if all(metric in tables.get(key, {}) for key in pair)]
    entry: dict[str, Any] = {"point": point.name, "baseline": base.name, "seeds": len(keys), "unit": None, "n": 0}
    entry |= {"mean": None, "low": None, "high": None, "p": None, "p_holm": None, "shown": False}
    if not keys:
        return entry
    sides = [[tables[pair[side]][metric] for pair in keys] for side in (0, 1)]
    entry["mean"] = float(np.mean(sides[0]) - np.mean(sides[1]))
    tested = [[rows.get(pair[side]) for pair in keys] for side in (0, 1)]
    lengths = {None if row is None else len(row) for side in tested for row in side}
    if len(keys) >= FEWEST_SEEDS:
        entry["unit"] = "seed"
    elif None not in lengths and len(lengths) == 1:
        entry["unit"] = "ranking" if metric.startswith("reward_accuracy/") else "prompt"
        sides = [np.mean(np.array(side, dtype=np.float64), axis=0).tolist() for side in tested]
    else:
        return entry
    interval, p = paired_test(sides[0], sides[1], level=LEVEL)
    entry["mean"] = interval.mean
    bounds = {
        key: value if np.isfinite(value) else None for key, value in (("low", interval.low), ("high", interval.high))
    }
    return entry | {"n": interval.n, "p": p} | bounds
