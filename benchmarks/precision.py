"""bf16 against fp32, trained on the same batches: ``python -m benchmarks.precision [dpo sft]``.

Declared before it is run. Measure: the mean of the training loss over the last 10 of 30 steps. Sizes: 8 pairs (DPO, at a
learning rate of 5e-6 and beta 0.1) or 8 best answers (SFT, at 1e-5) a step, of at most 256 tokens; rows drawn by seed 0, again
in another order where the data has fewer; all weights trained with AdamW, one run a dtype. Expected: bf16 (with fp32
masters) and fp32 differ by at most 1 % of the fp32 loss. Each run is a process of its own. On 12 other pairs
packing alone moved a margin by 0.28 nats in bf16, and weights that moved by 3e-5 and were rounded by 0.53: 0.2 and 0.4 % of
the mean loss of 80 pairs, which is why a step has 8.
"""

from __future__ import annotations

import argparse
import random
from statistics import fmean
from typing import Any

from benchmarks import kept
from benchmarks.compare.session import Task, run_task
from benchmarks.compare.workload import length, read_rows, with_responses

from posttrain.models.load import find_model

NAME = "precision"
RATES = {"dpo": 5e-6, "sft": 1e-5}
"""Learning rates, by row."""
PER_STEP, LONGEST, LAST, LIMIT = 8, 256, 10, 0.01


def main() -> None:
    """Train each row in both dtypes, print how far apart they end, and keep the losses of every step."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=__doc__)
    parser.add_argument("rows", nargs="*", choices=[*RATES, []], default=[], metavar="ROW", help="dpo, sft; none: both")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found = find_model(options.model)
    for row in options.rows or list(RATES):
        data, rows = chosen(found.path, row, options.steps, options.seed)
        job = {"row": row, "device": "cpu", "threads": kept.threads(), "lr": RATES[row], "model": found.path}
        runs = {dtype: train(job | {"dtype": dtype, "rows": rows, "per_step": PER_STEP}) for dtype in ("fp32", "bf16")}
        about = {"row": row, "label": found.label, "data": data, "seed": options.seed, "threads": job["threads"]}
        record = kept.append(NAME, about | {"lr": RATES[row], "per_step": PER_STEP, "runs": runs})
        print(line(record), flush=True)


def chosen(model: str, row: str, steps: int, seed: int) -> tuple[str, list[dict[str, Any]]]:
    """The data's name and the rows of all steps: pairs, or the best answers alone."""
    data, items = read_rows(model, LONGEST)
    fitting = [item for item in with_responses(items, 2) if length(item) <= LONGEST]
    if not fitting:
        raise SystemExit(f"{data} has no rows of at most {LONGEST} tokens")
    draw, rows = random.Random(seed), list[dict[str, Any]]()
    while len(rows) < PER_STEP * steps:
        rows += draw.sample(fitting, min(len(fitting), PER_STEP * steps - len(rows)))
    return data, [r | {"branches": r["branches"][:1]} for r in rows] if row == "sft" else rows


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Losses of every step, and seconds of each but the first."""
    result = run_task(Task(NAME, "ours", "ours", job), "none")
    seconds = [step["total"] for step in result["steps"]]
    print(f"{job['row']}, {job['dtype']}: {fmean(seconds):.2f} s a step", flush=True)
    return {"loss": [numbers["loss/total"] for numbers in result["numbers"]], "seconds": fmean(seconds)}


def apart(record: kept.Record) -> tuple[float, float, float]:
    """Mean loss of the last steps in fp32 and in bf16, and their difference as a share of the first."""
    wide, narrow = (fmean(record["runs"][dtype]["loss"][-LAST:]) for dtype in ("fp32", "bf16"))
    return wide, narrow, abs(narrow - wide) / abs(wide)


def line(record: kept.Record) -> str:
    """How far apart the dtypes ended."""
    wide, narrow, share = apart(record)
    steps = len(record["runs"]["fp32"]["loss"])
    verdict = "within" if share <= LIMIT else "NOT within"
    return (
        f"{record['row']}: mean loss of the last {LAST} of {steps} steps {wide:.5f} in fp32, {narrow:.5f} in bf16: "
        f"{share:.2%} apart, {verdict} {LIMIT:.0%}"
    )


def section() -> str:
    """The page's part, from the newest record of each row; "" where there is none."""
    newest = {r["row"]: r for r in kept.read(NAME)}
    if not newest:
        return ""
    per_step = next(iter(newest.values()))["per_step"]
    lines = [
        "## bf16 against fp32\n",
        "    python -m benchmarks.precision\n",
        f"The same batches in the same order, {per_step} rows a step of at most {LONGEST} tokens, all weights trained.\n",
        "| | learning rate | first steps' loss | last steps' loss, fp32 | bf16 | apart | largest difference of a step "
        "| s a step, fp32 | bf16 |",
        "|" + "---|" * 9,
    ]
    for row, record in newest.items():
        wide, narrow, share = apart(record)
        one, two = (record["runs"][dtype] for dtype in ("fp32", "bf16"))
        worst = max(abs(b - a) / abs(a) for a, b in zip(one["loss"], two["loss"], strict=True))
        lines.append(
            f"| {row} | {record['lr']:g} | {fmean(one['loss'][:LAST]):.5f} | {wide:.5f} | {narrow:.5f} | {share:.2%} | {worst:.2%} | "
            f"{one['seconds']:.2f} | {two['seconds']:.2f} |"
        )
    return "\n".join([*lines, "", *(f"{r}: {x['data']}; {kept.origin(x)}.\n" for r, x in newest.items())])


if __name__ == "__main__":
    main()
