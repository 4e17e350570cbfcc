"""TRL's side of the row ``grpo``, which `peer_trl` calls: TRL's own trainer and loop on the ids of the job's prompts.

``update``: completions, advantages and old log-probabilities are given, in the place of those that it would have sampled
and scored. ``step``: it samples with transformers, each sequence ended at its own length by a logits processor, scores by
length and updates. No reference on either side (``beta`` 0 is TRL's default), nor another update on the same samples.
``tuned`` is without checkpointing; where it samples, with weights in the row's dtype and a static cache.
"""

from __future__ import annotations

import tempfile
from typing import Any

import measure
import torch
import trl  # pyright: ignore[reportMissingImports]
from datasets import Dataset
from peer_hf import Ends
from peer_trl import Watch, held_by, settings
from transformers import AutoTokenizer, LogitsProcessorList
from trl.trainer.utils import pad  # pyright: ignore[reportMissingImports]

Job = dict[str, Any]


def config(job: Job, folder: str) -> Any:
    """TRL's configuration; what is not named here or in `settings` is its default."""
    rows, size, sampling = job["rows"], job["per_step"], job["kind"] == "step"
    group = len(rows[0]["lengths"])
    out = settings(job, size * group, len(rows) // size, folder)
    del out["max_length"]
    out |= {"num_generations": group, "max_completion_length": job["longest"], "shuffle_dataset": False}
    if job["column"] == "tuned" and sampling:
        out |= {"cache_implementation": "static"}
        out |= {"model_init_kwargs": {"dtype": "bfloat16"}} if job["dtype"] == "bf16" else {}
    return trl.GRPOConfig(**out)


class Trainer(trl.GRPOTrainer):
    """TRL's trainer whose prompts are numbers of the job's rows."""

    job: Job
    found: dict[str, Any]

    def chosen(self, prompts: list[str]) -> list[dict[str, Any]]:
        """The rows of a batch, each once."""
        return [self.job["rows"][int(p)] for p in prompts[:: self.num_generations]]

    def _tokenize_prompts(self, prompts: list[str]) -> Any:
        self.now = self.chosen(prompts)
        return [row["prompt"] for row in self.now for _ in row["lengths"]], None, {}

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Any:
        if self.job["kind"] == "step":
            out = super()._generate_and_score_completions(inputs)
        else:
            out = given(self, self.chosen([x["prompt"] for x in inputs]))
        count, width = out["completion_ids"].shape
        self.found["shapes"].append([count, out["prompt_ids"].shape[1] + width])
        self.found["scored"].append(count * width)
        return out

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        out = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self.logps = out[0].detach()
        return out

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        loss, mask = super()._compute_loss(model, inputs), inputs["completion_mask"]
        self.found["logps"].append(((self.logps * mask).sum() / mask.sum()).item())
        return loss


def given(trainer: Trainer, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """What TRL makes of its own samples, padded as it does."""
    device = trainer.accelerator.device

    def wide(lists: list[list[float]], side: str, value: float = 0) -> torch.Tensor:
        return pad([torch.tensor(x) for x in lists], padding_value=value, padding_side=side).to(device)

    prompts = [row["prompt"] for row in rows for _ in row["branches"]]
    branches = [branch for row in rows for branch in row["branches"]]
    fill, mask = trainer.processing_class.pad_token_id, wide([[1] * len(b) for b in branches], "right")
    return {
        "prompt_ids": wide(prompts, "left", fill),
        "prompt_mask": wide([[1] * len(p) for p in prompts], "left"),
        "completion_ids": wide(branches, "right", fill),
        "completion_mask": mask,
        "old_per_token_logps": wide([old for row in rows for old in row["old_logp"]], "right"),
        "advantages": torch.tensor([a for row in rows for a in row["advantage"]], device=device),
        "num_items_in_batch": mask.sum(),
    }


def sampling_to_length(trainer: Trainer, clock: measure.Clock) -> Any:
    """The model's own ``generate``, each sequence ended at its length; its seconds are those of the rollout."""
    generate, job = trainer.model.generate, trainer.job

    def forced(**kwargs: Any) -> Any:
        lengths = torch.tensor([n for row in trainer.now for n in row["lengths"]], device=kwargs["input_ids"].device)
        ends = Ends(lengths, job["stops"], kwargs["input_ids"].shape[1], greedy=False)
        return generate(**kwargs, logits_processor=LogitsProcessorList([ends]))

    return clock.timed("rollout", forced)


def train(job: Job, clock: measure.Clock) -> dict[str, Any]:
    """Train the job's steps; returns shapes of the batches, logged numbers, and bytes of weights and moments."""

    def by_length(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [len(ids) / job["longest"] for ids in completion_ids]

    measure.forget_peak(job["device"])
    found: dict[str, Any] = {"shapes": [], "scored": [], "logps": []}
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=job["model"],
            reward_funcs=by_length,
            args=config(job, folder),
            train_dataset=Dataset.from_list([{"prompt": str(k)} for k in range(len(job["rows"]))]),
            processing_class=AutoTokenizer.from_pretrained(job["model"]),
            callbacks=[Watch(clock)],
        )
        trainer.job, trainer.found = job, found
        trainer.model.get_input_embeddings().padding_idx = None  # else the stop token, pad here, would get no gradient
        trainer.model.generate = sampling_to_length(trainer, clock)
        trainer.train()
    logged = [x for x in trainer.state.log_history if "loss" in x]
    numbers = [x | {"logps/mean": y} for x, y in zip(logged, found.pop("logps"), strict=False)]
    return found | {"numbers": numbers, "held": held_by(trainer)}
