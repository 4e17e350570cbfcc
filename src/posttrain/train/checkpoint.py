"""Atomic, checksummed checkpoints of safetensors and JSON; no pickle is written or read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor


def save_checkpoint(
    directory: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: int = 2
) -> Path:
    """Write ``step-N`` beside its siblings and drop all but the newest ``keep``.

    Files go to a temporary directory first, each is forced to disk, a manifest with checksums comes last, and one rename
    makes it visible: a reader sees a whole checkpoint or none.
    """
    target = directory / f"step-{step:08d}"
    partial = directory / f".{target.name}.{os.getpid()}.tmp"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial / "tensors.safetensors")
        (partial / "state.json").write_text(json.dumps(state))
        sums = {f.name: _sha256(f) for f in sorted(partial.iterdir())}
        (partial / "manifest.json").write_text(json.dumps({"step": step, "sha256": sums}))
        for path in [*partial.iterdir(), partial]:
            _fsync(path)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
        _fsync(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in sorted(directory.glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    return target


def load_checkpoint(directory: Path) -> tuple[int, dict[str, Tensor], dict[str, Any], list[str]] | None:
    """Return ``(step, tensors, state, faults)`` of the newest checkpoint whose checksums hold, or None.

    ``faults`` says, a line each, which newer checkpoints were passed over and why.
    """
    faults: list[str] = []
    for path in sorted(directory.glob("step-*"), reverse=True):
        try:
            manifest = json.loads((path / "manifest.json").read_text())
            if path.name != f"step-{manifest['step']:08d}":
                raise ValueError(f"manifest.json says step {manifest['step']}")
            for name, digest in manifest["sha256"].items():
                if _sha256(path / name) != digest:
                    raise ValueError(f"{name} does not match its checksum")
            state = json.loads((path / "state.json").read_text())
            return manifest["step"], load_file(path / "tensors.safetensors"), state, faults
        except (OSError, ValueError, KeyError) as error:
            faults.append(f"checkpoint {path} is damaged ({error}); using an older one")
    return (-1, {}, {}, faults) if faults else None


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the whole new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    _fsync(partial)
    os.replace(partial, path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
