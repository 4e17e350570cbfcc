"""The in-process engine: a prompt is prefilled once for all its samples, finished slots are refilled, weights are the trainer's own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from posttrain.errors import ModelError
from posttrain.forest import Tree
from posttrain.models import lora as adapters
from posttrain.models.attention import TreeLayout
from posttrain.models.decode import decoder_of
from posttrain.models.policy import Model
from posttrain.models.shared_slots import SharedSlots
from posttrain.models.slots import SlotLayout
from posttrain.ops.token_stats import Head, finished
from posttrain.rollout.engine import Request, Rollout, Sampling, uniforms

_BLOCK = 256  # entries of the vocabulary whose mass is summed before any is looked at


@dataclass
class _Slot:
    """One sequence being decoded."""

    index: int
    draws: np.ndarray
    ids: list[int] = field(default_factory=list[int])
    logp: list[float] = field(default_factory=list[float])


@dataclass(frozen=True)
class _Prefill:
    """A prompt's keys and values in the packed stream of its prefill, and its last state ``[d]``."""

    sink: dict[int, Any]
    span: tuple[int, int]
    state: Tensor


@dataclass
class LocalEngine:
    """Samples from a role of a network in this process.

    Attributes:
        model: the policy; the live weights are read, so there is nothing to copy after an update.
        stop_ids: every id that ends a response.
        slots: sequences decoded at once.
    """

    model: Model
    stop_ids: frozenset[int]
    slots: int = 32

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_done: Callable[[int], None] | None = None
    ) -> list[Rollout]:
        """Sample one rollout a request, in order; the log-probabilities are those of the distribution sampled.

        Raises:
            ModelError: the network can't share prompts exactly, so that this engine can't decode it.
        """
        if self.model.plain:
            raise ModelError(
                f"{type(self.model.net).__name__} fell back to plain rows; the in-process engine can't decode it"
            )
        if not requests:
            return []
        order = sorted(range(len(requests)), key=lambda i: (requests[i].ids, i))
        with torch.no_grad(), adapters.merged(self.model.net, self.model.adapter):
            return _Decoder(self, requests, sampling, deque(order), on_done).run()


