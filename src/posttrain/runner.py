"""Run a recipe's stages in order: skip what is finished, continue what was cut off, say what happens and why.

A run is a directory ``runs/NAME`` with ``run.json`` and one directory a stage. A stage's ``stage.json`` is
written before it starts and its ``done.json`` after everything else, both atomically; both carry the stage's
key, a hash of all that decides its result. A finished stage is one whose ``done.json`` has the present key.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from posttrain import ranks
from posttrain.errors import ConfigError
from posttrain.graph import (
    Decision,
    decide,
    describe,
    ordered,
    read_json,
    settle,
    until_stage,
)
from posttrain.manifest import manifest
from posttrain.stages import Context, Recipe, Stage
from posttrain.train.signals import Terminated, sigterm_interrupts


class Stopped(SystemExit):
    """A run that ended early but can go on: ``code`` is the exit status, ``line`` what was printed.

    A SystemExit, so that ``except Exception`` can't swallow Ctrl-C and a script ends with the right status.
    """

    def __init__(self, line: str, code: int) -> None:
        super().__init__(code)
        self.line = line


def run_recipe(
    recipe: Recipe,
    *,
    root: Path = Path("runs"),
    name: str | None = None,
    until: str | None = None,
    console: Console | None = None,
    seed: int = 0,
    tiny: bool = False,
    command: str = "",
    resume: bool = False,
    allow_changed: bool = False,
    restart_changed: bool = False,
) -> Path:
    """Run a recipe's stages in ``root/name`` and return that directory; finished stages are skipped.

    Args:
        recipe: the stages.
        root: where runs are kept.
        name: of the run; the recipe's name if None, with ``-tiny`` if ``tiny``.
        until: the last stage to run; all if None.
        console: where progress is printed.
        seed: of every random draw.
        tiny: whether stages run at the size of the small world; fields that the recipe calls typed keep their values.
        command: what continues this run, for messages and ``run.json``; this process's own if empty.
        resume: refuse to begin anew, and to do nothing.
        allow_changed: keep what was begun under other settings, data or libraries; ``run.json`` records the difference.
        restart_changed: clear such stages and run them again; with neither, they are refused.

    Raises:
        ConfigError: a graph, name or file that can't be used, a run that another process works on or that can't go on.
        Stopped: Ctrl-C (130), SIGTERM (143), full disk or out of memory (1); a line says how to go on.
    """
    if ranks.follower():
        ranks.follow(recipe, seed=seed, tiny=tiny)
    console = console or Console()
    command = command or shlex.join([Path(sys.executable).name, *sys.argv])
    stages = until_stage(ordered(recipe), until)
    described = describe(stages, seed=seed, tiny=tiny, typed=recipe.typed)
    directory = run_directory(root, name or recipe.name + ("-tiny" if tiny else ""))
    for stage_name, stage in stages.items():  # before anything is written or computed
        if decide(directory / stage_name, described[stage_name]).what != "skip":
            getattr(stage, "check", lambda: None)()
    if resume and not (directory / "run.json").exists():
        raise ConfigError(f"there is no run in {directory} to resume; leave --resume out to begin one")
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory, console), sigterm_interrupts(), ranks.leading():
        found = {stage: decide(directory / stage, described[stage]) for stage in stages}
        decisions = settle(directory, found, allow_changed=allow_changed, restart_changed=restart_changed)
        if resume and all(what == "skip" for what, _ in decisions.values()):
            raise ConfigError(f"every stage of {directory} is finished; --resume has nothing to do; leave it out")
        place = str(directory)
        try:
            _announce_clearing(console, directory, decisions)
            record = manifest(directory, recipe, decisions, command=command, seed=seed, tiny=tiny, until=until)
            _record(console, directory, record, found, decisions, described)
            for place in _run_stages(console, directory, stages, decisions, described, seed=seed, tiny=tiny):  # noqa: B007
                pass
        except BaseException as error:
            stopped = _explain(console, error, place, command)
            if stopped is None:
                raise
            raise stopped from error
    return directory


def _run_stages(
    console: Console,
    directory: Path,
    stages: Mapping[str, Stage],
    decisions: Mapping[str, Decision],
    described: Mapping[str, Mapping[str, Any]],
    *,
    seed: int,
    tiny: bool,
) -> Iterator[str]:
    """Run what is to be run; yields each such stage's place, for messages, right before it begins."""
    for number, (stage, (what, why)) in enumerate(decisions.items(), 1):
        head = f"[{number}/{len(stages)}] {stage}"
        say(console, f"{head}: {_PROGRESS[what].format(why)}")
        if what != "skip":
            yield f"stage '{stage}' of {directory}"
            inputs = {field: directory / other for field, other in described[stage]["inputs"].items()}
            typed = frozenset(described[stage].get("typed", ()))
            ctx = Context(dir=directory / stage, inputs=inputs, console=console, seed=seed, tiny=tiny, typed=typed)
            seconds = _run_stage(stages[stage], ctx, described[stage], clear=what == "clear")
            say(console, f"{head}: done in {duration(seconds)}")
    if all(what == "skip" for what, _ in decisions.values()):
        say(console, f"every stage of {directory} was finished before; nothing was computed")


