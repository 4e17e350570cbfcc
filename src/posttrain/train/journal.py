"""A journal of what can't be made again: rollouts, scores, answers of judges. It is on disk before it is used.

``journal/step-N.jsonl`` holds what belongs to the rollout begun at step N, a record a line: the first 16 hex digits of the
SHA-256 of the rest, then JSON with ``key``, ``value`` and, where the making moved them, the global random streams after it.
A line that was not written whole, and all after it, is as if it had never been.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from posttrain.train.checkpoint import Unusable, make_directory, sync_directory
from posttrain.train.streams import random_streams, restore_streams

OVERHEAD = 18
"""Bytes of a line beside its JSON: 16 digits, a blank, its end."""


class Journal:
    """Records by (step, key); without a directory they are kept nowhere, and nothing can be replayed."""

    def __init__(self, directory: Path | None = None) -> None:
        """Read nothing yet."""
        self.directory = directory

    def once(self, step: int, key: str, make: Callable[[], Any]) -> Any:
        """The recorded value of (step, key); if there is none it is made, written and forced to disk before it is returned.

        Args:
            step: the step at which the rollout began.
            key: what the value is, and of what.
            make: returns the value, as JSON holds it.
        """
        for record in self._records(step):
            if record["key"] == key:
                if "streams" in record:
                    restore_streams(record["streams"])
                return record["value"]
        before = random_streams()
        record = {"key": key, "value": make()}
        after = random_streams()
        if after != before:
            record["streams"] = after
        self._append(step, record)
        return record["value"]

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps of the records of a rollout, to find them again."""
        return {"step": step, "digest": self._digest(step)}

    def holds(self, step: int) -> bool:
        """Whether there is a record of the rollout begun at a step."""
        return self._digest(step) is not None

    def require(self, state: dict[str, Any]) -> None:
        """See that the records a checkpoint was saved with are there.

        Raises:
            Unusable: they are not.
        """
        step = state["step"]
        if state["digest"] is None or self._digest(step) != state["digest"]:
            place = self._path(step) if self.directory else "nowhere"
            raise Unusable(f"the rollout begun at step {step} is not in the journal ({place}) as it was used")

    def retract(self, step: int, kind: str) -> None:
        """Drop the first record of a rollout whose key begins with ``kind``, and all after it: it is to be made again."""
        if self.directory is None or not self._path(step).exists():
            return
        good = 0
        for text, record in self._lines(step):
            if record["key"].startswith(kind):
                break
            good += len(text) + OVERHEAD
        with self._path(step).open("r+b") as file:
            file.truncate(good)
            os.fsync(file.fileno())

    def forget(self, before: int) -> None:
        """Delete the records of rollouts begun before a step."""
        for path in self.directory.glob("step-*.jsonl") if self.directory else ():
            if int(path.stem.removeprefix("step-")) < before:
                path.unlink()

    def _path(self, step: int) -> Path:
        assert self.directory is not None
        return self.directory / f"step-{step:08d}.jsonl"

    def _digest(self, step: int) -> str | None:
        """Checksum of a rollout's records; None if there are none."""
        texts = [text for text, _ in self._lines(step)]
        return hashlib.sha256(b"\n".join(texts)).hexdigest()[:16] if texts else None

    def _records(self, step: int) -> Iterator[dict[str, Any]]:
        for _, record in self._lines(step):
            yield record

    def _lines(self, step: int) -> Iterator[tuple[bytes, dict[str, Any]]]:
        """The good lines of a rollout's file, in order."""
        if self.directory is None or not self._path(step).exists():
            return
        with self._path(step).open("rb") as file:
            for line in file:
                digest, _, text = line.partition(b" ")
                if not line.endswith(b"\n") or digest != _digest(text[:-1]):
                    return
                yield text[:-1], json.loads(text)

    def _append(self, step: int, record: dict[str, Any]) -> None:
        """Add a line after the last good one, and force it to disk."""
        if self.directory is None:
            return
        make_directory(self.directory)
        good = sum(len(text) + OVERHEAD for text, _ in self._lines(step))
        text = json.dumps(record).encode()
        handle = os.open(self._path(step), os.O_WRONLY | os.O_CREAT, 0o644)
        with open(handle, "wb") as file:
            file.truncate(good)
            file.seek(good)
            file.write(_digest(text) + b" " + text + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if good == 0:
            sync_directory(self.directory)


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest()[:16].encode()
