"""Statistics of a token's distribution from hidden states, a chunk of rows at a time: no ``[M, V]`` tensor is ever kept.

With ``z = logits / temperature``, ``p = softmax(z)``, ``q`` the other model's distribution, target ``y``:

    logp            = log p_y                      d/dz = onehot(y) - p
    entropy         = -sum p log p                 d/dz = -p (log p + entropy)
    sum_p2          = sum p^2                      d/dz = 2 p (p - sum_p2)
    kl_to_other     = sum p (log p - log q)        d/dz = p (log p - log q - kl_to_other)
    kl_from_other   = sum q (log q - log p)        d/dz = p - q

all in nats except ``sum_p2``. Logits are computed again in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

STATS = ("logp", "entropy", "sum_p2", "kl_to_other", "kl_from_other")
CHUNK_BYTES = 64 * 2**20  # of logits in working precision; about 340 rows of a 49k vocabulary in fp32


@dataclass(frozen=True)
class Head:
    """What the output layer really is: ``logits = soft_cap(scale * (hidden @ weight.T + bias))``; weight ``[V, d]``."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None


def token_stats(
    hidden: Tensor,
    head: Head,
    target: Tensor,
    want: set[str] | frozenset[str],
    *,
    temperature: float = 1.0,
    other: tuple[Tensor, Head] | None = None,
) -> dict[str, Tensor]:
    """Return the wanted statistics, each ``[M]``, of hidden states ``[M, d]`` and targets ``[M]``.

    Args:
        hidden: states that predict the targets.
        head: the output layer.
        target: token ids.
        want: names out of `STATS`.
        temperature: logits are divided by it, so that statistics are of the distribution that was sampled.
        other: another model's states ``[M, d']`` and head, for the KL terms; no gradient flows into it.

    Raises:
        ValueError: an unknown statistic, or a KL term without ``other``.
    """
    names = tuple(name for name in STATS if name in want)
    if unknown := set(want) - set(STATS):
        raise ValueError(f"unknown token statistics {sorted(unknown)}; known: {', '.join(STATS)}")
    if other is None and any("other" in name for name in names):
        raise ValueError("a KL statistic needs other=(hidden, head)")
    rows = max(16, CHUNK_BYTES // (head.weight.shape[0] * max(4, hidden.element_size())))
    apply: Any = _TokenStats.apply  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    out: tuple[Tensor, ...] = apply(hidden, head.weight, head.bias, target, head, other, names, temperature, rows)
    return dict(zip(names, out, strict=True))


def logits_of(hidden: Tensor, head: Head, temperature: float = 1.0) -> Tensor:
    """Return ``[M, V]`` logits over temperature, at least fp32, of hidden states ``[M, d]``; for chunks and for sampling."""
    return finished(torch.nn.functional.linear(hidden, head.weight, head.bias), head, temperature)


def finished(raw: Tensor, head: Head, temperature: float = 1.0) -> Tensor:
    """The logits of an output layer's product ``[M, V]`` of states and weights (with bias): in fp32, scaled, soft-capped."""
    raw = raw if raw.dtype == torch.float64 else raw.float()
    if head.scale != 1.0:
        raw = raw * head.scale
    if head.soft_cap is not None:
        raw = head.soft_cap * torch.tanh(raw / head.soft_cap)
    return raw / temperature if temperature != 1.0 else raw


def _chunk(names: tuple[str, ...], logits: Tensor, target: Tensor, other_logp: Tensor | None) -> dict[str, Tensor]:
    """Statistics of one chunk of logits."""
    if names == ("logp",):
        return {"logp": logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(1)}
    logp = logits.log_softmax(1)
    p = logp.exp()
    out = {"logp": logp.gather(1, target[:, None])[:, 0]}
    if "entropy" in names:
        out["entropy"] = -(p * logp).sum(1)
    if "sum_p2" in names:
        out["sum_p2"] = p.square().sum(1)
    if other_logp is not None:
        if "kl_to_other" in names:
            out["kl_to_other"] = (p * (logp - other_logp)).sum(1)
        if "kl_from_other" in names:
            out["kl_from_other"] = (other_logp.exp() * (other_logp - logp)).sum(1)
    return out


def _chunk_gradient(
    grads: dict[str, Tensor],
    stats: dict[str, Tensor],
    logits: Tensor,
    target: Tensor,
    other_logp: Tensor | None,
) -> Tensor:
    """Gradient of ``sum over statistics of grad * statistic`` with respect to the logits of one chunk, ``[m, V]``."""
    logp = logits.log_softmax(1)
    p = logp.exp()
    out = torch.zeros_like(p)
    for name, grad in grads.items():
        g = grad[:, None]
        if name == "logp":
            out.addcmul_(p, -g).scatter_add_(1, target[:, None], g)
        elif name == "entropy":
            out.addcmul_(p * (logp + stats[name][:, None]), -g)
        elif name == "sum_p2":
            out.addcmul_(p * (p - stats[name][:, None]), 2 * g)
        elif name == "kl_to_other" and other_logp is not None:
            out.addcmul_(p * (logp - other_logp - stats[name][:, None]), g)
        elif other_logp is not None:
            out.addcmul_(p - other_logp.exp(), g)
    return out


class _TokenStats(torch.autograd.Function):
    """Forward and backward in chunks of rows; weight and bias receive gradients only if they require them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *static: Any) -> Any:
        head, other, names, temperature, rows = static
        parts: list[dict[str, Tensor]] = []
        for start in range(0, len(hidden), rows):
            piece = slice(start, start + rows)
            other_logp = _other_logp(other, piece, temperature)
            parts.append(_chunk(names, logits_of(hidden[piece], head, temperature), target[piece], other_logp))
        empty = hidden.new_zeros(0, dtype=torch.promote_types(hidden.dtype, torch.float32))
        stats = {name: torch.cat([p[name] for p in parts]) if parts else empty for name in names}
        ctx.set_materialize_grads(False)  # a statistic that no loss reads costs nothing
        ctx.save_for_backward(hidden, weight, bias, target)
        ctx.static, ctx.stats = static, {k: v.detach() for k, v in stats.items()}
        return tuple(stats[name] for name in names)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, bias, target = ctx.saved_tensors
        head, other, names, temperature, rows = ctx.static
        wide = torch.promote_types(hidden.dtype, torch.float32)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        d_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and ctx.needs_input_grad[2] else None
        for start in range(0, len(hidden), rows):
            piece = slice(start, start + rows)
            logits = logits_of(hidden[piece], head, temperature)
            slope = head.scale / temperature
            if head.soft_cap is not None:
                slope = slope * (1 - (logits * (temperature / head.soft_cap)).square())
            named = {n: g[piece] for n, g in zip(names, grads, strict=True) if g is not None}
            stats = {n: ctx.stats[n][piece] for n in names}
            d_raw = _chunk_gradient(named, stats, logits, target[piece], _other_logp(other, piece, temperature)) * slope
            narrow = d_raw.to(hidden.dtype)
            if d_hidden is not None:
                d_hidden[piece] = narrow @ weight
            if d_weight is not None:
                d_weight += narrow.T @ hidden[piece]
            if d_bias is not None:
                d_bias += d_raw.sum(0)
        as_weight = None if d_weight is None else d_weight.to(weight.dtype)
        as_bias = None if d_bias is None or bias is None else d_bias.to(bias.dtype)
        return d_hidden, as_weight, as_bias, None, None, None, None, None, None


def _other_logp(other: tuple[Tensor, Head] | None, piece: slice, temperature: float) -> Tensor | None:
    """Log-probabilities of the other model over the vocabulary for one chunk."""
    if other is None:
        return None
    return logits_of(other[0][piece], other[1], temperature).log_softmax(1)
