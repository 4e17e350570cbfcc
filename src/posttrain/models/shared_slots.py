"""Decoding slots whose sequences continue few prompts: a prompt's keys and values are kept and read once for all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from posttrain.models.slots import SlotLayout, kept, scores_of
from posttrain.ops.recorded import recorded

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
        self.width = 0
        self.seat = self.position[:0]
        self.seats = self.position[:0, None]  # read for its shape [P, R] alone

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
        most = max(taken.values())
        self.seats = torch.empty((len(self.order), most), device=self.position.device)
        self.seat = torch.tensor([p * most + r for p, r in ranks], device=self.position.device)

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
        count = len(query)
        cache = self._of(layer, key[:, :, 0], value[:, :, 0])
        own_at = (self.position - self.begin)[:count]
        where = (
            *cache,
            self.rows[:count],
            own_at,
            *self.prompts[layer],
            self.seat,
            self.seats,
            self.unseen(count, window),
        )
        return recorded(_of_shared_slots, query, key, value, *where, scaling=scaling)


def _of_shared_slots(query: Tensor, key: Tensor, value: Tensor, *where: Tensor, scaling: float) -> Tensor:
    """`SharedSlots.attend`, from the cache, rows, positions, the prompts, the seats and what is not seen."""
    grouped, keys, values = kept(query, key, value, *where[:4])
    prompt_keys, prompt_values, seat, seats, unseen = where[4:]
    count, kv_heads, groups, width = grouped.shape
    own = scores_of(grouped.flatten(0, 1), keys.flatten(0, 1), scaling).view(count, kv_heads, groups, -1)
    shared = scores_of(_to_prompts(grouped, seat, seats), prompt_keys.flatten(0, 1), scaling)
    scores = torch.cat([_to_slots(shared, seat, seats, kv_heads), own], -1)
    share = scores.masked_fill_(unseen[:, None, None], float("-inf")).softmax(-1).to(value.dtype)
    before, after = share[..., : prompt_keys.shape[2]], share[..., prompt_keys.shape[2] :]
    seen = torch.bmm(_to_prompts(before, seat, seats), prompt_values.flatten(0, 1))
    # Both parts are rounded before they are added, by less than their sum is.
    out = _to_slots(seen, seat, seats, kv_heads) + torch.bmm(
        after.reshape(count * kv_heads, groups, -1), values.flatten(0, 1)
    ).view(grouped.shape)
    return out.reshape(count, 1, -1, width)


def _to_prompts(x: Tensor, seat: Tensor, seats: Tensor) -> Tensor:
    """``[S, Hk, G, N]`` of slots as ``[P Hk, R G, N]`` of prompts, zero where one of ``[P, R]`` seats is empty."""
    prompts, each = seats.shape
    _, kv_heads, groups, size = x.shape
    grid = x.new_zeros((prompts * each, kv_heads, groups, size)).index_copy_(0, seat, x)
    grid = grid.view(prompts, each, kv_heads, groups, size).transpose(1, 2)
    return grid.reshape(prompts * kv_heads, each * groups, size)


def _to_slots(x: Tensor, seat: Tensor, seats: Tensor, kv_heads: int) -> Tensor:
    """The way back, ``[P Hk, R G, N]`` to ``[S, Hk, G, N]``."""
    prompts, each = seats.shape
    grid = x.view(prompts, kv_heads, each, -1, x.shape[2]).transpose(1, 2)
    return grid.flatten(0, 1).index_select(0, seat)
