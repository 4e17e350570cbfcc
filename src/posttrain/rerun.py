"""Run again what a run's record says it was: the same stages and options, checked against the same files and code."""

from __future__ import annotations

import collections.abc
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from posttrain.errors import ConfigError
from posttrain.evals.tables import rich_grid
from posttrain.graph import ordered, read_json, stage_config, until_stage
from posttrain.manifest import circumstances, stage_record
from posttrain.registry import load_object
from posttrain.run_diff import Difference, circumstance_differences, data_differences, difference_table
from posttrain.runner import run_directory, run_recipe, say
from posttrain.stages import Recipe, Stage

HARMLESS = ("hardware.", "environment.", "git")
"""Circumstances that are printed and refuse nothing; others (versions, code) do."""


def rerun(
    directory: Path,
    *,
    root: Path = Path("runs"),
    name: str | None = None,
    allow_changed: bool = False,
    console: Console | None = None,
    command: str = "",
) -> Path:
    """Run a recorded run again in ``root/name`` and return that directory; an unfinished rerun goes on.

    Args:
        directory: of the run to repeat.
        root: where runs are kept.
        name: of the new run; the old one's with ``-rerun`` and a number if that is taken, if None.
        allow_changed: whether to run although data, weights, code or versions are not those recorded.
        console: where differences and progress are printed.
        command: what continues the new run; without ``--name`` it is completed.

    Raises:
        ConfigError: no complete record, changed data, weights, code or versions, or a directory that holds another run.
    """
    console = console or Console()
    record = read_record(directory)
    recipe = rebuild(record)
    name = name or free_name(root, f"{directory.name}-rerun")
    new = run_directory(root, name)
    _check_target(directory, new, record)
    use_threads((record.get("hardware") or {}).get("threads"), console)
    found = {"stages": {}} | circumstances(recipe)
    reached = until_stage(ordered(recipe), record.get("until"))
    found["stages"] = {key: stage_record(stage, recipe, record["tiny"]) for key, stage in reached.items()}
    changes = data_differences(record, found) + circumstance_differences(record, found)
    refusing = [item for item in changes if not item.what.startswith(HARMLESS)]
    if changes:
        console.print(rich_grid(difference_table("Changed since the run", changes, ("then", "now"))))
    if refusing and not allow_changed:
        raise ConfigError(_refusal(directory, refusing))
    return run_recipe(
        recipe,
        root=root,
        name=name,
        until=record.get("until"),
        console=console,
        seed=record["seed"],
        tiny=record["tiny"],
        allow_changed=allow_changed,
        command=command if not command or "--name" in command else f"{command} --name {name}",
    )


def read_record(directory: Path) -> dict[str, Any]:
    """Read a run's ``run.json``.

    Raises:
        ConfigError: there is none, or it lacks what a rerun needs.
    """
    record = read_json(directory / "run.json")
    if record is None:
        raise ConfigError(f"{directory} is not a run: it has no run.json; expected runs/NAME")
    complete = "code" in record and all("type" in stage for stage in record.get("stages", {}).values())
    if not complete:
        again = record.get("command", "its command")
        raise ConfigError(f"{directory / 'run.json'} records too little to repeat the run; use its command: {again}")
    return record


def rebuild(record: Mapping[str, Any]) -> Recipe:
    """Build the recipe whose stages ``run.json`` describes, inputs before readers.

    Raises:
        ConfigError: a stage whose class is gone or is no stage, or a field that its record does not restore.
    """
    stages: dict[str, Stage] = {}
    for name, entry in record["stages"].items():
        kind = load_object(entry["type"])
        if not (isinstance(kind, type) and issubclass(kind, Stage)):
            raise ConfigError(f"stage '{name}' is recorded as '{entry['type']}', which is no stage")
        hints = typing.get_type_hints(kind)
        unknown = sorted(set(entry["config"]) - set(hints))
        if unknown:
            raise ConfigError(f"stage '{name}' is recorded with '{unknown[0]}', which {kind.__name__} no longer has")
        fields: dict[str, Any] = {key: restore(value, hints[key]) for key, value in entry["config"].items()}
        fields |= _inputs({field: stages[other] for field, other in entry["inputs"].items()})
        stages[name] = kind(**fields)
        now = stage_config(stages[name])
        lost = [key for key in now if repr(now[key]) != repr(entry["config"].get(key))]
        if lost:
            was = entry["config"].get(lost[0])
            problem = f"was {was!r} and would be {now[lost[0]]!r}"
            raise ConfigError(f"stage '{name}', field '{lost[0]}' {problem}; run the recipe from Python instead")
    typed = {name: frozenset(entry["typed"]) for name, entry in record["stages"].items() if "typed" in entry}
    return Recipe(record["recipe"], stages, record.get("summary", ""), typed)


def restore(value: Any, kind: Any) -> Any:
    """Turn a value of ``run.json`` back into what its annotation says: paths, tuples, functions; others are as they are."""
    kinds = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    origins = [typing.get_origin(one) or one for one in kinds]
    if isinstance(value, list) and list not in origins:
        return tuple(restore(item, Any) for item in value)
    if isinstance(value, str) and str not in origins:
        if Path in origins:
            return Path(value)
        if collections.abc.Callable in origins and ":" in value:
            return load_object(value)
    return value


def _inputs(stages: Mapping[str, Stage]) -> dict[str, Any]:
    """Return input fields: a stage, or for ``field.0``, ``field.1`` ... a tuple of them."""
    found: dict[str, Any] = {}
    for name, stage in stages.items():
        field, dot, _ = name.partition(".")
        found[field] = (*found.get(field, ()), stage) if dot else stage
    return found


def use_threads(count: int | None, console: Console) -> None:
    """Let torch use as many threads as a run did, and say so: sums are cut by thread, and rounded accordingly."""
    import torch

    now = torch.get_num_threads()
    if count is not None and count != now:
        torch.set_num_threads(count)
        say(console, f"threads set to {count}, as in the run; the environment says {now}")


def free_name(root: Path, name: str) -> str:
    """Return the name, or the first of ``name-2``, ``name-3`` ... that no directory has."""
    number, candidate = 1, name
    while (root / candidate).exists():
        number += 1
        candidate = f"{name}-{number}"
    return candidate


def _check_target(old: Path, new: Path, record: Mapping[str, Any]) -> None:
    """Refuse a directory that holds the run itself, or one of other stages, which would be cleared."""
    if new.resolve() == old.resolve():
        raise ConfigError(f"{new} is the run itself; choose another --name")
    there = read_json(new / "run.json")
    if there is not None:
        keys = ("seed", "tiny")
        same = [there.get(key) for key in keys] == [record.get(key) for key in keys]
        configs = [
            {name: (stage.get("config"), stage.get("typed")) for name, stage in one.get("stages", {}).items()}
            for one in (there, record)
        ]
        if not same or configs[0] != configs[1]:
            raise ConfigError(f"{new} holds a run with other options, which would be cleared; choose another --name")


def _refusal(directory: Path, refusing: list[Difference]) -> str:
    """Return the line that refuses a rerun: what changed, the first three by name."""
    names = [item.what for item in refusing]
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{directory} ran with other data, code or versions: {listed}; --allow-changed runs it all the same"
