"""Attention over forests and over decoding slots, registered with transformers' attention interface.

A forward pass of any dense decoder gets ``layout=`` among its keyword arguments; every attention layer hands its query,
key and value to that layout. `TreeLayout` computes a prompt once for all its branches;
`posttrain.models.slots.SlotLayout` decodes one token a slot against a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from posttrain.forest import Forest, Tree

NAME = "posttrain"
# Half precision on a processor, keys a row: up to the first two, scores are written out (in causal attention the fused
# kernel skips half of them); up to the third the fused kernel is faster on numbers made fp32.
_SHORT_CAUSAL, _SHORT, _WIDE = 96, 256, 1024
_CALL = 1 << 15  # scores a head that take as long as one more call


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float | None
) -> Tensor:
    """Attention of ``[B, H, Q, D]`` queries over ``[B, Hk, L, D]`` keys; ``mask`` bool ``[B or 1, 1, Q, L]``, None = causal.

    Each key head serves ``H / Hk`` query heads; ``softcap`` bounds scores by ``c tanh(s / c)`` before the mask (Gemma 2).
    """
    if softcap is not None:
        return _capped(query, key, value, mask, scaling, softcap)
    half = query.dtype in (torch.bfloat16, torch.float16) and query.device.type == "cpu"
    keys = key.shape[2]
    if half and query.shape[2] > 1 and keys <= (_SHORT_CAUSAL if mask is None else _SHORT):
        return _short(query, key, value, mask, scaling)
    wide = half and query.shape[2] > 1 and keys <= _WIDE
    q, k, v = (x.float() if wide else x for x in (query, key, value))
    grouped = q.shape[1] != k.shape[1]
    out = scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped)
    return out.to(query.dtype)


def _capped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float) -> Tensor:
    """The same with bounded scores, which no fused kernel has."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scaling / softcap)
    if mask is None:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
    working = torch.promote_types(scores.dtype, torch.float32)
    return scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=working).to(value.dtype) @ value


