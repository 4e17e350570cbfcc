"""Our side of a comparison: ``python -m benchmarks.compare.ours JOB`` trains through `fit`, as the stages do.

Timed: from one call of a hook to the next, so the batch, forward, backward, clipping, AdamW and the metrics of a step.
The reference pass (`row_logp`, which the stages keep on disk) is timed by itself; loading, and checkpoints, are not.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.machine import deterministic_kernels, keep_freed_memory, yield_between_kernels

yield_between_kernels()  # as the command does, before torch is imported
keep_freed_memory()

import torch  # noqa: E402
from benchmarks.compare import reinforce  # noqa: E402
from benchmarks.compare.measure import DTYPES, Clock, forget_peak, measured, settle  # noqa: E402
from benchmarks.compare.rollouts import generate  # noqa: E402
from rich.console import Console  # noqa: E402

from posttrain.forest import Branch, Row  # noqa: E402
from posttrain.models.load import load_policy, load_tokenizer, new_reward, save_merged  # noqa: E402
from posttrain.models.policy import Model  # noqa: E402
from posttrain.train.loop import Run, fit  # noqa: E402
from posttrain.train.objectives import Preference, RewardModel, Supervised  # noqa: E402
from posttrain.train.optim import Optim  # noqa: E402
from posttrain.train.reference import row_logp  # noqa: E402
from posttrain.train.sources import Source, demonstration_source, ranking_source, shuffled  # noqa: E402

MAX_TOKENS = {"cpu": 1024, "cuda": 16384}
"""The memory knob: the stages' own value on a processor."""

Job = dict[str, Any]
Made = tuple[dict[str, Model], Any, Source]


class Enough(Exception):
    """The last step is done; no checkpoint is wanted."""


def rows_of(job: Job) -> list[Row]:
    """The job's rows, each token of a response trained, placed so that the source visits them in the job's order."""
    rows = [Row(i["prompt"], [Branch(b, {"loss": [True] * len(b)}) for b in i["branches"]]) for i in job["rows"]]
    return reinforce.in_order(rows)


def dpo(job: Job, found: dict[str, Any]) -> Made:
    """DPO over pairs, their reference log-probabilities asked first; only those of rows after the warm-up are timed."""
    policy = load_policy(job["model"], dtype=DTYPES[job["dtype"]], train=True)
    policy.net.to(job["device"])
    rows = rows_of(job)
    order, device = shuffled(len(rows), 0, 0), job["device"]
    warm, timed = order[: job["per_step"]], order[job["per_step"] :]
    limit = MAX_TOKENS[device]
    ref = dict(zip(warm, row_logp(policy, [rows[i] for i in warm], max_tokens=limit), strict=True))
    settle(device)
    began = time.perf_counter()
    ref |= zip(timed, row_logp(policy, [rows[i] for i in timed], max_tokens=limit), strict=True)
    settle(device)
    found["reference"] = time.perf_counter() - began
    ranks = [list(range(len(row.branches))) for row in rows]
    source = ranking_source(rows, ranks, per_step=job["per_step"], seed=0, ref_logp=[ref[i] for i in range(len(rows))])
    return {"policy": policy}, Preference("dpo", {"beta": 0.1}, tolerance=5.0), source


def sft(job: Job, found: dict[str, Any]) -> Made:
    """Supervised fine-tuning on the responses."""
    policy = load_policy(job["model"], dtype=DTYPES[job["dtype"]], train=True)
    policy.net.to(job["device"])
    return {"policy": policy}, Supervised(), demonstration_source(rows_of(job), per_step=job["per_step"], seed=0)


def reward(job: Job, found: dict[str, Any]) -> Made:
    """A reward model on rankings of all of a row's responses, each forwarded once."""
    model = new_reward(job["model"], dtype=DTYPES[job["dtype"]])
    model.net.to(job["device"])
    rows = rows_of(job)
    ranks = [list(range(len(row.branches))) for row in rows]
    return {"reward": model}, RewardModel(), ranking_source(rows, ranks, per_step=job["per_step"], seed=0)


MAKERS = {"dpo": dpo, "sft": sft, "reward": reward, **reinforce.MAKERS}


def train(job: Job, clock: Clock) -> dict[str, Any]:
    """Train the job's steps and return the numbers of each, and bytes of weights, masters and moments."""
    deterministic_kernels()
    found: dict[str, Any] = {"numbers": []}
    forget_peak(job["device"])
    job["max_tokens"] = MAX_TOKENS[job["device"]]
    models, objective, source = MAKERS[job.get("kind") or job["row"]](job, found)
    reinforce.by_phase(source, clock)
    parameters = [p for model in models.values() for p in model.parameters().values()]
    steps = len(job["rows"]) // job["per_step"]

    def hook(step: int, metrics: Mapping[str, float]) -> None:
        clock.stop()
        found["numbers"].append(dict(metrics))
        if step + 1 == steps:
            raise Enough

    with tempfile.TemporaryDirectory() as folder:
        run = Run(
            directory=Path(folder),
            steps=steps,
            max_tokens=job["max_tokens"],
            checkpointing=job.get("checkpointing", False),
            save_every=steps + 1,
            console=Console(quiet=True),
        )
        optim = Optim(lr=job["lr"], betas=(0.9, 0.999))
        clock.start()
        with contextlib.suppress(Enough):
            fit(models, objective, source, optim=optim, run=run, hooks=[hook])
    masters = 0 if job["dtype"] == "fp32" else 4
    found["held"] = sum(p.numel() * (p.element_size() + masters + 8) for p in parameters)
    return found


def write_reward_start(model: str, directory: str) -> None:
    """A sequence classifier with the head that `reward` starts from, for the peer to load."""
    start = new_reward(model, dtype=torch.float32)
    save_merged(start, model, Path(directory), load_tokenizer(model))


def main() -> None:
    """Run a job, or write what both sides start from: a reward model, or old log-probabilities of given completions."""
    makers = {"reward-start": write_reward_start, "old-logp": reinforce.write_old_logp}
    if sys.argv[1] in makers:
        makers[sys.argv[1]](*sys.argv[2:4])
        return
    job = json.loads(Path(sys.argv[1]).read_text())
    make = generate if job["row"] == "generate" else train
    measured(job, lambda clock: make(job, clock))


if __name__ == "__main__":
    main()
