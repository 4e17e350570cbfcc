"""Decoding slots whose sequences continue few prompts: a prompt's keys and values are kept and read once for all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from posttrain.models.slots import SlotLayout, scores_of

_Place = tuple[int, tuple[int, int]]


class SharedSlots(SlotLayout):
    """A `SlotLayout` of groups: ``cache`` holds what each slot has sampled, and the prompts stand beside it.

    The queries of P prompts with at most R slots each are laid out as ``[P, Hk, R G, D]``, so that a prompt's keys serve all
    its slots in one product; ``seat[s] = p R + r`` says where slot s stands in it. A softmax over both parts joins them.
    """

    def __init__(self, slots: int, device: torch.device) -> None:
        super().__init__(slots, device)
        self.sinks: dict[_Place, dict[int, Any]] = {}
        self.home: list[_Place | None] = [None] * slots
        self.begin = torch.zeros_like(self.position)  # tokens of each slot's prompt
        self.order: list[_Place] = []
        self.prompts: dict[int, tuple[Tensor, Tensor]] = {}
        self.width, self.seats = 0, 0
        self.seat, self.before = self.position[:0], self.position[:0]

    def load(self, slot: int, sink: dict[int, Any], span: tuple[int, int]) -> None:
        """Let a slot continue a prefilled prompt (tokens ``span`` of the prefill's packed stream)."""
        place = (id(sink), span)
        self.sinks[place], self.home[slot] = sink, place
        self.begin[slot] = span[1] - span[0]
        self.position[slot] = span[1] - span[0] - 1

    def move(self, source: int, target: int) -> None:
        """Put a slot's sequence into another's place."""
        super().move(source, target)
        self.home[target] = self.home[source]
        self.begin[target] = self.begin[source]

    def advance(self, count: int) -> Tensor:
        """Let the first ``count`` slots each take one more token; returns where they stand, ``[count]``."""
        self.position[:count] += 1
        self.fit(int((self.position - self.begin)[:count].max()) + 1)
        self._seat([place for place in self.home[:count] if place is not None])
        return self.position[:count]

    def _seat(self, homes: list[_Place]) -> None:
        """Give every slot a seat beside its prompt, and gather the prompts that are still continued."""
        live = list(dict.fromkeys(homes))
        if set(live) != set(self.order):
            self._gather(live)
        taken = dict.fromkeys(self.order, 0)
        ranks: list[tuple[int, int]] = []
        for place in homes:
            ranks.append((self.order.index(place), taken[place]))
            taken[place] += 1
        self.seats = max(taken.values())
        self.seat = torch.tensor([p * self.seats + r for p, r in ranks], device=self.position.device)

    def _gather(self, live: list[_Place]) -> None:
        """Put the keys and values of these prompts into one block a layer, ``[P, Hk, W, D]``."""
        self.order = live
        self.sinks = {place: self.sinks[place] for place in live}
        self.width = -(-max(end - start for _, (start, end) in live) // 32) * 32
        for layer, (key, value) in next(iter(self.sinks.values())).items():
            blocks = tuple(x.new_zeros((len(live), x.shape[1], self.width, x.shape[2])) for x in (key, value))
            for row, (place, sink) in enumerate(self.sinks.items()):
                start, end = place[1]
                for block, fresh in zip(blocks, sink[layer], strict=True):
                    block[row, :, : end - start] = fresh[start:end].transpose(0, 1)
            self.prompts[layer] = (blocks[0], blocks[1])

    def unseen(self, count: int, window: int | None) -> Tensor:
        """Which of ``W + L`` keys, the prompt's and its own, each of ``count`` slots does not see: bool ``[count, W + L]``."""
        if window not in self._unseen:
            begin, position = self.begin[:count, None], self.position[:count, None]
            before, own = (torch.arange(n, device=begin.device)[None] for n in (self.width, self.length))
            at = torch.cat([before.expand(count, -1), begin + own], 1)
            hidden = torch.cat([before >= begin, begin + own > position], 1)
            if window is not None:
                hidden = hidden | (position - at >= window)
            self._unseen[window] = hidden
        return self._unseen[window]

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        softcap: float | None,
        window: int | None,
    ) -> Tensor:
        """Return ``[S, 1, H, D]`` from query ``[S, H, 1, D]`` and this step's key and value ``[S, Hk, 1, D]``."""
        if softcap is not None:
            raise NotImplementedError("bounded scores over shared prompts")
        count, heads = query.shape[:2]
        keys, values = self._of(layer, key[:, :, 0], value[:, :, 0])
        rows, own_at = self.rows[:count], (self.position - self.begin)[:count]
        keys[rows, :, own_at] = key[:, :, 0]
        values[rows, :, own_at] = value[:, :, 0]
        kv_heads = keys.shape[1]
        grouped = query.reshape(count, kv_heads, heads // kv_heads, query.shape[3])
        own = scores_of(grouped.flatten(0, 1), keys[:count].flatten(0, 1), scaling).view(*grouped.shape[:3], -1)
        prompt_keys, prompt_values = (x.flatten(0, 1) for x in self.prompts[layer])
        shared = self._to_slots(scores_of(self._to_prompts(grouped), prompt_keys, scaling), kv_heads)
        scores = torch.cat([shared, own], -1).masked_fill_(self.unseen(count, window)[:, None, None], float("-inf"))
        share = scores.softmax(-1).to(value.dtype)
        before, after = share.split([self.width, self.length], -1)
        out = self._to_slots(torch.bmm(self._to_prompts(before), prompt_values), kv_heads)
        # Both parts are rounded before they are added, by less than their sum is.
        out = out + torch.bmm(after.reshape(-1, *after.shape[2:]), values[:count].flatten(0, 1)).view_as(out)
        return out.reshape(count, 1, heads, values.shape[3])

    def _to_prompts(self, x: Tensor) -> Tensor:
        """``[S, Hk, G, N]`` of slots as ``[P Hk, R G, N]`` of prompts, zero where a seat is empty."""
        _, kv_heads, groups, size = x.shape
        grid = x.new_zeros((len(self.order) * self.seats, kv_heads, groups, size)).index_copy_(0, self.seat, x)
        grid = grid.view(len(self.order), self.seats, kv_heads, groups, size).transpose(1, 2)
        return grid.reshape(len(self.order) * kv_heads, self.seats * groups, size)

    def _to_slots(self, x: Tensor, kv_heads: int) -> Tensor:
        """The way back, ``[P Hk, R G, N]`` to ``[S, Hk, G, N]``."""
        grid = x.view(len(self.order), kv_heads, self.seats, -1, x.shape[2]).transpose(1, 2)
        return grid.flatten(0, 1).index_select(0, self.seat)
