"""Decoding slots: a key-value cache of sequences that grow by one token a step, and attention of one query over it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from posttrain.models.attention import attend
from posttrain.ops.recorded import recorded

_STRIDE = 64  # positions by which a cache grows; kernels are prepared once for each length they meet
_FEW = 640  # keys in all, of bf16, up to which one fused kernel is faster than two products


class SlotLayout:
    """A key-value cache of S slots, each decoding its own sequence one token a step.

    ``cache[layer] = (key, value)``, each ``[S, Hk, L, D]``; ``position`` ``[S]`` is where this step's token stands. L is kept
    just above the longest sequence, so that the filled part is one block of memory.
    """

    def __init__(self, slots: int, device: torch.device) -> None:
        self.slots, self.length = slots, 0
        self.cache: dict[int, tuple[Tensor, Tensor]] = {}
        self.position = torch.zeros(slots, dtype=torch.long, device=device)
        self.rows = torch.arange(slots, device=device)
        self._unseen: dict[int | None, Tensor] = {}

    def fit(self, used: int) -> None:
        """Make the cache long enough for ``used`` tokens a slot, and shorter where over a quarter of it lies idle."""
        self._unseen.clear()
        want = -(-used // _STRIDE) * _STRIDE
        if self.length * 3 // 4 < want <= self.length:
            return
        self.length = want
        self.cache = {layer: (self._resized(key), self._resized(value)) for layer, (key, value) in self.cache.items()}

    def _resized(self, old: Tensor) -> Tensor:
        kept = min(old.shape[2], self.length)
        new = old.new_zeros((*old.shape[:2], self.length, old.shape[3]))
        new[:, :, :kept] = old[:, :, :kept]
        return new

    def advance(self, count: int) -> Tensor:
        """Let the first ``count`` slots each take one more token; returns where they stand, ``[count]``."""
        self.position[:count] += 1
        self.fit(int(self.position[:count].max()) + 1)
        return self.position[:count]

    def load(self, slot: int, sink: dict[int, Any], span: tuple[int, int]) -> None:
        """Put a prefilled prompt (tokens ``span`` of the prefill's packed stream) into a slot."""
        start, end = span
        self.fit(max(end - start, self.length))
        for layer, (key, value) in sink.items():
            for kept, fresh in zip(self._of(layer, key, value), (key, value), strict=True):
                kept[slot, :, : end - start] = fresh[start:end].transpose(0, 1)
        self.position[slot] = end - start - 1

    def move(self, source: int, target: int) -> None:
        """Put a slot's sequence into another's place."""
        self.position[target] = self.position[source]
        for key, value in self.cache.values():
            key[target], value[target] = key[source], value[source]

    def _of(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's cache, made for keys and values ``[..., Hk, D]`` like these if it is new."""
        if layer not in self.cache:
            shape = (self.slots, key.shape[-2], self.length)
            self.cache[layer] = (key.new_zeros((*shape, key.shape[-1])), value.new_zeros((*shape, value.shape[-1])))
        return self.cache[layer]

    def unseen(self, count: int, window: int | None) -> Tensor:
        """Which of L keys each of ``count`` slots does not see, bool ``[count, L]``; once a step for all layers."""
        if window not in self._unseen:
            step, position = torch.arange(self.length, device=self.position.device)[None], self.position[:count, None]
            hidden = step > position
            if window is not None:
                hidden = hidden | (position - step >= window)
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
        count = len(query)
        cache = self._of(layer, key[:, :, 0], value[:, :, 0])
        where = (*cache, self.rows[:count], self.position[:count])
        unseen = self.unseen(count, window)
        if query.device.type != "cpu" or softcap is not None:
            grouped, keys, values = kept(query, key, value, *where)
            out = attend(grouped, keys, values, ~unseen[:, None, None], scaling, softcap)
            return out.reshape(count, 1, -1, values.shape[3])
        few = query.dtype == torch.bfloat16 and count * self.length <= _FEW
        return recorded(_of_slots, query, key, value, *where, unseen, scaling=scaling, fused=few)


def kept(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, rows: Tensor, position: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Write a step's keys and values into a cache; returns ``[S, Hk, G, D]`` queries and the keys and values of these slots.

    The queries of one key head stand as rows of one attention, so that keys are not copied for each of them.
    """
    keys.transpose(1, 2).index_put_((rows, position), key[:, :, 0])
    values.transpose(1, 2).index_put_((rows, position), value[:, :, 0])
    count = rows.shape[0]
    return query.reshape(count, keys.shape[1], -1, query.shape[3]), keys[:count], values[:count]


def _of_slots(query: Tensor, key: Tensor, value: Tensor, *where: Tensor, scaling: float, fused: bool) -> Tensor:
    """`SlotLayout.attend` on a processor, from the cache, rows, positions and what is not seen."""
    grouped, keys, values = kept(query, key, value, *where[:4])
    if fused:
        seen = ~where[4][:, None, None]
        out = scaled_dot_product_attention(grouped, keys, values, seen, scale=scaling)
    else:
        out = by_products(grouped, keys, values, where[4], scaling)
    return out.reshape(out.shape[0], 1, -1, out.shape[3])


def by_products(query: Tensor, key: Tensor, value: Tensor, unseen: Tensor, scaling: float) -> Tensor:
    """Attention ``[S, Hk, G, D]`` of the G queries of each key head, as two batched products.

    Fused kernels are made for many queries: with one each they take up to three times as long, but begin sooner.
    """
    rows, kv_heads, groups, _ = query.shape
    scores = scores_of(query.flatten(0, 1), key.flatten(0, 1), scaling).view(rows, kv_heads * groups, -1)
    share = scores.masked_fill_(unseen[:, None], float("-inf")).softmax(-1).to(value.dtype)
    return torch.bmm(share.view(rows * kv_heads, groups, -1), value.flatten(0, 1)).view(query.shape)


def scores_of(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Scores ``[N, Q, L]`` of ``[N, Q, D]`` queries and ``[N, L, D]`` keys, in fp32 at least.

    A product of half-precision factors is rounded to half precision, which is too coarse for scores; the same product less
    its rounded self is what the rounding lost.
    """
    scores = torch.bmm(query, key.transpose(1, 2))
    if query.dtype in (torch.bfloat16, torch.float16):
        scores = scores.float().add_(torch.baddbmm(scores, query, key.transpose(1, 2), beta=-1))
    return scores.mul_(scaling)
