"""Attention over forests and over decoding slots, registered with transformers' attention interface.

A forward pass of any dense decoder gets ``layout=`` among its keyword arguments; every attention layer hands its query,
key and value to that layout. `TreeLayout` computes a prompt once for all its branches in two attention calls a layer;
`SlotLayout` decodes one token a slot against a static cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from posttrain.forest import Forest, Tree

NAME = "posttrain"
_SHORT = 256  # keys a row up to which scores are written out in half precision


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float | None
) -> Tensor:
    """Attention of ``[B, H, Q, D]`` queries over ``[B, Hk, L, D]`` keys; ``mask`` bool ``[B or 1, 1, Q, L]``, None = causal.

    Grouped queries are expanded; ``softcap`` bounds scores by ``c tanh(s / c)`` before the mask (Gemma 2).
    """
    half = query.dtype in (torch.bfloat16, torch.float16) and query.device.type == "cpu"
    if half and softcap is None and query.shape[2] > 1 and key.shape[2] <= _SHORT:
        return _short(query, key, value, mask, scaling)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if softcap is None:
        return scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=scaling)
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


class TreeLayout:
    """Where each token of a forest stands in two padded blocks, prompts ``[T, P]`` and branches ``[B, C]``.

    With ``sink`` the keys and values of every layer are kept, ``sink[layer] = (key, value)`` each ``[N, Hk, D]``.
    """

    def __init__(self, trees: Sequence[Tree], size: int, device: torch.device, sink: dict[int, Any] | None = None):
        self.sink = sink
        self.prompt, prompt_mask, at_prompt = _block([t.prompt for t in trees], device)
        spans = [span for t in trees for span in t.branches]
        self.group = torch.tensor([i for i, t in enumerate(trees) for _ in t.branches], device=device, dtype=torch.long)
        self.lone = len(self.group) == len(trees)
        inverse = torch.empty(size, dtype=torch.long, device=device)
        inverse[self.prompt[prompt_mask]] = at_prompt
        self.branch = None
        self.masks: dict[int | None, Tensor] = {}
        if spans:
            self.branch, branch_mask, at_branch = _block(spans, device)
            inverse[self.branch[branch_mask]] = at_branch + self.prompt.numel()
            self.prompt_length = prompt_mask.sum(1)
        self.inverse = inverse

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
        prompt = [_gather(x, self.prompt) for x in (q, k, v)]
        mask = self._prompt_mask(window) if window is not None else None
        out = attend(prompt[0], prompt[1], prompt[2], mask, scaling, softcap)
        flat = [out.transpose(1, 2).flatten(0, 1)]
        if self.branch is not None:
            own = [_gather(x, self.branch) for x in (q, k, v)]
            shared = prompt[1:] if self.lone else [x.index_select(0, self.group) for x in prompt[1:]]
            keys, values = (torch.cat([s, o], 2) for s, o in zip(shared, own[1:], strict=True))
            out = attend(own[0], keys, values, self._branch_mask(window), scaling, softcap)
            flat.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(flat).index_select(0, self.inverse)[None]

    def _prompt_mask(self, window: int) -> Tensor:
        """Causal within a sliding window, ``[1, 1, P, P]``."""
        step = torch.arange(self.prompt.shape[1], device=self.prompt.device)
        gap = step[:, None] - step[None]
        return ((gap >= 0) & (gap < window))[None, None]

    def _branch_mask(self, window: int | None) -> Tensor:
        """Which of ``P + C`` keys each branch token sees, ``[B, 1, C, P + C]``: its prompt and its own past, by position."""
        assert self.branch is not None
        if window not in self.masks:
            device = self.branch.device
            width, length = self.prompt.shape[1], self.branch.shape[1]
            own = torch.arange(length, device=device)
            before = torch.arange(width, device=device)
            prompt_length = self.prompt_length[self.group][:, None, None]
            trunk = (before[None, None] < prompt_length).expand(-1, length, -1)
            past = (own[:, None] >= own[None])[None].expand(len(trunk), -1, -1)
            if window is not None:
                trunk = trunk & (prompt_length + own[None, :, None] - before[None, None] < window)
                past = past & (own[:, None] - own[None] < window)[None]
            self.masks[window] = torch.cat([trunk, past], 2)[:, None]
        return self.masks[window]


class SlotLayout:
    """A static key-value cache of S slots, each decoding its own sequence one token a step.

    ``cache[layer] = (key, value)``, each ``[S, Hk, L, D]``; ``position`` ``[S]`` is where this step's token stands.
    """

    def __init__(self, slots: int, length: int) -> None:
        self.slots, self.length = slots, length
        self.cache: dict[int, tuple[Tensor, Tensor]] = {}
        self.position = torch.zeros(slots, dtype=torch.long)
        self.rows = torch.arange(slots)

    def load(self, slot: int, sink: dict[int, Any], span: tuple[int, int]) -> None:
        """Put a prefilled prompt (tokens ``span`` of the prefill's packed stream) into a slot."""
        start, end = span
        for layer, (key, value) in sink.items():
            if layer not in self.cache:
                shape = (self.slots, key.shape[1], self.length, key.shape[2])
                self.cache[layer] = (key.new_zeros(shape), value.new_zeros((*shape[:3], value.shape[2])))
            for kept, fresh in zip(self.cache[layer], (key, value), strict=True):
                kept[slot, :, : end - start] = fresh[start:end].transpose(0, 1)

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
        keys, values = self.cache[layer]
        count = len(query)
        rows, position = self.rows[:count], self.position[:count]
        keys[rows, :, position] = key[:, :, 0]
        values[rows, :, position] = value[:, :, 0]
        used = int(position.max()) + 1
        step = torch.arange(used, device=position.device)
        mask = step[None] <= position[:, None]
        if window is not None:
            mask = mask & (position[:, None] - step[None] < window)
        kv_heads = keys.shape[1]
        # The queries of one key head stand as rows of one attention, so that keys are not copied for each of them.
        grouped = query.reshape(count, kv_heads, query.shape[1] // kv_heads, query.shape[3])
        out = attend(grouped, keys[:count, :, :used], values[:count, :, :used], mask[:, None, None], scaling, softcap)
        return out.reshape(count, 1, query.shape[1], values.shape[3])


def _block(spans: Sequence[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Pad spans to a block: token index ``[R, W]`` (0 where padded), mask ``[R, W]``, and flat places of real tokens."""
    starts = torch.tensor([s for s, _ in spans], device=device)
    lengths = torch.tensor([e - s for s, e in spans], device=device)
    step = torch.arange(int(lengths.max()), device=device)
    mask = step[None] < lengths[:, None]
    index = torch.where(mask, starts[:, None] + step[None], 0)
    return index, mask, mask.flatten().nonzero()[:, 0]


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows of ``[N, H, D]`` at ``[R, W]`` as ``[R, H, W, D]``."""
    return x.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)


def _forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: TreeLayout | SlotLayout | None = None,
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
