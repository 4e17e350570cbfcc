"""Further processes of ``torchrun``: they train beside the first one, which alone decides, writes and prints.

The first process announces each training stage with its directories; the others run the same stage in a directory that
is thrown away, on the first one's checkpoints and records, and end when it ends. Other stages run in the first alone.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from posttrain.errors import ConfigError
from posttrain.graph import ordered
from posttrain.stages import Context, Recipe, Stage, Training

BEAT = 5.0  # seconds between signs of life of the first process
SILENCE = 60.0  # seconds without one after which the others give up
_LED: list[bool] = []


def several() -> bool:
    """Whether ``torchrun`` started this process with others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def follower() -> bool:
    """Whether it is one that is not the first."""
    return several() and int(os.environ.get("RANK", "0")) > 0


@contextmanager
def leading() -> Iterator[None]:
    """Around a run in the first process: the others join, and end when it does; nothing where it is alone."""
    if not several():
        yield
        return
    if _LED:
        raise ConfigError("one torchrun does one run; start each run of a series with a torchrun of its own")
    _LED.append(True)
    from posttrain.train import distributed

    store, over = distributed.start().store, threading.Event()

    def beat() -> None:
        count = 0
        while not over.wait(BEAT):
            count += 1
            store.set("beat", str(count))

    store.set("beat", "0")
    threading.Thread(target=beat, daemon=True).start()
    failure = ""
    try:
        yield
    except BaseException as error:
        failure = f"{type(error).__name__}: {error}"
        raise
    finally:
        over.set()
        _announce(store, {"end": failure})
        distributed.leave()


@contextmanager
def announced(stage: Stage, ctx: Context) -> Iterator[None]:
    """Around a training stage in the first process: the others run it too."""
    if not several() or not isinstance(stage, Training):
        yield
        return
    from posttrain.train.distributed import world

    inputs = {field: str(path) for field, path in ctx.inputs.items()}
    _announce(world().store, {"stage": ctx.dir.name, "dir": str(ctx.dir), "inputs": inputs})
    try:
        yield
    except BaseException as error:
        world().fail(error)
        raise


def follow(recipe: Recipe, *, seed: int, tiny: bool) -> NoReturn:
    """Run every stage that the first process announces, then end this process.

    Raises:
        RankError: the first process is gone, or a rank failed in a stage.
        SystemExit: always otherwise; 0, or 1 if the run failed.
    """
    from posttrain.train import distributed

    world, stages, number = distributed.start(), ordered(recipe), 0
    while True:
        said = _heard(world, number)
        number += 1
        if "end" in said:
            distributed.leave()
            raise SystemExit(1 if said["end"] else 0)
        with tempfile.TemporaryDirectory(prefix="posttrain-rank-") as scratch:
            directory = _mirror(Path(said["dir"]), Path(scratch))
            inputs = {field: Path(path) for field, path in said["inputs"].items()}
            typed = recipe.typed.get(said["stage"], frozenset())
            quiet = Console(file=io.StringIO())
            ctx = Context(dir=directory, inputs=inputs, console=quiet, seed=seed, tiny=tiny, typed=typed)
            try:
                stages[said["stage"]].run(ctx)
            except BaseException as error:
                world.fail(error)
                raise


def _announce(store: Any, message: dict[str, Any]) -> None:
    """Tell the others, under the next number."""
    store.set(f"said/{store.add('said', 1) - 1}", json.dumps(message))


def _heard(world: Any, number: int) -> dict[str, Any]:
    """Wait for an announcement, as long as the first process shows that it lives."""
    from posttrain.train.distributed import RankError

    key, last, since = f"said/{number}", b"", time.monotonic()
    while True:
        try:
            if world.store.check([key]):
                return json.loads(world.store.get(key))
            beat = world.store.get("beat") if world.store.check(["beat"]) else b""
        except RuntimeError as error:
            raise RankError(
                f"rank {world.rank} waited in 'next stage' and the first process is gone: {error}"
            ) from error
        if beat != last:
            last, since = beat, time.monotonic()
        if time.monotonic() - since > SILENCE:
            raise RankError(
                f"rank {world.rank} waited in 'next stage' and the first process gave no sign of life for {SILENCE:g} s"
            )
        time.sleep(0.05)


def _mirror(real: Path, scratch: Path) -> Path:
    """A directory of the same name with the real one's checkpoints (as a link) and copies of its other records."""
    directory = scratch / real.name
    directory.mkdir()
    for path in real.iterdir() if real.exists() else []:
        if path.name == "checkpoints":
            (directory / path.name).symlink_to(path.resolve())
        elif path.is_dir():
            shutil.copytree(path, directory / path.name)
        elif path.suffix == ".jsonl":
            shutil.copy2(path, directory / path.name)
    return directory
