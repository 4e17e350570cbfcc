"""Atomic, checksummed checkpoints of safetensors and JSON, written behind the training; no pickle is written or read.

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
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from posttrain.errors import CheckError, PosttrainError, suggest

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""Names of dtypes in the safetensors format."""

SPARE = 2**20
"""Bytes that must be left free besides those of a checkpoint."""

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
    return sorted(found, key=_step_of, reverse=True)


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
    partial = directory / f".{target.name}.{next(_COUNT)}.{os.getpid()}.tmp"
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


class Saver:
    """Saves behind the training: a snapshot is taken at once, one thread writes it while the next steps are made.

    The newest ``keep`` checkpoints stay, and the best one by the metric ``best``, of which a leading ``-`` says that less
    is better. Use as a context: leaving it waits for the checkpoint under way, except when a person insists on leaving.

    Raises:
        CheckError: ``keep`` below 1.
    """

    def __init__(
        self, directory: Path, *, start: int | None = None, keep: int = 2, best: str = "", known: Sequence[str] = ()
    ) -> None:
        """Take over a directory: what dead processes left half-written is removed.

        ``start`` is the step that the run goes on from: what is newer was refused, and goes when there is a new one.
        """
        if keep < 1 or (best and best.removeprefix("-") not in known):
            hint = f"; {suggest(best.removeprefix('-'), known)}" if best else ""
            raise CheckError(f"got keep={keep}, best='{best}'; expected at least 1 and the name of a metric{hint}")
        self.directory, self.keep, self.best = directory, keep, best
        self._refused = {p for p in checkpoint_paths(directory) if start is not None and _step_of(p) > start}
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._abandoned = False
        remove_leftovers(directory)

    def __enter__(self) -> Saver:
        """Nothing is held yet."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Wait for the writer, whose error is raised unless another is on its way."""
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self._abandoned = True  # at once: the checkpoint under way will never become visible
            return
        if self._thread is not None:
            self._thread.join()
        if kind is None:
            self.check()

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Any,
        metrics: Mapping[str, float],
        *,
        first: Callable[[], None] = lambda: None,
    ) -> None:
        """Take a snapshot and start writing it; ``first`` is called by the writer before the checkpoint becomes visible.

        Raises:
            OSError: too little space is free, or the save before this one failed.
        """
        self.join()
        text = json.dumps(state, allow_nan=False)
        require_space(self.directory, step, sum(t.numel() * t.element_size() for t in tensors.values()) + len(text))
        snapshot = self._snapshot(tensors)
        value = metrics.get(self.best.removeprefix("-")) if self.best else None

        def write() -> None:
            try:
                first()
                save_checkpoint(self.directory, step, snapshot, text, value=value, wanted=lambda: not self._abandoned)
                self._prune(step)
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=write, name=f"checkpoint-{step}", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise what the writer met, once."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def join(self) -> None:
        """Wait for the save under way and raise what it met."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def oldest(self) -> int:
        """The step of the oldest checkpoint that a run may continue from; 0 if there is none."""
        paths = [path for path in checkpoint_paths(self.directory) if path not in self._refused][: self.keep]
        return _step_of(paths[-1]) if paths else 0

    def _snapshot(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A copy on the CPU, into the memory of the last one."""
        out: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            old = self._buffers.get(name)
            if old is None or old.shape != tensor.shape or old.dtype != tensor.dtype:
                old = torch.empty(tensor.shape, dtype=tensor.dtype)
            out[name] = old.copy_(tensor.detach())
        self._buffers = out
        return out

    def _prune(self, step: int) -> None:
        """Remove all but the newest and the best, and what the run could not go on from."""
        for path in self._refused - {self.directory / f"step-{step:08d}"}:
            remove(path)
        self._refused = set()
        paths = checkpoint_paths(self.directory)
        spared = set(paths[: self.keep])
        if self.best:
            sign = -1.0 if self.best.startswith("-") else 1.0
            values = {path: _value(path) for path in paths}
            known = {path: sign * value for path, value in values.items() if value is not None}
            spared |= {max(known, key=known.__getitem__)} if known else set()
        for path in paths:
            if path not in spared:
                remove(path)


def require_space(directory: Path, step: int, size: int) -> None:
    """Refuse to begin a checkpoint that the disk can't hold.

    Raises:
        OSError: less than ``size`` bytes and some to spare are free (ENOSPC).
    """
    make_directory(directory)
    free = shutil.disk_usage(directory).free
    if free < size + SPARE:
        need = f"the checkpoint of step {step} needs {(size + SPARE) / 1e6:.1f} MB, {free / 1e6:.1f} MB are free"
        raise OSError(errno.ENOSPC, need, str(directory))


def remove(path: Path) -> None:
    """Delete a directory so that a reader sees it whole or not at all."""
    if path.exists():
        trash = path.with_name(f".{path.name}.{next(_COUNT)}.{os.getpid()}.tmp")
        os.replace(path, trash)
        shutil.rmtree(trash)


def remove_leftovers(directory: Path) -> None:
    """Delete temporary directories whose process is gone."""
    for path in directory.glob(".step-*.tmp"):
        owner = path.name.removesuffix(".tmp").rpartition(".")[2]
        if owner.isdigit() and int(owner) != os.getpid() and _alive(int(owner)):
            continue
        shutil.rmtree(path, ignore_errors=True)


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


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _value(path: Path) -> float | None:
    """The value a checkpoint was saved with; None where its manifest can't be read."""
    try:
        return json.loads((path / "manifest.json").read_bytes())["value"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # someone else's
        pass
    return True