class _Decoder:
    """One call of `LocalEngine.generate`: queue, slots, cache."""

    def __init__(
        self,
        engine: LocalEngine,
        requests: Sequence[Request],
        sampling: Sampling,
        queue: deque[int],
        on_done: Callable[[int], None] | None,
    ) -> None:
        self.engine, self.requests, self.sampling, self.queue, self.on_done = (
            engine,
            requests,
            sampling,
            queue,
            on_done,
        )
        self.head = engine.model.head
        self.device = self.head.weight.device
        self.decoder = decoder_of(engine.model)
        slots = min(engine.slots, len(requests))
        shared = self.decoder is not None and len({r.ids for r in requests}) * 2 <= len(requests) and slots > 1
        self.layout = SharedSlots(slots, self.device) if shared else SlotLayout(slots, self.device)
        self.active: list[_Slot] = []
        self.prefilled: dict[tuple[int, ...], _Prefill] = {}
        self.done: dict[int, Rollout] = {}

    def run(self) -> list[Rollout]:
        """Decode until every request is done."""
        while self.queue or self.active:
            free = self.layout.slots - len(self.active)
            if self.queue and free >= max(1, self.layout.slots // 8):
                self._fill(free)
            if self.active:
                self._step()
        return [self.done[i] for i in range(len(self.requests))]

    def _fill(self, free: int) -> None:
        """Put waiting requests into free slots, with their first token, which the prompt's last state predicts."""
        fresh = [self.queue.popleft() for _ in range(min(free, len(self.queue)))]
        self._prefill([ids for ids in dict.fromkeys(self.requests[i].ids for i in fresh) if ids not in self.prefilled])
        states: list[Tensor] = []
        slots: list[_Slot] = []
        for index in fresh:
            request = self.requests[index]
            known = self.prefilled[request.ids]
            place = len(self.active)
            self.layout.load(place, known.sink, known.span)
            slot = _Slot(index, uniforms(request.key, self.sampling.max_new_tokens))
            self.active.append(slot)
            slots.append(slot)
            states.append(known.state)
        waiting = {self.requests[i].ids for i in self.queue}
        self.prefilled = {ids: kept for ids, kept in self.prefilled.items() if ids in waiting}
        self._sample(torch.stack(states), slots)
        self._retire()

    def _prefill(self, prompts: list[tuple[int, ...]]) -> None:
        """Compute the keys, values and last states of distinct prompts in one packed pass."""
        if not prompts:
            return
        spans: list[tuple[int, int]] = []
        start = 0
        for ids in prompts:
            spans.append((start, start + len(ids)))
            start += len(ids)
        sink: dict[int, Any] = {}
        layout = TreeLayout([Tree(span, ()) for span in spans], start, self.device, sink)
        ids = torch.tensor([i for p in prompts for i in p], device=self.device)
        positions = torch.cat([torch.arange(len(p)) for p in prompts]).to(self.device)
        out = self.engine.model.trunk(input_ids=ids[None], position_ids=positions[None], use_cache=False, layout=layout)
        for prompt, span in zip(prompts, spans, strict=True):
            self.prefilled[prompt] = _Prefill(sink, span, out.last_hidden_state[0, span[1] - 1])

    def _step(self) -> None:
        """Feed every slot's newest token and sample the next."""
        count = len(self.active)
        ids = torch.tensor([slot.ids[-1] for slot in self.active], device=self.device)
        positions = self.layout.advance(count)
        if self.decoder is not None:
            states = self.decoder.states(ids, positions, self.layout)
        else:
            trunk, layout = self.engine.model.trunk, self.layout
            out = trunk(input_ids=ids[:, None], position_ids=positions[:, None], use_cache=False, layout=layout)
            states = out.last_hidden_state[:, 0]
        self._sample(states, self.active)
        self._retire()

    def _sample(self, states: Tensor, slots: list[_Slot]) -> None:
        """Append one token to each slot, drawn by inverting the cumulative distribution at the slot's own uniform."""
        product = (
            linear(states, self.head.weight, self.head.bias) if self.decoder is None else self.decoder.head(states)
        )
        logits = sampled_logits(product, self.head, self.sampling)
        draw = torch.tensor([slot.draws[len(slot.ids)] for slot in slots], dtype=torch.float64, device=self.device)
        tokens, logp = invert(logits, draw)
        for slot, token, value in zip(slots, tokens.tolist(), logp.tolist(), strict=True):
            slot.ids.append(token)
            slot.logp.append(value)

    def _retire(self) -> None:
        """Finish slots that stopped or are full, and move the last slot into the place of each."""
        place = 0
        while place < len(self.active):
            slot = self.active[place]
            stopped = slot.ids[-1] in self.engine.stop_ids
            if not stopped and len(slot.ids) < self.sampling.max_new_tokens:
                place += 1
                continue
            self.done[slot.index] = Rollout(self.requests[slot.index], tuple(slot.ids), tuple(slot.logp), stopped)
            last = len(self.active) - 1
            if place != last:
                self.active[place] = self.active[last]
                self.layout.move(last, place)
            self.active.pop()
            if self.on_done is not None:
                self.on_done(len(self.done))


def invert(logits: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens ``[S]`` at which the cumulative distribution of ``softmax(logits)`` ``[S, V]`` passes ``draw`` ``[S]`` in [0, 1).

    Also their log-probabilities ``[S]``, in nats. The mass is summed block by block, over blocks in float64, so that only the block a
    draw falls into is looked at token by token: one exponential an entry, and no cumulative sum over the vocabulary.
    """
    top = logits.amax(1, keepdim=True)
    mass = (logits - top).exp_()
    if odd := logits.shape[1] % _BLOCK:
        mass = torch.nn.functional.pad(mass, (0, _BLOCK - odd))
    mass = mass.unflatten(1, (-1, _BLOCK))
    upto = mass.sum(2).double().cumsum(1)
    total = upto[:, -1]
    point = (draw * total)[:, None]
    block = torch.searchsorted(upto, point, right=True).clamp(max=upto.shape[1] - 1)
    before = torch.where(block > 0, upto.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = mass[torch.arange(len(mass), device=mass.device), block[:, 0]].double()
    within = torch.searchsorted(inside.cumsum(1), point - before, right=True)[:, 0]
    # Sums in another order may end an ulp below the block's own mass: the last entry that has any is meant then.
    last = (inside > 0).long().cumsum(1).argmax(1)
    tokens = block[:, 0] * _BLOCK + torch.minimum(within, last)
    logp = logits.gather(1, tokens[:, None])[:, 0].double() - top[:, 0].double() - total.log()
    return tokens, logp.to(logits.dtype)


def sampled_logits(product: Tensor, head: Head, sampling: Sampling) -> Tensor:
    """Logits ``[S, V]`` of the distribution that is sampled, from the output layer's product; -inf outside its support.

    At temperature 0 the likeliest token has probability 1.
    """
    if sampling.temperature == 0:
        logits = finished(product, head)
        best = logits.argmax(1, keepdim=True)
        return torch.full_like(logits, float("-inf")).scatter(1, best, 0.0)
    logits = finished(product, head, sampling.temperature)
    if sampling.top_k is not None and sampling.top_k < logits.shape[1]:
        floor = logits.topk(sampling.top_k, 1).values[:, -1:]
        logits = logits.masked_fill(logits < floor, float("-inf"))
    if sampling.top_p < 1:
        ranked, index = logits.softmax(1).sort(1, descending=True)
        beyond = ranked.cumsum(1) - ranked >= sampling.top_p
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, index, beyond), float("-inf"))
    return logits
