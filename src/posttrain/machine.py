"""What this machine does: how fast it multiplies, and settings of its libraries that training on a CPU needs."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from pathlib import Path
from typing import Any

CUBLAS_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
"""The variable with which cuBLAS sums in one order, and the value set where the user chose none."""

_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD = -3, -1, -2  # names of glibc's mallopt


def keep_freed_memory() -> bool:
    """Serve blocks up to 32 MiB (glibc's ceiling) from the heap and never trim it; returns whether that was possible.

    Returned to the system and asked for again, activations cost a page fault every 4 KiB: a fifth of a training step.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    done = [
        mallopt(_MMAP_THRESHOLD, 32 * 2**20),
        mallopt(_TRIM_THRESHOLD, 2**31 - 1),
        mallopt(_TOP_PAD, 256 * 2**20),
    ]
    return all(done)


def yield_between_kernels() -> None:
    """Let OpenMP threads sleep soon while they wait, unless the user chose; must run before torch is imported.

    Threads that spin for long lose a factor of fifty when another program wants a core. Threads that sleep at once lose a
    third on an idle machine, where the next kernel comes within microseconds; GNU's spin for about that long.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def deterministic_kernels() -> None:
    """Let torch choose kernels whose sums have one order; on a GPU it warns where an operation has none.

    cuBLAS reads its variable when it starts, so that this must be called before the first product on a GPU.
    """
    os.environ.setdefault(*CUBLAS_WORKSPACE)
    import torch

    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    settings: Any = torch.utils.deterministic
    settings.fill_uninitialized_memory = False  # every tensor made empty here is written before it is read


def fast_bf16() -> bool:
    """Whether the processor multiplies bf16 by instructions of its own (AVX512-BF16 or AMX)."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    flags = next((line.split() for line in text.splitlines() if line.startswith("flags")), list[str]())
    return "avx512_bf16" in flags or "amx_bf16" in flags


def matmul_speed(kind: str = "fp32", *, seconds: float = 0.3, size: int = 1024) -> float:
    """Measure square matrix products on the CPU: 2 size^3 operations each, in GFLOP/s.

    Args:
        kind: ``fp32`` or ``bf16`` (torch), or ``numpy`` (fp32, so that torch need not load).
        seconds: how long to measure, after one product that warms up.
        size: rows and columns of both factors.
    """
    if kind == "numpy":
        import numpy

        left: Any = numpy.ones((size, size), numpy.float32)
    else:
        import torch

        left = torch.ones(size, size, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[kind])
    _ = left @ left
    count, begin = 0, time.perf_counter()
    while True:
        _ = left @ left
        count += 1
        spent = time.perf_counter() - begin
        if spent >= seconds:
            return 2 * size**3 * count / spent / 1e9


def free_memory() -> float | None:
    """Bytes that a process may still take without swapping; None where the system does not say."""
    try:
        rows = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * float(row.split()[1]) for row in rows if row.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
