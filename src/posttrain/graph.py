"""A recipe as a graph of stages: order, overrides, and the keys that say which results are still valid."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from posttrain import __version__, doctor
from posttrain.errors import ConfigError, suggest
from posttrain.stages import Recipe, Stage
from posttrain.types import stable_hash

LIBRARIES = ["torch", "transformers", "tokenizers", "peft", "numpy"]
"""Libraries whose version can change a number."""


def stage_inputs(stage: Stage) -> dict[str, Stage]:
    """Return a stage's inputs by field name; members of a tuple or list are ``field.0``, ``field.1`` ..."""
    found: dict[str, Stage] = {}
    for field in dataclasses.fields(stage):
        value = getattr(stage, field.name)
        if isinstance(value, Stage):
            found[field.name] = value
        elif isinstance(value, (tuple, list)) and any(isinstance(item, Stage) for item in value):
            for index, item in enumerate(value):
                if not isinstance(item, Stage):
                    where = f"{type(stage).__name__} field '{field.name}' item {index}"
                    raise ConfigError(f"{where}: got {item!r} among stages; expected only stages there")
                found[f"{field.name}.{index}"] = item
    return found


def ordered(recipe: Recipe) -> dict[str, Stage]:
    """Return the stages with every input before its reader, otherwise in the recipe's order.

    Raises:
        ConfigError: stages need each other, an input is not in the recipe, a stage stands there twice.
    """
    names = {id(stage): name for name, stage in recipe.stages.items()}
    if len(names) < len(recipe.stages):
        raise ConfigError(f"recipe '{recipe.name}' lists one stage under two names; make two stages of it")
    done: dict[str, Stage] = {}
    path: list[str] = []

    def visit(name: str) -> None:
        if name in done:
            return
        if name in path:
            loop = " -> ".join([*path[path.index(name) :], name])
            raise ConfigError(f"recipe '{recipe.name}': stages need each other ({loop}); refer to earlier stages only")
        path.append(name)
        for field, stage in stage_inputs(recipe.stages[name]).items():
            if id(stage) not in names:
                problem = f"field '{field}' refers to a {type(stage).__name__} that is not in the recipe"
                raise ConfigError(f"recipe '{recipe.name}', stage '{name}': {problem}; list it among the stages")
            visit(names[id(stage)])
        done[path.pop()] = recipe.stages[name]

    for name in recipe.stages:
        if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name):
            raise ConfigError(f"recipe '{recipe.name}': got the stage name '{name}'; expected letters, digits, - or _")
        visit(name)
    return done


def until_stage(stages: Mapping[str, Stage], until: str | None) -> dict[str, Stage]:
    """Return the stages up to and including ``until``; all of them if None."""
    names = list(stages)
    if until is not None and until not in names:
        raise ConfigError(f"unknown stage '{until}'; {suggest(until, names)}")
    return {name: stages[name] for name in names[: names.index(until) + 1 if until else None]}


def override(recipe: Recipe, changes: Mapping[str, Mapping[str, Any]]) -> Recipe:
    """Return the recipe with fields of stages replaced, and typed; stages that refer to a changed stage see the new one.

    Args:
        recipe: left as it is.
        changes: stage name -> field -> new value.
    """
    new: dict[int, Stage] = {}  # by identity of the old stage: equal stages under two names are still two

    def renewed(value: Any) -> Any:
        if isinstance(value, Stage):
            return new[id(value)]
        return type(value)(map(renewed, value)) if type(value) in (tuple, list) else value

    for name in changes:
        if name not in recipe.stages:
            raise ConfigError(f"unknown stage '{name}'; {suggest(name, recipe.stages)}")
    for name, stage in ordered(recipe).items():
        fields = {field.name: renewed(getattr(stage, field.name)) for field in dataclasses.fields(stage)}
        for field, value in changes.get(name, {}).items():
            if field not in fields:
                raise ConfigError(f"stage '{name}' has no field '{field}'; {suggest(field, fields)}")
            fields[field] = value
        new[id(stage)] = dataclasses.replace(stage, **fields)
    typed = {name: recipe.typed.get(name, frozenset()) | set(fields) for name, fields in changes.items()}
    stages = {name: new[id(stage)] for name, stage in recipe.stages.items()}
    return dataclasses.replace(recipe, stages=stages, typed={**recipe.typed, **typed})


