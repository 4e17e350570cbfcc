"""Atomic, checksummed checkpoints of safetensors and JSON; no pickle is written or read.

A checkpoint is a directory ``step-N`` with ``tensors.safetensors``, ``state.json`` and ``manifest.json``, which holds the
size and SHA-256 of the other two and a SHA-256 of itself. It becomes visible by one rename, after every file and directory
was forced to disk: a reader sees a whole checkpoint or none, whatever ended the writer.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from posttrain.errors import PosttrainError

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""Names of dtypes in the safetensors format."""

_COUNT = itertools.count()  # of temporary directories, so that no two of a process share a name


class Unusable(PosttrainError, ValueError):
    """A checkpoint that can't be continued from: damaged, or something that it needs is gone."""


class Checkpoint(NamedTuple):
    """What a run continues from: ``step`` updates were made."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def checkpoint_paths(directory: Path) -> list[Path]:
    """The checkpoints of a directory, newest first, by step (never by time)."""
    found = [path for path in directory.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)]
    return sorted(found, key=step_of, reverse=True)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint, every byte of it verified.

    Raises:
        Unusable: a byte is not what was written, or a file is gone.
    """
    try:
        raw = (path / "manifest.json").read_bytes()
        manifest = json.loads(raw)
        if raw != _manifest(manifest["step"], manifest["files"], manifest["value"]):
            raise ValueError("manifest.json does not match its checksum")
        if path.name != f"step-{manifest['step']:08d}":
            raise ValueError(f"manifest.json says step {manifest['step']}")
        for name, entry in manifest["files"].items():
            if (size := (path / name).stat().st_size) != entry["bytes"]:
                raise ValueError(f"{name} has {size} bytes, expected {entry['bytes']}")
            if _sha256(path / name) != entry["sha256"]:
                raise ValueError(f"{name} does not match its checksum")
        state = json.loads((path / "state.json").read_bytes())
        return Checkpoint(manifest["step"], load_file(path / "tensors.safetensors"), state)
    except OSError as error:
        raise Unusable(f"{Path(error.filename or path).name}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise Unusable(str(error)) from error


def newest_checkpoint(
    directory: Path, accept: Callable[[Checkpoint], None] = lambda found: None
) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole and that ``accept`` does not refuse, and what was wrong with newer ones.

    Args:
        directory: where checkpoints are.
        accept: takes a checkpoint into use; raises `Unusable` where something else that it needs is gone.
    """
    faults: list[str] = []
    for path in checkpoint_paths(directory):
        try:
            found = read_checkpoint(path)
            accept(found)
        except Unusable as error:
            faults.append(f"checkpoint {path} can't be used: {error}")
            continue
        return found, [*faults, f"using the one of step {found.step}"] if faults else []
    return None, [*faults, "there is no older one: training starts again from step 0"] if faults else []


def save_checkpoint(
    directory: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: str,
    *,
    value: float | None = None,
    wanted: Callable[[], bool] = lambda: True,
) -> None:
    """Write ``step-N``; returns when it is on disk.

    Args:
        directory: of the run's checkpoints.
        step: updates made.
        tensors: on the CPU, not changed until this returns.
        state: JSON text.
        value: of the metric by which the best checkpoint is kept.
        wanted: asked right before the checkpoint becomes visible; False leaves nothing behind.

    Raises:
        OSError: the disk is full, or the directory can't be written; what was there is as it was.
    """
    target = directory / f"step-{step:08d}"
    partial = _temporary(target)
    make_directory(directory)
    partial.mkdir()
    try:
        files = {"tensors.safetensors": _write_tensors(partial / "tensors.safetensors", tensors)}
        files["state.json"] = _write(partial / "state.json", [state.encode()])
        _write(partial / "manifest.json", [_manifest(step, files, value)])
        sync_directory(partial)
        if wanted():
            remove(target)  # only a checkpoint that can't be used stands in the way
            os.replace(partial, target)
            sync_directory(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove(path: Path) -> None:
    """Delete a directory so that a reader sees it whole or not at all."""
    if path.exists():
        trash = _temporary(path)
        os.replace(path, trash)
        shutil.rmtree(trash)


def _temporary(path: Path) -> Path:
    """A name beside ``path`` that says which process made it."""
    process = os.getpid()
    return path.with_name(f".{path.name}.{next(_COUNT)}.{process}-{_started(process)}.tmp")


def remove_leftovers(directory: Path) -> None:
    """Delete the temporary directories of checkpoints whose process is gone; one that has its number now is another."""
    for path in directory.glob(".step-*.tmp"):
        process, _, started = path.name.removesuffix(".tmp").rpartition(".")[2].partition("-")
        if process.isdigit() and int(process) != os.getpid() and _started(int(process)) == started:
            continue
        shutil.rmtree(path, ignore_errors=True)


def _started(process: int) -> str | None:
    """When a process started, in ticks since the machine did; None if there is none, "" where the system does not say."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        pass
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except OSError:  # someone else's
        pass
    return ""


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the whole new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _write(partial, [(json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()])
    os.replace(partial, path)


def _manifest(step: int, files: Mapping[str, Any], value: float | None) -> bytes:
    """The text of ``manifest.json``; there is exactly one for its contents, so that any other byte is a fault."""
    content = {"step": step, "files": files, "value": value}
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=2).encode()


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write the safetensors format tensor by tensor: no copy of all, and the interpreter is free while bytes move.

    A length in 8 bytes, little-endian; a JSON header with dtype, shape and place of each tensor; their bytes.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # keeps every tensor aligned
    header: dict[str, Any] = {}
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    blocks = (tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data for name in names)
    return _write(path, [len(text).to_bytes(8, "little"), text, *blocks])


def _write(path: Path, blocks: Sequence[Any]) -> dict[str, Any]:
    """Write a file and force it to disk; returns its size and checksum."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        for block in blocks:
            view = memoryview(block)
            digest.update(view)
            size += len(view)
            while view:
                view = view[file.write(view) :]
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_directory(path: Path) -> None:
    """Make a directory and those above it, and force the names of those that are new to disk."""
    new = [place for place in (path, *path.parents) if not place.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for place in new:
        sync_directory(place.parent)


def sync_directory(path: Path) -> None:
    """Force a directory's names to disk, where the file system knows how."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def step_of(path: Path) -> int:
    """The step of a checkpoint's directory."""
    return int(path.name.removeprefix("step-"))
