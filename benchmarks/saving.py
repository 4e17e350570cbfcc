"""How long a save holds training up: seconds a save, seconds a step, their share, each case in a process of its own.

    python benchmarks/saving.py [--model smollm2] [--cases adapters whole] [--rows 8] [--tokens 256] [--directory DIR]

``adapters`` trains LoRA of rank 16, ``whole`` every weight (fp32, with both AdamW moments). A checkpoint is written every
second step; ``held up`` is `time/save` of the step after, and the step's seconds are the median of steps after which none
begins. ``first`` is the save that takes its memory from the system. Waiting for the last checkpoint is not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from io import StringIO
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "saving.json"


def measure(case: str, options: argparse.Namespace) -> None:
    """Train on random tokens and print seconds of steps and saves as JSON."""
    from posttrain.machine import deterministic_kernels, keep_freed_memory, yield_between_kernels

    yield_between_kernels()
    keep_freed_memory()
    deterministic_kernels()
    import torch
    from rich.console import Console

    from posttrain.forest import Branch, Row
    from posttrain.models.load import find_model, load_policy
    from posttrain.models.lora import Lora
    from posttrain.train.loop import Run, fit
    from posttrain.train.objectives import Supervised
    from posttrain.train.optim import Optim
    from posttrain.train.sources import demonstration_source

    lora = Lora(rank=16, alpha=32) if case == "adapters" else None
    policy = load_policy(find_model(options.model).path, dtype=torch.float32, lora=lora, train=True)
    draw = random.Random(0)
    half = options.tokens // 2
    ids = [[draw.randrange(3, 500) for _ in range(2 * half)] for _ in range(options.rows)]
    rows = [Row(x[:half], [Branch(x[half:], {"loss": [True] * half})]) for x in ids]
    source = demonstration_source(rows, per_step=options.rows, seed=0)
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        place = Path(folder) / "run"
        run = Run(directory=place, steps=8, max_tokens=1024, save_every=2, console=Console(file=StringIO()))
        before = time.process_time()
        fit({"policy": policy}, Supervised(), source, optim=Optim(lr=1e-5), run=run)
        busy = time.process_time() - before
        lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
        size = sum(path.stat().st_size for path in (place / "checkpoints" / "step-00000008").iterdir())
    held = [line["time/save"] for line in lines if line["step"] in (2, 4, 6)]
    steps = [line["time/step"] for line in lines if line["step"] % 2 and line["step"] > 1]
    after = [line["time/step"] for line in lines if line["step"] in (4, 6)]
    step = statistics.median(steps)
    print(
        json.dumps(
            {
                "checkpoint_mb": round(size / 1e6, 1),
                "step_s": round(step, 3),
                "step_after_save_s": round(statistics.median(after), 3),
                "first_save_s": round(held[0], 4),
                "later_saves_s": [round(x, 4) for x in held[1:]],
                "first_share": round(held[0] / step, 4),
                "later_share": round(max(held[1:]) / step, 4),
                "process_s": round(busy, 1),
            }
        )
    )


def main() -> None:
    """Measure every case, print a table, write it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--cases", nargs="+", choices=("adapters", "whole"), default=["adapters", "whole"])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument(
        "--directory", help="where checkpoints are written; the system's temporary directory if left out"
    )
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options)
        return
    table = {"model": options.model, "cpus": os.cpu_count(), "load": os.getloadavg()[0], "cases": {}}
    table |= {"rows": options.rows, "tokens": options.tokens}
    for case in options.cases:
        child = [sys.executable, __file__, *sys.argv[1:], "--measure", case]
        found = json.loads(subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True).stdout)
        table["cases"][case] = found
        later = ", ".join(f"{x:.3f}" for x in found["later_saves_s"])
        print(
            f"{options.model}, {case}: {found['checkpoint_mb']:,} MB; held up {found['first_save_s']:.3f} s by the first save, "
            f"then {later} s; a step takes {found['step_s']:.2f} s: {found['first_share']:.1%}, then {found['later_share']:.1%}",
            flush=True,
        )
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**known, options.model: table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
