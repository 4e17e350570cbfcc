"""What both sides measure of themselves: seconds by phase, memory, and the machine's speed. Needs torch and nothing of ours.

The peer's script imports this file from its own environment.
"""

from __future__ import annotations

import functools
import json
import resource
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def settle(device: str) -> None:
    """Wait for a GPU's queue to be empty."""
    if device == "cuda":
        torch.cuda.synchronize()


def calibrate(dtype: str, device: str, seconds: float = 0.4) -> dict[str, float]:
    """Speed of the machine now: GFLOP/s of square products in a dtype, GB/s of copying (bytes read plus written)."""
    size = 1024 if device == "cpu" else 8192
    left = torch.ones(size, size, dtype=DTYPES[dtype], device=device)
    block = torch.ones(2**26 if device == "cpu" else 2**30, dtype=torch.uint8, device=device)
    other = torch.empty_like(block)
    return {
        "gflops": 2 * size**3 * _rate(lambda: left @ left, device, seconds) / 1e9,
        "gbs": 2 * len(block) * _rate(lambda: other.copy_(block), device, seconds) / 1e9,
    }


def _rate(call: Callable[[], Any], device: str, seconds: float) -> float:
    """Calls a second."""
    call()
    settle(device)
    count, begin = 0, time.perf_counter()
    while True:
        call()
        settle(device)
        count += 1
        if (spent := time.perf_counter() - begin) >= seconds:
            return count / spent


class Clock:
    """Seconds of each phase of each step.

    ``backward`` is every `Tensor.backward` (a peer's recomputation under checkpointing is part of it), ``optimiser`` is
    clipping and the optimiser's step, ``reference`` what `timed` wraps; the rest of a step is the forward pass, the
    batch and everything else. ``cpu`` is processor time of all threads, which other programs delay but hardly change.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.spent: dict[str, float] = defaultdict(float)
        self.steps: list[dict[str, float]] = []
        self._begun = self._cpu = self._since = 0.0
        torch.Tensor.backward = self.timed("backward", torch.Tensor.backward)
        torch.nn.utils.clip_grad_norm_ = self.timed("optimiser", torch.nn.utils.clip_grad_norm_)
        register_optimizer_step_pre_hook(lambda *_: self._open())
        register_optimizer_step_post_hook(lambda *_: self._close())

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, whose seconds count for a phase."""

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            settle(self.device)
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                settle(self.device)
                self.spent[phase] += time.perf_counter() - began

        return wrapper

    def _open(self) -> None:
        settle(self.device)
        self._since = time.perf_counter()

    def _close(self) -> None:
        settle(self.device)
        self.spent["optimiser"] += time.perf_counter() - self._since

    def start(self) -> None:
        """The next step begins now."""
        settle(self.device)
        self.spent.clear()
        self._begun, self._cpu = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        """A step has ended, and the next begins."""
        settle(self.device)
        total = time.perf_counter() - self._begun
        cpu = time.process_time() - self._cpu
        self.steps.append({"total": total, "cpu": cpu, **self.spent, "forward": total - sum(self.spent.values())})
        if len(self.steps) == 1:  # the warm-up; optimiser state is there from now on
            forget_peak(self.device)
        self.start()


def resident(device: str) -> float:
    """Bytes in use now: resident memory of the process, or what torch has allocated on the GPU."""
    if device == "cuda":
        return float(torch.cuda.memory_allocated())
    return _status("VmRSS")


def forget_peak(device: str) -> None:
    """Let `peak` count from now on."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: str) -> float:
    """The most bytes in use since `forget_peak`."""
    return float(torch.cuda.max_memory_allocated()) if device == "cuda" else _status("VmHWM")


def _status(key: str) -> float:
    """A figure of /proc/self/status in bytes; elsewhere the peak since the start of the process stands in."""
    try:
        rows = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    return next(1024 * float(row.split()[1]) for row in rows if row.startswith(f"{key}:"))


def measured(job: dict[str, Any], train: Callable[[Clock], dict[str, Any]]) -> None:
    """Run one side of a job between two calibrations and write its result file.

    ``train`` returns ``held`` (bytes of trained weights, their masters and the optimiser's moments) and what else is
    worth keeping; memory of the libraries, measured before it, is not counted.
    """
    torch.set_num_threads(job["threads"])
    device, dtype = job["device"], job["dtype"]
    before = calibrate(dtype, device)
    libraries = resident(device)
    clock = Clock(device)
    found = train(clock)
    above = peak(device) - libraries - found["held"]
    after = calibrate(dtype, device)
    result = {
        "steps": clock.steps[1:],
        "above": above,
        "calibration": [before, after],
        **found,
        "torch": torch.__version__,
    }
    Path(job["result"]).write_text(json.dumps(result))