def _record(
    console: Console,
    directory: Path,
    record: dict[str, Any],
    found: Mapping[str, Decision],
    decisions: Mapping[str, Decision],
    described: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write ``run.json``, with the differences a person allowed; finished stages that have one get the present key."""
    allowed = {s: d.why for s, d in found.items() if d.what == "changed" and decisions[s].what in ("continue", "skip")}
    if allowed:
        record["attempts"][-1]["allowed"] = allowed
    write_json(directory / "run.json", record)
    hashes = [attempt.get("code") for attempt in record["attempts"]][-2:]
    if len(set(hashes)) == 2 and any(d.what == "continue" for d in decisions.values()):
        say(
            console,
            f"{directory}: its code changed since ({hashes[0]}, now {hashes[1]}); it may go on otherwise than before",
        )
    for stage, why in allowed.items():
        say(console, f"{directory / stage}: kept although {why}")
        _drop_unused(directory / stage)
        if decisions[stage].what == "skip":
            old, done = (read_json(directory / stage / name) or {} for name in ("stage.json", "done.json"))
            write_json(directory / stage / "stage.json", {**described[stage], "seconds": old.get("seconds", 0.0)})
            write_json(directory / stage / "done.json", {**done, "key": described[stage]["key"]})


def _drop_unused(directory: Path) -> None:
    """Delete journalled rollouts that no checkpoint used: under other settings they would be other ones."""
    steps = [path.name.removeprefix("step-") for path in (directory / "checkpoints").glob("step-*")]
    newest = max((int(step) for step in steps if step.isdigit()), default=0)
    for path in (directory / "journal").glob("step-*.jsonl"):
        if int(path.stem.removeprefix("step-")) >= newest:
            path.unlink()


_PROGRESS = {
    "start": "starts",
    "clear": "cleared, starts again",
    "continue": "was cut off, continues from its last checkpoint",
    "skip": "finished earlier in {}, skipped",
}


def _run_stage(stage: Stage, ctx: Context, described: Mapping[str, Any], *, clear: bool) -> float:
    """Run one stage between ``stage.json`` and ``done.json``; return its seconds over all attempts."""
    trash = ctx.dir.with_name(f".cleared-{ctx.dir.name}")
    if trash.exists():
        shutil.rmtree(trash)
    if clear:
        ctx.dir.rename(trash)  # at once: a deletion cut off half-way would leave a directory nobody can read
        shutil.rmtree(trash)
    ctx.dir.mkdir(exist_ok=True)
    for path in [*ctx.dir.rglob(".tmp*"), *ctx.dir.rglob(".*.tmp")]:  # killed while safetensors or JSON was written
        if path.is_file():
            path.unlink()
    earlier = (read_json(ctx.dir / "stage.json") or {}).get("seconds", 0.0)
    write_json(ctx.dir / "stage.json", {**described, "seconds": earlier})
    began = time.monotonic()
    try:
        with ranks.announced(stage, ctx):
            stage.run(ctx)
    except BaseException:
        with suppress(OSError):  # the disk may be full, and that is what gets reported
            write_json(ctx.dir / "stage.json", {**described, "seconds": earlier + time.monotonic() - began})
        raise
    seconds = earlier + time.monotonic() - began
    done = {"key": described["key"], "seconds": seconds, "outputs": _outputs(ctx.dir)}
    for name in done["outputs"]:  # on disk before the record that they are
        _force(ctx.dir / name)
    for path in [ctx.dir.parent, ctx.dir, *(item for item in ctx.dir.rglob("*") if item.is_dir())]:
        _force(path)
    write_json(ctx.dir / "done.json", done)
    return seconds


def _force(path: Path) -> None:
    """Force a file, or a directory's names, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # of which not every file system knows how to
            raise
    finally:
        os.close(handle)


def _outputs(directory: Path) -> dict[str, int]:
    """List what a stage wrote, what it keeps for itself left out: path -> bytes."""
    found = {str(path.relative_to(directory)): path for path in sorted(directory.rglob("*")) if path.is_file()}
    return {
        name: path.stat().st_size
        for name, path in found.items()
        if name.partition(os.sep)[0] not in ("checkpoints", "journal", "tensorboard", "stage.json")
    }


# ---------------------------------------------------------------------------- what stops a run


def stop_cause(error: BaseException) -> tuple[str, int] | None:
    """Return why a run stopped and the exit status; None for errors that going on would only repeat."""
    text = str(error)
    if isinstance(error, Terminated):
        return "stopped by SIGTERM", 143
    if isinstance(error, KeyboardInterrupt):
        return "stopped by Ctrl-C", 130
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left on device" in text:  # safetensors raises an error class of its own
        said = error.strerror if isinstance(error, OSError) and error.errno == errno.ENOSPC else None
        detail = "" if said in (None, os.strerror(errno.ENOSPC)) else f"{said}; "
        return f"the disk is full ({detail}free some space)", 1
    out_of_memory = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and out_of_memory):
        return "out of memory (a lower max_tokens_per_microbatch needs less)", 1
    return None


