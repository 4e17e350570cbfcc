"""Masked sums.

Legend of shapes for the whole library: N packed tokens, M targets, B branches, T time, V vocabulary, d width, K responses
of a prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of ``values`` where ``mask`` is true, 0 where nothing is; any shape, same for both. Values under a false mask may be NaN."""
    return torch.where(mask, values, 0.0).sum()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """``sum(values * mask) / sum(mask)``, and 0 (not NaN) when the mask is empty."""
    return masked_sum(values, mask) / mask.sum().clamp(min=1)


def whiten(values: Tensor, mask: Tensor, *, shift: bool = True, eps: float = 1e-8) -> Tensor:
    """Scale masked values to variance 1: ``(x - mean) / sqrt(var + eps)``, plus the mean again if not ``shift``.

    Population variance (ddof 0) over every masked entry; entries under a false mask become 0.
    Source: lm-human-preferences ``whiten``.
    """
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    white = (values - mean) * torch.rsqrt(variance + eps)
    return torch.where(mask, white if shift else white + mean, 0.0)


def segment_sum(values: Tensor, segment: Tensor, size: int) -> Tensor:
    """Sum ``values`` ``[M]`` by ``segment`` ``[M]`` (an index below ``size``) into ``[size]``."""
    return torch.zeros(size, dtype=values.dtype, device=values.device).index_add(0, segment, values)


def to_padded(values: Tensor, segment: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Lay ``[M]`` values, grouped by ascending ``segment``, out as rows: ``([B, T], mask [B, T])``, right-padded with 0."""
    lengths = torch.bincount(segment, minlength=size)
    width = int(lengths.max()) if len(lengths) else 0
    mask = torch.arange(width, device=values.device)[None] < lengths[:, None]
    padded = torch.zeros(size, width, dtype=values.dtype, device=values.device)
    padded[mask] = values
    return padded, mask