def _short(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """The same with the scores written out in fp32.

    Over short rows of half-precision numbers the processor's fused kernel, its backward pass above all, takes several
    times as long; grouped queries stand as rows of one product, so that keys are not copied for each.
    """
    rows, heads, length, width = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    groups = heads // kv_heads
    wide_q = (query.float() * scaling).reshape(rows * kv_heads, groups * length, width)
    wide_k = key.float().reshape(rows * kv_heads, keys, width)
    wide_v = value.float().reshape(rows * kv_heads, keys, value.shape[3])
    if mask is None:
        mask = torch.ones(length, keys, dtype=torch.bool, device=query.device).tril()[None, None]
    scores = (wide_q @ wide_k.transpose(1, 2)).view(rows, kv_heads, groups, length, keys)
    share = scores.masked_fill_(~mask[:, :, None], float("-inf")).softmax(-1)
    out = share.view(rows * kv_heads, groups * length, keys) @ wide_v
    return out.view(rows, heads, length, value.shape[3]).to(query.dtype)


@dataclass(frozen=True)
class _Rows:
    """Rows of like size that attend in one call: queries ``[R, C]`` after ``prefix`` ``[R]`` keys of padded width P."""

    rows: int
    length: int
    prefix: Tensor | None
    width: int

    def mask(self, window: int | None, device: torch.device) -> Tensor | None:
        """Which of ``P + C`` keys each token sees: its prefix and its own past, by position. None = plainly causal."""
        own = torch.arange(self.length, device=device)
        past = own[:, None] >= own[None]
        if window is not None:
            past = past & (own[:, None] - own[None] < window)
        if self.prefix is None:
            return None if window is None else past[None, None]
        before, prefix = torch.arange(self.width, device=device), self.prefix[:, None, None]
        seen = (before[None, None] < prefix).expand(-1, self.length, -1)
        if window is not None:
            seen = seen & (prefix + own[None, :, None] - before[None, None] < window)
        return torch.cat([seen, past[None].expand(self.rows, -1, -1)], 2)[:, None]


class TreeLayout:
    """Where each token of a forest stands in blocks of rows.

    A prompt with its first branch is a causal row, every other branch a row that also sees its prompt's keys. Rows of like
    size share a block, so that little is padded. With ``sink`` the keys and values of every layer are kept,
    ``sink[layer] = (key, value)`` each ``[N, Hk, D]``.
    """

    def __init__(self, trees: Sequence[Tree], size: int, device: torch.device, sink: dict[int, Any] | None = None):
        self.sink = sink
        self.masks: dict[int | None, list[Tensor | None]] = {}
        self.blocks: list[_Rows] = []
        queries: list[Tensor] = []
        keys: list[Tensor] = []
        inverse = torch.empty(size, dtype=torch.long, device=device)
        start = 0
        whole = [((0, 0), (t.prompt[0], t.branches[0][1] if t.branches else t.prompt[1])) for t in trees]
        others = [(t.prompt, span) for t in trees for span in t.branches[1:]]
        for spans in (*_alike(whole), *_alike(others)):
            prefix = [before for before, _ in spans]
            own, mask, at = _block([span for _, span in spans], device)
            inverse[own[mask]] = at + start
            start += own.numel()
            queries.append(own.flatten())
            shared, lengths = None, None
            if spans[0][0] != (0, 0):
                shared, _, _ = _block(prefix, device)
                lengths = torch.tensor([e - s for s, e in prefix], device=device)
            keys.append((own if shared is None else torch.cat([shared, own], 1)).flatten())
            width = 0 if shared is None else shared.shape[1]
            self.blocks.append(_Rows(len(spans), own.shape[1], lengths, width))
        self.query, self.key, self.inverse = torch.cat(queries), torch.cat(keys), inverse

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
        """Return ``[1, N, H, D]`` from query ``[1, H, N, D]`` and key, value ``[1, Hk, N, D]``."""
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        if self.sink is not None:
            self.sink[layer] = (k, v)
        if window not in self.masks:
            self.masks[window] = [b.mask(window, query.device) for b in self.blocks]
        own = q.index_select(0, self.query).split([b.rows * b.length for b in self.blocks])
        seen = [x.index_select(0, self.key).split([b.rows * (b.width + b.length) for b in self.blocks]) for x in (k, v)]
        flat: list[Tensor] = []
        for block, mask, *parts in zip(self.blocks, self.masks[window], own, *seen, strict=True):
            rows = [x.unflatten(0, (block.rows, -1)).transpose(1, 2) for x in parts]
            flat.append(attend(rows[0], rows[1], rows[2], mask, scaling, softcap).transpose(1, 2).flatten(0, 1))
        return torch.cat(flat).index_select(0, self.inverse)[None]


def _alike(
    rows: Sequence[tuple[tuple[int, int], tuple[int, int]]],
) -> list[list[tuple[tuple[int, int], tuple[int, int]]]]:
    """Group rows (prefix, own) so that the scores which padding adds to a group cost less than another call would."""
    groups: list[list[tuple[tuple[int, int], tuple[int, int]]]] = []
    used = most_before = most_own = 0
    for row in sorted(rows, key=lambda r: (r[0][1] - r[0][0] + r[1][1] - r[1][0], r), reverse=True):
        before, own = (end - start for start, end in row)
        area = own * (before + own)
        widest = max(most_own, own) * (max(most_before, before) + max(most_own, own))
        if groups and (len(groups[-1]) + 1) * widest - used - area <= _CALL:
            groups[-1].append(row)
            used, most_before, most_own = used + area, max(most_before, before), max(most_own, own)
        else:
            groups.append([row])
            used, most_before, most_own = area, before, own
    return groups


def _block(spans: Sequence[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Pad spans to a block: token index ``[R, W]`` (0 where padded), mask ``[R, W]``, and flat places of real tokens."""
    starts = torch.tensor([s for s, _ in spans], device=device)
    lengths = torch.tensor([e - s for s, e in spans], device=device)
    step = torch.arange(int(lengths.max()), device=device)
    mask = step[None] < lengths[:, None]
    index = torch.where(mask, starts[:, None] + step[None], 0)
    return index, mask, mask.flatten().nonzero()[:, 0]


def _forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Any = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every attention layer; without a layout, plain causal attention over each row."""
    if layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if kwargs.get("s_aux") is not None or dropout:
        raise NotImplementedError("attention sinks and attention dropout are not supported over a forest")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    layer: int = module.layer_idx  # pyright: ignore[reportAssignmentType]
    return layout.attend(layer, query, key, value, scale, softcap, sliding_window), None


AttentionInterface.register(NAME, _forward)


def forest_layout(forest: Forest, sink: dict[int, Any] | None = None) -> TreeLayout:
    """Return the layout of a forest's tokens."""
    return TreeLayout(forest.trees, len(forest.ids), forest.ids.device, sink)
