"""Our side of the row ``generate``: samples of forced lengths from the in-process engine, groups sharing their prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from benchmarks.compare.measure import DTYPES, Clock

from posttrain.models import lora as adapters
from posttrain.models.load import load_policy
from posttrain.ops.token_stats import logits_of
from posttrain.rollout.engine import Request, Rollout, Sampling
from posttrain.rollout.local import LocalEngine, _Decoder

FILL = 5
"""The token written where a stop token was drawn too early; the peer's script writes the same."""


class _Forced(_Decoder):
    """Ends each sequence at its own length, whatever was drawn there; log-probabilities are those of what stands there."""

    lengths: Sequence[int]

    def _sample(self, states: torch.Tensor, slots: list[Any]) -> None:
        super()._sample(states, slots)
        stops, changed = self.engine.stop_ids, list[int]()
        for place, slot in enumerate(slots):
            due = len(slot.ids) == self.lengths[slot.index]
            if due or slot.ids[-1] in stops:
                slot.ids[-1] = min(stops) if due else FILL
                changed.append(place)
        if changed and self.sampling.temperature:
            logp = logits_of(states[changed], self.head, self.sampling.temperature).log_softmax(1)
            for row, place in enumerate(changed):
                slots[place].logp[-1] = float(logp[row, slots[place].ids[-1]])


@dataclass
class ForcedEngine(LocalEngine):
    """The in-process engine with forced lengths of each prompt's samples, by the sample's number, the key's last entry."""

    forced: Mapping[tuple[int, ...], Sequence[int]] = field(default_factory=dict)

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_done: Callable[[int], None] | None = None
    ) -> list[Rollout]:
        """As the engine does, with forced ends."""
        from collections import deque

        order = sorted(range(len(requests)), key=lambda i: (requests[i].ids, i))
        with torch.no_grad(), adapters.merged(self.model.net, self.model.adapter):
            decoder = _Forced(self, requests, sampling, deque(order), on_done)
            decoder.lengths = [self.forced[r.ids][int(r.key[-1])] for r in requests]
            return decoder.run()


def generate(job: dict[str, Any], clock: Clock) -> dict[str, Any]:
    """Sample the job's batches, one a step; returns a checksum of each batch's tokens, and bytes of the weights."""
    model = load_policy(job["model"], dtype=DTYPES[job["dtype"]])
    model.net.to(job["device"])
    greedy = job["column"] == "ours" and job.get("greedy", False)
    numbers: list[dict[str, float]] = []
    size = job["per_step"]
    clock.start()
    for start in range(0, len(job["rows"]), size):
        rows = job["rows"][start : start + size]
        requests = [
            Request(tuple(row["prompt"]), (start, k, g))
            for k, row in enumerate(rows)
            for g in range(len(row["lengths"]))
        ]
        forced = {tuple(row["prompt"]): row["lengths"] for row in rows}
        engine = ForcedEngine(model, frozenset(job["stops"]), forced=forced)
        longest = max(n for row in rows for n in row["lengths"])
        sampling = Sampling(max_new_tokens=longest, temperature=0.0 if greedy else 1.0)
        rollouts = engine.generate(requests, sampling)
        clock.stop()
        ids = [i for r in rollouts for i in r.ids]
        numbers.append({"tokens": len(ids), "mean id": sum(ids) / len(ids)})
    held = sum(p.numel() * p.element_size() for p in model.net.parameters())
    return {"numbers": numbers, "held": held}
