"""``run.json``: what was asked for and under which circumstances, so that a run can be compared and repeated.

It holds::

    name, recipe, summary     of the run, and of the recipe
    command, seed, tiny, until
    stages                    {stage: {type, class, config, inputs, files}} and, where ``tiny`` changes it,
                              ``resolved``: the configuration as it runs
                              files: [{path, bytes, hash}], data and weights that the stage reads
    versions, code, hardware, environment, git, directory
    created, updated
    attempts                  [{started, command, until, stages: {stage: start, continue, clear or skip}, and the
                              circumstances}], one a call of ``posttrain run``, oldest first

Circumstances at the top are those of the last attempt that computed anything.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from posttrain import doctor
from posttrain.graph import LIBRARIES, content_hash, ordered, read_json, stage_config, stage_inputs
from posttrain.machine import CUBLAS_WORKSPACE
from posttrain.stages import Recipe, Stage
from posttrain.types import stable_hash

VARIABLES = (
    "ATEN_", "CUBLAS_", "CUDA_", "CUDNN_", "DNNL_", "GOMP_", "KMP_", "MKL_", "NVIDIA_TF32_", "OMP_", "ONEDNN_",
    "OPENBLAS_", "PYTHONHASHSEED", "PYTORCH_", "TORCH_",
)  # fmt: skip
"""How the names of environment variables begin that can change a number."""


def manifest(
    directory: Path,
    recipe: Recipe,
    decisions: Mapping[str, Any],
    *,
    command: str,
    seed: int,
    tiny: bool,
    until: str | None = None,
) -> dict[str, Any]:
    """Build ``run.json`` of a run about to start or go on in ``directory``; earlier attempts stay in it.

    Args:
        directory: of the run.
        recipe: its stages as they were asked for.
        decisions: what happens to each stage that this attempt reaches, from `posttrain.graph.decide`.
        command: what repeats or continues the run.
        seed: of every random draw.
        tiny: whether stages run at the size of the small world.
        until: the last stage to run; None = all.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    earlier = read_json(directory / "run.json") or {}
    found = circumstances(recipe)
    does = {stage: decision[0] for stage, decision in decisions.items()}
    attempt = {"started": now, "command": command, "until": until, "stages": does}
    attempt |= found | {"code": found["code"]["hash"]}
    idle = bool(does) and set(does.values()) == {"skip"} and "code" in earlier
    return {
        "name": directory.name,
        "recipe": recipe.name,
        "summary": recipe.summary,
        "command": command,
        "seed": seed,
        "tiny": tiny,
        "until": until,
        "stages": {name: stage_record(stage, recipe, tiny, name in does) for name, stage in ordered(recipe).items()},
        **({key: earlier.get(key) for key in found} if idle else found),
        "created": earlier.get("created", now),
        "updated": now,
        "attempts": [*earlier.get("attempts", []), attempt],
    }


def stage_record(stage: Stage, recipe: Recipe, tiny: bool, reached: bool = True) -> dict[str, Any]:
    """Return what ``run.json`` keeps of a stage; a stage that is not ``reached`` lists no files."""
    names = {id(other): name for name, other in recipe.stages.items()}
    held = stage.held(tiny, recipe.typed.get(names[id(stage)], ()))
    sized = stage.sized(tiny, held)
    asked, resolved = stage_config(stage), stage_config(sized)
    return {
        "type": f"{type(stage).__module__}:{type(stage).__qualname__}",
        "class": type(stage).__name__,
        "config": asked,
        **({"resolved": resolved} if resolved != asked else {}),
        **({"typed": held} if held else {}),
        "inputs": {field: names[id(other)] for field, other in stage_inputs(stage).items()},
        "files": [file_record(path) for path in getattr(sized, "files", list)()] if reached else [],
    }


def file_record(path: Path) -> dict[str, Any]:
    """Return a file's path as it was found, its bytes, and 16 hex digits of SHA-256."""
    return {"path": str(path), "bytes": path.stat().st_size, "hash": content_hash(path)}


def circumstances(recipe: Recipe) -> dict[str, Any]:
    """Return all around a run that can change its numbers: versions, code, hardware, environment, git, directory."""
    return {
        "versions": doctor.versions(LIBRARIES),
        "code": code(recipe),
        "hardware": hardware(),
        "environment": environment(),
        "git": git(Path.cwd()),
        "directory": str(Path.cwd()),
    }


def environment() -> dict[str, str]:
    """Return the variables that can change a number, without the one that posttrain sets itself once it trains."""
    found = {key: value for key, value in sorted(os.environ.items()) if key.startswith(VARIABLES)}
    return dict(item for item in found.items() if item != CUBLAS_WORKSPACE)


def hardware() -> dict[str, Any]:
    """Return the doctor's description of this machine with the instruction sets, those torch's kernels use first."""
    import torch

    return doctor.hardware() | {
        "capability": torch.backends.cpu.get_cpu_capability(),
        "flags": doctor.cpu()["flags"],
    }


def code(recipe: Recipe) -> dict[str, Any]:
    """Return a hash over the package's source files, and over the modules of stages that are defined elsewhere.

    ``files`` maps each file (a path inside the package, or a module's name) to its own hash.
    """
    package = Path(__file__).parent
    files = {str(path.relative_to(package)): _source_hash(path) for path in sorted(package.rglob("*.py"))}
    for module in sorted(_foreign_modules(recipe.stages.values())):
        source = getattr(sys.modules.get(module), "__file__", None)
        if source is not None:  # typed at a prompt: nothing to hash
            files[module] = _source_hash(Path(source))
    return {"hash": stable_hash(files), "files": files}


def _foreign_modules(stages: Iterable[Stage]) -> set[str]:
    """Name the modules, not the library's, that define stages or functions given to them."""
    parts = [part for stage in stages for part in (type(stage), *vars(stage).values()) if callable(part)]
    modules = {getattr(part, "__module__", "") for part in parts}
    return {name for name in modules if name and name.partition(".")[0] not in ("posttrain", "builtins")}


def _source_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def git(directory: Path) -> dict[str, Any] | None:
    """Return the commit checked out around a directory and whether files differ from it; None outside a repository."""
    commit = _git(directory, "rev-parse", "HEAD")
    if commit is None:
        return None
    status = _git(directory, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "changed": None if status is None else bool(status)}


def _git(directory: Path, *args: str) -> str | None:
    """Return what a git command prints, None where it fails; takes no lock and waits 10 s at most."""
    command = ["git", "--no-optional-locks", "-C", str(directory), *args]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