def typed_fields(
    function: Callable[..., Recipe], given: Mapping[str, Any], recipe: Recipe
) -> dict[str, frozenset[str]]:
    """Return the fields, by stage, that the options given to a recipe's function set, of those that ``--tiny`` would set.

    They are those that change when an option is left out; where it was given its default, or can't be left out, those of
    the same text, or of the option's name and value. Those that the recipe itself calls typed come first.
    """
    found = dict(recipe.typed)
    for key, value in given.items():
        default = inspect.signature(function).parameters[key].default
        others: Mapping[str, Stage] = {}
        if default is not inspect.Parameter.empty and default != value:
            with suppress(Exception):  # whatever a recipe raises that can't do without it
                others = function(**{other: item for other, item in given.items() if other != key}).stages
        for name, stage in recipe.stages.items():
            values = {f: now for f in stage.TINY if not isinstance(now := getattr(stage, f), Stage)}
            if name in others:
                own = {field for field, now in values.items() if now != getattr(others[name], field, now)}
            else:
                own = {f for f, now in values.items() if now == value and (isinstance(value, str) or f == key)}
            found[name] = found.get(name, frozenset()) | own
    return found


def plain(value: Any, where: str) -> Any:
    """Return a value as JSON that is the same in every process, for keys and manifests.

    Raises:
        ConfigError: a value whose text would not be, such as a lambda; ``where`` names the field.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Enum):
        return plain(value.value, where)
    if isinstance(value, Mapping):
        return {str(key): plain(item, where) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item, where) for item in value), key=repr)
    if isinstance(value, (tuple, list)):
        return [plain(item, where) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = {field.name: plain(getattr(value, field.name), where) for field in dataclasses.fields(value)}
        return {"class": type(value).__name__} | items
    name = getattr(value, "__qualname__", "")
    if name and "<" not in name:  # a function or class that its import path identifies
        return f"{value.__module__}:{name}"
    if name or " at 0x" in str(value):
        raise ConfigError(
            f"{where}: got {value!r}; expected a value with a stable text: a number, name, named function"
        )
    return str(value)


def stage_config(stage: Stage) -> dict[str, Any]:
    """Return a stage's fields as JSON, without those that are inputs."""
    inputs = {name.partition(".")[0] for name in stage_inputs(stage)}
    names = [field.name for field in dataclasses.fields(stage) if field.name not in inputs]
    return {name: plain(getattr(stage, name), f"{type(stage).__name__} field '{name}'") for name in names}


def content_hash(path: Path) -> str:
    """Return 16 hex digits of SHA-256 over a file's bytes, or over names and bytes of a directory's files."""
    if path.is_dir():
        files = sorted(item for item in path.rglob("*") if item.is_file())
        return stable_hash([[str(item.relative_to(path)), content_hash(item)] for item in files])
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise ConfigError(f"can't read the data file '{path}': {error.strerror}; check the path") from error


def describe(
    stages: Mapping[str, Stage], *, seed: int, tiny: bool, typed: Mapping[str, Collection[str]] | None = None
) -> dict[str, dict[str, Any]]:
    """Return each stage's ``stage.json``, for stages in run order.

    ``key`` hashes all that decides the result: class, fields, keys of inputs, data files (name and contents,
    not place), seed, size, fields whose ``typed`` values a tiny run keeps, and version; fields of ``KNOBS``, which can't
    change a result, are left out. ``inputs`` are the names of the inputs, for readers; ``versions`` are those of
    libraries, which matter only while a stage is unfinished.
    """
    names = {id(stage): name for name, stage in stages.items()}
    found: dict[str, dict[str, Any]] = {}
    for name, stage in stages.items():
        inputs = {field: names[id(other)] for field, other in stage_inputs(stage).items()}
        held = stage.held(tiny, (typed or {}).get(name, ()))
        identity = {
            "class": type(stage).__name__,
            "config": stage_config(stage),
            "input_keys": {field: found[other]["key"] for field, other in inputs.items()},
            "files": [[path.name, content_hash(path)] for path in getattr(stage.sized(tiny, held), "files", list)()],
            "seed": seed,
            "tiny": tiny,
            **({"typed": held} if held else {}),
            "version": __version__,
        }
        decisive = {key: value for key, value in identity["config"].items() if key not in stage.KNOBS}
        found[name] = {
            "key": stable_hash(identity | {"config": decisive}),
            "inputs": inputs,
            **identity,
            "versions": doctor.versions(LIBRARIES),
        }
    return found


