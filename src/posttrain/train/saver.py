"""Saves behind the training: a step is held up neither by the copy of its tensors nor by the disk."""

from __future__ import annotations

import errno
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posttrain.errors import CheckError, suggest
from posttrain.train.checkpoint import (
    checkpoint_paths,
    make_directory,
    remove,
    remove_leftovers,
    save_checkpoint,
    step_of,
)

SPARE = 2**20
"""Bytes that must be left free besides those of a checkpoint."""


class Saver:
    """Saves while training goes on: one thread copies the tensors during the next step's passes, then writes the copy.

    The tensors must not change before the copy is there: `settle` is called right before the optimiser moves them. Copies
    go into the memory of those before. The newest ``keep`` checkpoints stay, and the best one by the metric ``best``, of
    which a leading ``-`` says that less is better. Use as a context: leaving it waits for the checkpoint under way, except
    when a person insists on leaving.

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
        self._refused = {p for p in checkpoint_paths(directory) if start is not None and step_of(p) > start}
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._copied = threading.Event()
        self._copied.set()
        self._error: BaseException | None = None
        self._abandoned = False
        self._seconds = 0.0
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
        """Begin a checkpoint; ``tensors`` stay as they are until `settle`.

        Args:
            step: updates made.
            tensors: of any device.
            state: JSON, as it is now.
            metrics: of the step, among them the one that ``best`` names.
            first: called by the writer before the checkpoint becomes visible.

        Raises:
            OSError: too little space is free, or the save before this one failed.
        """
        self.join()
        text = json.dumps(state, allow_nan=False)
        require_space(self.directory, step, sum(t.numel() * t.element_size() for t in tensors.values()) + len(text))
        value = metrics.get(self.best.removeprefix("-")) if self.best else None
        self._copied.clear()

        def write() -> None:
            try:
                try:
                    snapshot = self._snapshot(tensors)
                finally:
                    self._copied.set()
                first()
                save_checkpoint(self.directory, step, snapshot, text, value=value, wanted=lambda: not self._abandoned)
                self._prune(step)
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=write, name=f"checkpoint-{step}", daemon=True)
        self._thread.start()

    def settle(self) -> None:
        """Wait until the tensors of the save under way are copied; called by what is about to change them."""
        if not self._copied.is_set():
            with self.holding_up():
                self._copied.wait()

    @contextmanager
    def holding_up(self) -> Iterator[None]:
        """Count the seconds within as those in which training waits for a save."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - began

    def held_up(self) -> float:
        """Seconds in which training waited for saves since this was last asked."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

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
        return step_of(paths[-1]) if paths else 0

    def _snapshot(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A copy on the CPU, into the memory of the last one."""
        out: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            old = self._buffers.get(name)
            if old is None or old.shape != tensor.shape or old.dtype != tensor.dtype:
                old = torch.empty(tensor.shape, dtype=tensor.dtype)
            _copy(old, tensor.detach())
            out[name] = old
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


def _copy(to: Tensor, tensor: Tensor) -> None:
    """Copy by this thread alone: torch would start a second pool of threads beside the one that trains."""
    if tensor.device.type == "cpu" and tensor.is_contiguous():
        np.copyto(_bytes(to), _bytes(tensor))  # lets other threads run meanwhile
    else:
        to.copy_(tensor)


def _bytes(tensor: Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy()


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


def _value(path: Path) -> float | None:
    """The value a checkpoint was saved with; None where its manifest can't be read."""
    try:
        return json.loads((path / "manifest.json").read_bytes())["value"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
