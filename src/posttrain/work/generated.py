"""Data that has a name instead of a file: made by a program, or fetched, once, into the cache."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from posttrain.data import resolve_data
from posttrain.models.load import cache_dir
from posttrain.registry import Registry
from posttrain.types import stable_hash

DATA = Registry("data")
"""Name to a function of what follows ``NAME:``, which gives files by part."""


def kept(name: str, write: Callable[[Path], object]) -> dict[str, Path]:
    """Files by part of a directory in the cache, which ``write`` fills where it is not there yet."""
    directory = cache_dir() / name
    if not directory.exists():
        partial = directory.with_name(f"{directory.name}.{os.getpid()}.tmp")
        partial.mkdir(parents=True)
        write(partial)
        if not directory.exists():
            partial.rename(directory)
    return resolve_data(str(directory))


@DATA.register("smallworld")
def smallworld(size: str) -> dict[str, Path]:
    """The small world's instructions, ``smallworld:N`` with N demonstrations."""
    from posttrain.data import smallworld as world

    count = int(size) if size else 96
    return kept(f"smallworld-1-{count}", lambda folder: world.write(folder, n_demonstrations=count))


@DATA.register("sums")
def sums(size: str) -> dict[str, Path]:
    """Sums in the small world's words with worked thoughts and checked answers, ``sums:N`` with N of each (200)."""
    from posttrain.data import smallworld_sums as world

    count = int(size) if size else 200
    return kept(f"sums-1-{count}", lambda folder: world.write(folder, count))


@DATA.register("smallworld-safety")
def smallworld_safety(size: str) -> dict[str, Path]:
    """The small world's requests, half of them harmful, judged for help and for harm, ``smallworld-safety:N`` with N comparisons."""
    from posttrain.data import smallworld_safety as world

    count = int(size) if size else 384
    return kept(f"safety-1-{count}", lambda folder: world.write(folder, n_comparisons=count))


@DATA.register("notes")
def notes(size: str) -> dict[str, Path]:
    """Questions about a prompt's own notes, for the environments lookup and retrieval, ``notes:N`` with N of each part (200)."""
    from posttrain.data import smallworld_notes as world

    count = int(size) if size else 200
    return kept(f"notes-2-{count}", lambda folder: world.write(folder, count))


@DATA.register("reasoning_gym")
def reasoning_gym(task: str) -> dict[str, Path]:
    """Prompts of a task of reasoning-gym, ``reasoning_gym:TASK,FIELD=VALUE,...`` (size, seed, and its difficulty)."""
    from posttrain.data.reasoning import parse_task, task_key, write_task

    found = parse_task(task)
    return kept(f"reasoning-1-{stable_hash(task_key(found))}", lambda folder: write_task(found, folder))


@DATA.register("gsm8k")
def gsm8k(_: str) -> dict[str, Path]:
    """Word problems with a number as answer (Cobbe et al. 2021), from the cache, else from the hub."""
    from posttrain.data.public import public_files

    files = public_files("gsm8k", cache_dir() / "data" / "gsm8k")
    return {"demonstrations": files["train"], "prompts": files["train"], "heldout_prompts": files["test"]}
