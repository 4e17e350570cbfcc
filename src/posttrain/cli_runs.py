"""Commands that treat runs as experiments: ``diff``, ``replay``, ``rerun`` and ``sweep``."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.arguments import keyword_options
from posttrain.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from posttrain.sweep import Point

SEPARATOR = "\x1f"
"""Stands between the values of one option on their way through the parser, which knows one value an option."""


def diff(run: str, second_run: str, /) -> int:
    """Print what differs between two runs; exit status 0 = equal to the bit, 1 = they differ.

    Compared are settings, data, versions, code and hardware; each stage's metrics, step by step to the first that
    differs; weights, samples and results. Versions, code and hardware alone make no difference of the outcome: they
    are printed and leave the status 0. RUN is a name under runs/ or a directory.
    """
    from posttrain import cli

    directories = cli.find_run(run), cli.find_run(second_run)  # before the imports, which take seconds
    from rich.console import Console

    from posttrain.run_diff import compare_runs, print_diff

    found = compare_runs(*directories)
    print_diff(found, Console())
    return 0 if found.equal else 1


def replay(dump: str, /) -> None:
    """Compute a skipped step again from what was kept of it, RUN/STAGE/faults/step-N; print what is not finite."""
    from posttrain.replay import replay_dump

    print(replay_dump(Path(dump)))


def rerun(run: str, /, *, name: str | None = None, allow_changed: bool = False) -> int:
    """Run a run again from its record, then print the diff; exit status 0 = equal to the bit, 1 = they differ.

    Refused where data, weights, code or versions are not those recorded.

    --name NAME         name of the new run (default: the old one's with -rerun)
    --allow-changed     run it all the same; what changed is printed
    """
    from posttrain import cli

    directory = cli.find_run(run)
    from rich.console import Console

    from posttrain.rerun import rerun as repeat
    from posttrain.run_diff import compare_runs, print_diff

    console, command = Console(), cli.command_line()
    new = repeat(directory, root=cli.RUNS, name=name, allow_changed=allow_changed, console=console, command=command)
    console.print()
    found = compare_runs(directory, new)
    print_diff(found, console)
    return 0 if found.equal else 1


def sweep(
    recipe: str,
    /,
    *,
    seeds: int = 3,
    metric: str | None = None,
    baseline: str | None = None,
    name: str | None = None,
    tiny: bool = False,
    dry_run: bool = False,
    **more: str | None,
) -> int:
    """Run a recipe at several values of its options, with several seeds, and compare the points.

    A run is runs/SWEEP/POINT-seedN. Repeated, the command skips what is finished. Exit status 1: a run failed.

    --STAGE.FIELD V V   values of a field; several fields with several values make a grid
    --seeds N           seeds 0 to N-1 at every point (default: 3)
    --metric NAME       the number compared (default: the last policy's held-out reward; a wrong name lists all)
    --baseline POINT    the point that others are compared with (default: the first)
    --name NAME         name of the sweep, a directory under runs/ (default: the recipe's with -sweep)
    --tiny              run every stage at the size of the small world; values typed beside it stay
    --dry-run           print the points with a forecast of time and memory; compute nothing
    """
    from posttrain import cli

    given = {key: (value or "").split(SEPARATOR) if value is not None else [None] for key, value in more.items()}
    axes = {key: [value for value in values if value is not None] for key, values in given.items() if len(values) > 1}
    fixed = {key: values[0] for key, values in given.items() if len(values) == 1}
    clash = set(cli.recipe_options(recipe)) & set(keyword_options(sweep))
    if clash:
        raise ConfigError(
            f"recipe '{recipe}' has a parameter '{min(clash)}', an option of `posttrain sweep`; rename it"
        )
    from rich.console import Console

    from posttrain.runner import run_directory
    from posttrain.sweep import Point, grid, run_sweep

    points = [Point(options=options, recipe=cli.build_recipe(recipe, fixed | options)) for options in grid(axes)]
    title = name or points[0].recipe.name + "-sweep" + ("-tiny" if tiny else "")
    directory, console = run_directory(cli.RUNS, title), Console()
    if dry_run:
        forecast_sweep(points, directory, seeds, baseline, console, tiny)
        return 0
    found = run_sweep(
        points,
        directory=directory,
        seeds=seeds,
        metric=metric,
        baseline=baseline,
        fixed={key: str(value) for key, value in fixed.items()},
        console=console,
        tiny=tiny,
        command=cli.command_line(),
    )
    show_sweep(found, directory)
    return 1 if any(point["failed"] for point in found["points"]) else 0


def forecast_sweep(
    points: Sequence[Point], directory: Path, seeds: int, baseline: str | None, console: Console, tiny: bool
) -> None:
    """Print what one run of a sweep costs, and every run that there would be."""
    from posttrain.forecast import dry_run
    from posttrain.runner import say
    from posttrain.sweep import check_points, find_baseline

    check_points(points, tiny)
    base = find_baseline(points, baseline)
    dry_run(points[0].recipe, console=console, tiny=tiny)
    say(console, f"{len(points) * seeds} runs ({len(points)} points with {seeds} seeds), each at most as above:")
    for point in points:
        mark = " (baseline)" if point is base and len(points) > 1 else ""
        more = f" to {seeds - 1}" if seeds > 1 else ""
        say(console, f"  {directory / point.name}-seed0{more}{mark}")


def show_sweep(found: Mapping[str, object], directory: Path) -> None:
    """Print a sweep's table and paths, and write its picture."""
    from rich.console import Console

    from posttrain.evals.sweep_view import sweep_grid, sweep_png
    from posttrain.evals.tables import rich_grid
    from posttrain.runner import say

    console, image = Console(), directory / "sweep.png"
    partial = image.with_suffix(".part")
    partial.write_bytes(sweep_png(found))
    os.replace(partial, image)
    console.print()
    console.print(rich_grid(sweep_grid(found)))
    say(console, f"picture  {image}\nnumbers  {directory / 'sweep.json'}\nruns     {directory}/POINT-seedN")


def show_finished(directory: Path) -> None:
    """Show the sweep that a directory holds.

    Raises:
        ConfigError: its runs were never compared.
    """
    from posttrain.graph import read_json

    found = read_json(directory / "sweep.json") or {}
    if "points" not in found:
        problem = f"{directory} is a sweep that was cut off; repeat its command to finish it"
        raise ConfigError(f"{problem}, or show one of its runs, {directory}/POINT-seedN")
    if "objectives" in found:
        from posttrain.cli_compare import show_compare

        return show_compare(found, directory)
    show_sweep(found, directory)


def gather(args: list[str]) -> list[str]:
    """Join the values that follow one option of a recipe or stage, ``--dpo.beta 0.05 0.1``, into one argument.

    Options of ``posttrain sweep`` itself take one value and stay as they are.
    """
    own = {"--" + key.replace("_", "-") for key in inspect.signature(sweep).parameters}
    found: list[str] = []
    rest = list(args)
    while rest:
        item = rest.pop(0)
        if not item.startswith("--") or "=" in item or item in own:
            found.append(item)
            continue
        values = []
        while rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        found.append(f"{item}={SEPARATOR.join(values)}" if values else item)
    return found