def read_json(path: Path) -> dict[str, Any] | None:
    """Read what `write_json` wrote; None if there is no such file."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(
            f"{path} is not JSON ({error}); delete it (a stage's: its whole directory) to run again"
        ) from error


class Decision(NamedTuple):
    """What happens to a stage, ``start``, ``continue``, ``skip``, ``clear`` (then start) or ``changed``, and why.

    ``changed``: it was begun under other settings, and a person must say what is to become of it.
    """

    what: str
    why: str = ""


def decide(directory: Path, described: Mapping[str, Any]) -> Decision:
    """Compare a stage's directory with what is asked of it now."""
    old, done = read_json(directory / "stage.json"), read_json(directory / "done.json")
    if old is None:
        found = directory.iterdir() if directory.exists() else ()
        stray = [path.name for path in found if path.name != "stage.json.tmp"]
        if stray:
            problem = f"{directory} holds '{stray[0]}' but no stage.json"
            raise ConfigError(f"{problem}; move it away or choose another --name")
        return Decision("start")
    if old.get("key") != described["key"]:
        return Decision("changed", _changes(old, described) or "its key was made by another version of posttrain")
    if done is None:
        libraries = _differences(old.get("versions", {}), described["versions"])
        return Decision("changed", "; ".join(libraries)) if libraries else Decision("continue")
    if done.get("key") != described["key"]:
        return Decision("changed", "its done.json belongs to other settings")
    if lost := _lost(directory, done):
        return Decision("clear", f"its output {lost} is gone")
    return Decision("skip", f"{done['seconds']:.0f} s")


def settle(
    directory: Path, decisions: Mapping[str, Decision], *, allow_changed: bool, restart_changed: bool
) -> dict[str, Decision]:
    """Decide what becomes of changed stages: gone on with, or skipped if finished; cleared and run again; refused.

    Raises:
        ConfigError: a stage changed and neither was asked for; the message shows what differs.
    """
    changed = {stage: why for stage, (what, why) in decisions.items() if what == "changed"}
    if changed and allow_changed == restart_changed:
        shown = "; ".join(f"stage '{stage}': {why}" for stage, why in changed.items())
        raise ConfigError(
            f"{directory} was begun under other settings ({shown}); --allow-changed keeps what is there, goes on, and records "
            "the difference in run.json; --restart-changed clears these stages and runs them again; another --name keeps both"
        )
    out = dict(decisions)
    for stage, why in changed.items():
        done = read_json(directory / stage / "done.json")
        if restart_changed:
            out[stage] = Decision("clear", why)
        elif done is None:
            out[stage] = Decision("continue", why)
        elif lost := _lost(directory / stage, done):
            out[stage] = Decision("clear", f"its output {lost} is gone")
        else:
            out[stage] = Decision("skip", f"{done['seconds']:.0f} s")
    return out


def _lost(directory: Path, done: Mapping[str, Any]) -> str | None:
    """An output that a finished stage no longer has, whole."""
    files = {name: directory / name for name in done["outputs"]}
    return next((n for n, f in files.items() if not f.exists() or f.stat().st_size != done["outputs"][n]), None)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Each field of two mappings whose values differ, with both."""
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return [f"{name} was {old.get(name)!r}, is {new.get(name)!r}" for name in names]


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Name what differs between two descriptions of a stage, the fields with both values."""
    found = _differences(old.get("config", {}), new["config"])
    names = ("class", "seed", "tiny", "typed", "version")
    found += _differences(*({n: one.get(n) for n in names} for one in (old, new)))
    if old.get("files") != new["files"]:
        found += _files(old.get("files") or [], new["files"])
    if old.get("input_keys") != new["input_keys"]:
        found.append("an input changed")
    return "; ".join(found)


def _files(old: Sequence[Sequence[str]], new: Sequence[Sequence[str]]) -> list[str]:
    """Name the files that differ, with the hashes of both."""
    before, after = ({name: digest for name, digest in files} for files in (old, new))  # noqa: C416
    return [f"file {text}" for text in _differences(before, after)] or ["a data file changed"]
