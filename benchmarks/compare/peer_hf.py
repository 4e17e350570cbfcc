"""Transformers' side of the row ``generate``, in TRL's environment: ``python peer_hf.py JOB``.

``defaults`` are those of TRL's trainers without an engine of its own: fp32 weights under bf16 autocast in a bf16 row, every
sample of a group with its own copy of the prompt, padded on the left, a growing cache. ``tuned`` has weights in the row's
dtype and a static cache. A logits processor ends each sequence at its own length.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import measure
import torch
import transformers
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

FILL = 5
Job = dict[str, Any]


class Ends(LogitsProcessor):
    """Only the stop token where a row's length is reached, and no stop token before."""

    def __init__(self, lengths: torch.Tensor, stops: list[int], start: int, greedy: bool) -> None:
        self.lengths, self.stops, self.start, self.greedy = lengths, stops, start, greedy

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        due = self.lengths == input_ids.shape[1] - self.start + 1
        wrong = torch.isin(scores.argmax(1), torch.tensor(self.stops, device=scores.device)) if self.greedy else None
        scores[:, self.stops] = -torch.inf
        if wrong is not None:
            scores[wrong] = -torch.inf
            scores[wrong, FILL] = 0.0
        scores[due] = -torch.inf
        scores[due, min(self.stops)] = 0.0
        return scores


def train(job: Job, clock: measure.Clock) -> dict[str, Any]:
    """Sample the job's batches, one a step."""
    column, device, dtype = job["column"], job["device"], measure.DTYPES[job["dtype"]]
    mixed = column == "defaults" and job["dtype"] == "bf16"
    net: Any = (
        AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32 if mixed else dtype).to(device).eval()
    )
    forward = net.forward
    if mixed:  # as accelerate prepares a model

        def under_autocast(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast(device, dtype=torch.bfloat16):
                return forward(*args, **kwargs)

        net.forward = under_autocast
    more = {"cache_implementation": "static"} if column == "tuned" else {}
    found: dict[str, Any] = {"numbers": [], "shapes": [], "scored": []}
    size = job["per_step"]
    clock.start()
    for start in range(0, len(job["rows"]), size):
        rows = job["rows"][start : start + size]
        prompts = [row["prompt"] for row in rows for _ in row["lengths"]]
        lengths = [n for row in rows for n in row["lengths"]]
        width, pad = max(map(len, prompts)), job["stops"][0]
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        ends = Ends(torch.tensor(lengths, device=device), job["stops"], width, column == "check")
        with torch.no_grad():
            out = net.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=column != "check",
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=max(lengths),
                eos_token_id=job["stops"],
                pad_token_id=pad,
                logits_processor=LogitsProcessorList([ends]),
                disable_compile=True,
                **more,
            )
        clock.stop()
        made = [i for row, n in zip(out[:, width:].tolist(), lengths, strict=True) for i in row[:n]]
        found["numbers"].append({"tokens": len(made), "mean id": sum(made) / len(made)})
        found["shapes"].append([len(prompts), width + max(lengths)])
        found["scored"].append(len(prompts) * max(lengths))
    held = sum(p.numel() * p.element_size() for p in net.parameters())
    return {**found, "held": held, "transformers": transformers.__version__}


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    measure.measured(job, lambda clock: train(job, clock))
