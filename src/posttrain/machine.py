"""What this machine does: how fast it multiplies, and settings of its libraries that training on a CPU needs."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from typing import Any

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
    """Let OpenMP threads sleep while they wait, unless the user chose; must run before torch is imported.

    Spinning threads win a few per cent on an idle machine and lose a factor of fifty when another program wants a core.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


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
