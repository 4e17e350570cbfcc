"""Gradient memory of a step after the backward pass and within it: ``python -m benchmarks.fused_memory [--model smollm2]``.

The whole network in fp32, one micro-batch of four random sequences of 64 tokens. Two steps each; of the second, when the moments
are there: the most bytes of complete gradients held at once, and by how much the process's resident memory rose above what it
was before the step. Weights after both are compared bit for bit.
"""

from __future__ import annotations

import argparse
import gc
import math
import re
from contextlib import nullcontext
from pathlib import Path

import torch
from benchmarks import kept

from posttrain.forest import Branch, Row, build_forest
from posttrain.models.load import find_model, load_policy
from posttrain.models.policy import Model, forward_stats
from posttrain.train.fused import gradient_peak
from posttrain.train.optim import MasterAdamW, Optim


def resident(field: str) -> int:
    """``VmRSS`` or its high-water mark ``VmHWM`` of this process, bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def measure(path: str, fused: bool) -> tuple[dict[str, float], Model]:
    """Two steps on a fresh network."""
    model = load_policy(path, dtype=torch.float32, train=True)
    g = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(10, 1000, (n,), generator=g).tolist()  # noqa: E731
    forest = build_forest([Row(draw(16), [Branch(draw(48), {})]) for _ in range(4)])
    optimizer = MasterAdamW({"policy": model.parameters()}, Optim(lr=1e-5, clip=math.inf, fused=fused))
    found: dict[str, float] = {}
    for _ in range(2):
        gc.collect()
        loss = -forward_stats(model, forest, frozenset({"logp"}))["logp"].mean()
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        with gradient_peak(model.parameters().values()) as peak, optimizer.last_pass(1.0) if fused else nullcontext():
            loss.backward()
        optimizer.step(1.0)
        found = {"gradients": peak.bytes, "resident": resident("VmHWM") - before}
    return found, model


def main() -> None:
    """Measure both and keep a line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2")
    given = parser.parse_args()
    place = find_model(given.model)
    plain, one = measure(place.path, fused=False)
    weights = {name: p.detach() for name, p in one.parameters().items()}
    sizes = [p.numel() * p.element_size() for p in weights.values()]
    within, two = measure(place.path, fused=True)
    equal = all(torch.equal(p, weights[name]) for name, p in two.parameters().items())
    record = {"label": place.label, "plain": plain, "fused": within, "equal": equal, "largest": max(sizes)}
    print(kept.append("fused-memory", record | {"weights": sum(sizes), "threads": kept.threads()}))


if __name__ == "__main__":
    main()