def _explain(console: Console, error: BaseException, place: str, command: str) -> Stopped | None:
    """Print one line on what ended the run and how to go on; return what to raise (None: the error)."""
    kept = "finished stages and the last checkpoint are kept"
    cause = stop_cause(error)
    if cause is None:
        say(console, f"{place} failed; {kept}; once repaired, go on with: {command}")
        return None
    line = f"posttrain: {cause[0]} in {place}; {kept}; go on with: {command}"
    say(console, line)
    return Stopped(line, cause[1])


@contextmanager
def _locked(directory: Path, console: Console) -> Iterator[None]:
    """Hold ``.lock`` in a run's directory; the system lets go of it however the process dies."""
    with (directory / ".lock").open("a+") as file:
        file.seek(0)
        holder = file.read().strip()
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"process {holder} works on {directory}; wait for it, stop it, or choose another --name"
            ) from error
        if holder:
            say(console, f"process {holder} died while it worked on {directory}; taken over")
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


# ---------------------------------------------------------------------------- directories


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a crash leaves either the old file or the new one, whole."""
    partial = path.with_name(path.name + ".tmp")
    with partial.open("w") as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _announce_clearing(console: Console, directory: Path, decisions: Mapping[str, Decision]) -> None:
    """Say which results this run is about to delete, before it computes anything."""
    for stage, (what, why) in decisions.items():
        if what == "clear":
            keep = "another --name would keep both"
            say(console, f"{directory / stage} will be cleared and run again: {why} ({keep})")


def run_directory(root: Path, name: str) -> Path:
    """Return ``root/name``; the name must be one directory's."""
    if not re.fullmatch(r"[\w][\w.+-]*", name):
        raise ConfigError(f"got the run name '{name}'; expected letters, digits, '.', '_', '+', '-' (no '/')")
    return Path(root) / name


def say(console: Console, text: str) -> None:
    """Print one line as it is: no markup, no colours, not wrapped."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Write a duration in seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
