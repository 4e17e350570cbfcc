"""TRL's side of a comparison, run by the Python of its own environment: ``python peer_trl.py JOB``.

It trains with TRL's own trainer, collator and loop on token ids that were already made. Timed: from one end of a step to
the next, so the batch, forward, backward, clipping, AdamW, the schedule and TRL's own metrics. Columns: ``defaults`` are
TRL's, with the job's batch, order and learning rate; ``tuned`` is without checkpointing, with the reference's
log-probabilities computed before, and sorted by length (weights in fp32 under bf16 autocast, TRL's default, were found
no slower than weights in bf16); ``check`` is in fp32 without checkpointing and logs each step.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import measure
import transformers
import trl  # pyright: ignore[reportMissingImports]
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback

Job = dict[str, Any]


def dpo_rows(job: Job) -> list[dict[str, Any]]:
    """Pairs as TRL's collator wants them."""
    return [
        {"prompt_ids": i["prompt"], "chosen_ids": i["branches"][0], "rejected_ids": i["branches"][1]}
        for i in job["rows"]
    ]


def sft_rows(job: Job) -> list[dict[str, Any]]:
    """Prompt and response as one sequence, with labels as TRL's preparation makes them: the response's."""
    return [
        {
            "input_ids": i["prompt"] + i["branches"][0],
            "labels": [-100] * len(i["prompt"]) + i["branches"][0],
        }
        for i in job["rows"]
    ]


def reward_rows(job: Job) -> list[dict[str, Any]]:
    """Every pair of a ranking, each with its prompt."""
    return [
        {"chosen_ids": i["prompt"] + better, "rejected_ids": i["prompt"] + worse}
        for i in job["rows"]
        for k, better in enumerate(i["branches"])
        for worse in i["branches"][k + 1 :]
    ]


TRAINERS = {
    "dpo": (trl.DPOTrainer, trl.DPOConfig, dpo_rows),
    "sft": (trl.SFTTrainer, trl.SFTConfig, sft_rows),
    "reward": (trl.RewardTrainer, trl.RewardConfig, reward_rows),
}


def settings(job: Job, batch: int, steps: int, folder: str) -> dict[str, Any]:
    """Arguments of TRL's configuration; what is not named here is TRL's default."""
    column = job["column"]
    out: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": batch,
        "max_steps": steps,
        "train_sampling_strategy": "sequential",
        "learning_rate": job["lr"],
        "lr_scheduler_type": "constant",
        "max_length": 2048,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": job["device"] == "cpu",
        "bf16": job["dtype"] == "bf16",
    }
    if column != "defaults":
        out["gradient_checkpointing"] = False
    if column == "tuned" and job["row"] == "dpo":
        out["precompute_ref_log_probs"] = True
    if column == "check":
        out["logging_steps"] = 1
    return out


class Watch(TrainerCallback):
    """Starts and stops the clock where TRL's loop does."""

    def __init__(self, clock: measure.Clock) -> None:
        self.clock = clock

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.clock.start()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.clock.stop()


def held_by(trainer: Any) -> int:
    """Bytes of the weights and the optimiser's moments."""
    tensors = [t for state in trainer.optimizer.state.values() for t in state.values() if t.dim()]
    return sum(t.numel() * t.element_size() for t in [*trainer.model.parameters(), *tensors])


def train(job: Job, clock: measure.Clock) -> dict[str, Any]:
    """Train the job's steps; returns shapes of the batches, logged numbers, and bytes of weights and moments."""
    base, config, rows_of = TRAINERS[job["row"]]
    rows = rows_of(job)
    steps = len(job["rows"]) // job["per_step"]
    batch = len(rows) // steps
    shapes: list[list[int]] = []
    passes: list[float] = []

    class Trainer(base):  # ids are made already
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def compute_ref_log_probs(self, *args: Any) -> Any:
            began = time.perf_counter()
            out = super().compute_ref_log_probs(*args)
            measure.settle(job["device"])
            passes.append(time.perf_counter() - began)
            return out

        def training_step(self, model: Any, inputs: Any, *args: Any) -> Any:
            shapes.append(list(inputs["input_ids"].shape))
            return super().training_step(model, inputs, *args)

    measure.forget_peak(job["device"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=job["model"],
            args=config(**settings(job, batch, steps, folder)),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(job["model"]),
            callbacks=[Watch(clock)],
        )
        trainer.model.get_input_embeddings().padding_idx = None  # else the stop token, pad here, would get no gradient
        reference = getattr(trainer, "ref_model", None)
        if reference is not None:
            reference.forward = clock.timed("reference", reference.forward)
        trainer.train()
    return {
        "reference": sum(passes[1:]),
        "shapes": shapes,
        "numbers": [x for x in trainer.state.log_history if "loss" in x],
        "held": held_by(trainer),
        "copy": sum(p.numel() * p.element_size() for p in reference.parameters()) if reference is not None else 0,
    }


def main() -> None:
    """Run a job; the row ``grpo`` has a file of its own."""
    job = json.loads(Path(sys.argv[1]).read_text())
    make = train
    if job["row"] == "grpo":
        from peer_grpo import train as make
    versions = {"trl": trl.__version__, "transformers": transformers.__version__}
    measure.measured(job, lambda clock: make(job, clock) | versions)


if __name__ == "__main__":
    main()
