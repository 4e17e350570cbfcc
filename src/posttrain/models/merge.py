"""Merging models tensor by tensor: averages, arcs between task vectors, TIES and DARE, as functions of plain tensors.

A method sees one tensor of every model at a time (`Piece`), in float64; what a model learnt since the base that all started
from, its task vector, is ``delta = part - base``. Models are mappings from names to tensors: state dicts, or files that are read
as they are asked for (`posttrain.models.stored`), so that no more than one tensor of each is ever in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.errors import ConfigError, ModelError
from posttrain.registry import Registry
from posttrain.types import stable_hash

State = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One tensor of every model, all of one shape and in float64.

    Attributes:
        name: the tensor's.
        parts: one a model.
        weights: one a model, of sum 1.
        base: what all models started from; None for methods that don't need it.
        least: of each model the smallest ``|delta|`` that stays, for methods that trim.
    """

    name: str
    parts: tuple[Tensor, ...]
    weights: tuple[float, ...]
    base: Tensor | None = None
    least: tuple[float, ...] = ()

    def deltas(self) -> tuple[Tensor, list[Tensor]]:
        """The base, and each model's task vector."""
        if self.base is None:
            raise ConfigError(f"'{self.name}' has no base to measure what was learnt from; give one")
        return self.base, [part - self.base for part in self.parts]


merges = Registry("merge method")
"""Names to functions ``(Piece) -> Tensor``; facts: ``needs`` ("base"), ``weights`` (False: takes none), ``trims``, ``paper``."""


@merges.register(
    "average", paper="Wortsman et al. 2022, arXiv 2203.05482; of reward models Ramé et al. 2024, arXiv 2401.12187"
)
def average(piece: Piece) -> Tensor:
    """Weighted mean, ``sum_i w_i theta_i``.

    Source: model soups, Wortsman et al. 2022; of reward models WARM, Ramé et al. 2024, arXiv 2401.12187.
    """
    return sum((w * part for w, part in zip(piece.weights, piece.parts, strict=True)), torch.zeros(()))


@merges.register("ema", weights=False, paper="Ouyang et al. 2022, arXiv 2203.02155; Ramé et al. 2024, arXiv 2406.16768")
def ema(piece: Piece, *, rate: float = 0.01) -> Tensor:
    """Moving average over checkpoints in their order, ``m <- (1 - rate) m + rate theta``, from the first.

    Source: WARP's anchor, Ramé et al. 2024, arXiv 2406.16768 (rate 0.01); InstructGPT's policies, 0.008 an iteration.
    """
    require("rate", rate, 0 <= rate <= 1, "0 to 1")
    mean = piece.parts[0]
    for part in piece.parts[1:]:
        mean = mean + rate * (part - mean)
    return mean


@merges.register("slerp", needs=("base",), paper="Ramé et al. 2024, arXiv 2406.16768")
def slerp(piece: Piece) -> Tensor:
    """Along the arc between task vectors: ``base + sin((1 - l) A) / sin A d1 + sin(l A) / sin A d2``, A the angle of d1 and d2.

    ``l`` is the second model's weight. More models are taken in one after the other, the m-th by its share of the weights so
    far (1/m where all are equal), so that their order matters.

    Source: WARP, Ramé et al. 2024, arXiv 2406.16768, second step, applied to each tensor.
    """
    base, deltas = piece.deltas()
    merged, total = deltas[0], piece.weights[0]
    for delta, weight in zip(deltas[1:], piece.weights[1:], strict=True):
        total += weight
        merged = arc(merged, delta, weight / total if total else 0.0)
    return base + merged


@merges.register("warp", needs=("base",), paper="Ramé et al. 2024, arXiv 2406.16768")
def warp(piece: Piece, *, eta: float = 0.3) -> Tensor:
    """Back towards the start: ``(1 - eta) base + eta slerp``, WARP's second and third step in one.

    Its first, a moving average of the policy as the anchor of the KL penalty, happens while each part is trained.

    Source: WARP, Ramé et al. 2024, arXiv 2406.16768.
    """
    require("eta", eta, math.isfinite(eta), "a finite number")
    base, _ = piece.deltas()
    return base + eta * (slerp(piece) - base)


@merges.register("ties", needs=("base",), trims=True, paper="Yadav et al. 2023, arXiv 2306.01708")
def ties(piece: Piece, *, density: float = 0.2, scale: float = 1.0) -> Tensor:
    """Trim each task vector, elect a sign, and average those of that sign: ``base + scale mean_{i: sgn d_i = s} d_i``.

    Of each model the share ``density`` of entries with the largest ``|delta|`` stays, over the whole model; ``s`` is the sign
    of their weighted sum. Where it is 0, or nothing stayed, the base stays.

    Source: TIES-Merging, Yadav et al. 2023, arXiv 2306.01708, algorithm 1 (density 0.2, scale 1).
    """
    require("density", density, 0 < density <= 1, "more than 0, at most 1")
    base, deltas = piece.deltas()
    trimmed = [trim(delta, least) for delta, least in zip(deltas, piece.least, strict=True)]
    sign = sum((w * d for w, d in zip(piece.weights, trimmed, strict=True)), torch.zeros(())).sign()
    agree = [(d.sign() == sign) & (d != 0) for d in trimmed]
    share = sum((w * a for w, a in zip(piece.weights, agree, strict=True)), torch.zeros(()))
    total = sum((w * d * a for w, d, a in zip(piece.weights, trimmed, agree, strict=True)), torch.zeros(()))
    return base + scale * torch.where(share > 0, total / share, 0.0)


@merges.register("dare", needs=("base",), paper="Yu et al. 2023, arXiv 2311.03099")
def dare(piece: Piece, *, drop: float = 0.9, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Drop entries of each task vector by chance, divide the others by what stays: ``base + scale sum_i w_i m_i d_i / (1 - drop)``.

    ``m_i`` are coins keyed by ``seed``, the model's place and the tensor's name, so that a merge can be made again.

    Source: DARE, Yu et al. 2023, arXiv 2311.03099, with the average of what it leaves.
    """
    require("drop", drop, 0 <= drop < 1, "0 or more, less than 1")
    base, deltas = piece.deltas()
    merged = torch.zeros_like(base)
    for place, (weight, delta) in enumerate(zip(piece.weights, deltas, strict=True)):
        kept = coins(delta.shape, 1 - drop, ["dare", int(seed), place, piece.name])
        merged += weight * torch.where(kept, delta / (1 - drop), 0.0)
    return base + scale * merged


# ---------------------------------------------------------------------------- parts of methods


def arc(one: Tensor, two: Tensor, share: float) -> Tensor:
    """The point at ``share`` of the way on the arc from ``one`` to ``two``; on the line where they have no plane (sin A < 1e-6)."""
    length = one.norm() * two.norm()
    cosine = ((one.flatten() @ two.flatten()) / length).clamp(-1, 1) if length > 0 else torch.ones(())
    angle = float(torch.acos(cosine))
    if math.sin(angle) < 1e-6:
        return one + share * (two - one)
    return (math.sin((1 - share) * angle) * one + math.sin(share * angle) * two) / math.sin(angle)


def trim(delta: Tensor, least: float) -> Tensor:
    """Entries of at least ``least`` in size, the others 0."""
    return torch.where(delta.abs().float() >= least, delta, 0.0)


def coins(shape: Sequence[int], chance: float, key: Sequence[object]) -> Tensor:
    """Booleans that are true with a chance, the same for the same key on every machine."""
    generator = torch.Generator().manual_seed(int(stable_hash(list(key)), 16) % 2**63)
    return torch.rand(tuple(shape), generator=generator) < chance


def kth_largest(blocks: Callable[[], Iterable[Tensor]], k: int) -> float:
    """The k-th largest of many numbers of at least 0 in fp32, exactly, reading them twice and keeping none.

    The bits of such floats, read as integers, have their order: the first reading counts by upper halves, the second by lower
    halves within the one that holds the answer.
    """

    def counts(upper: int | None) -> Tensor:
        found = torch.zeros(65536, dtype=torch.long)
        for block in blocks():
            bits = block.float().flatten().view(torch.int32)
            halves = bits >> 16 if upper is None else bits[(bits >> 16) == upper] & 0xFFFF
            found += torch.bincount(halves, minlength=65536)
        return found

    def place(count: Tensor, rank: int) -> int:
        return 65535 - int((count.flip(0).cumsum(0) >= rank).nonzero()[0])

    many = counts(None)
    upper = place(many, k)
    lower = place(counts(upper), k - int(many[upper + 1 :].sum()))
    return float(torch.tensor((upper << 16) | lower, dtype=torch.int32).view(torch.float32))


# ---------------------------------------------------------------------------- whole models


def merge_states(
    method: str | Callable[..., Tensor],
    parts: Sequence[State],
    *,
    base: State | None = None,
    weights: Sequence[float] | None = None,
    **options: float,
) -> dict[str, Tensor]:
    """Merge state dicts in memory; arguments and errors are those of `merged`."""
    return dict(merged(method, parts, base=base, weights=weights, options=options))


def merged(
    method: str | Callable[..., Tensor],
    parts: Sequence[State],
    *,
    base: State | None = None,
    weights: Sequence[float] | None = None,
    options: Mapping[str, float] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the merged tensors in the order of the first model, each in the widest dtype that the models have it in.

    Args:
        method: a name in `merges`, or a function of a `Piece`.
        parts: the models.
        base: what all of them started from, for methods that need it.
        weights: one a model, of sum 1; None: equal ones.
        options: keyword arguments of the method.

    Raises:
        ConfigError: a method, option, weight or base that can't be.
        ModelError: a tensor that only one model has, or has in another shape, or that is not finite.
    """
    function = merges.bound(method, options or {})
    facts = merges.facts(method)
    shares = checked_weights(method, len(parts), weights, facts.get("weights", True))
    if "base" in facts.get("needs", ()) and base is None:
        raise ConfigError(f"'{method}' merges what models learnt since a base; name it (--base MODEL)")
    require_names(parts, base)
    least: tuple[float, ...] = ()
    if facts.get("trims"):
        assert base is not None
        density = function.keywords.get("density", 0.2)
        require("density", density, 0 < density <= 1, "more than 0, at most 1")
        least = tuple(least_kept(part, base, density, place) for place, part in enumerate(parts, 1))
    for name in parts[0]:
        tensors = [part[name] for part in parts]
        start = None if base is None else base[name]
        require_alike(name, tensors, start)
        if not tensors[0].is_floating_point():
            yield name, tensors[0]
            continue
        dtype = tensors[0].dtype
        for tensor in tensors[1:]:
            dtype = torch.promote_types(dtype, tensor.dtype)
        wide = None if start is None else start.double()
        piece = Piece(name=name, parts=tuple(t.double() for t in tensors), weights=shares, base=wide, least=least)
        yield name, function(piece).to(dtype)


def least_kept(part: State, base: State, density: float, place: int) -> float:
    """The smallest ``|delta|`` of the share ``density`` of a model's entries that moved furthest."""

    def sizes() -> Iterator[Tensor]:
        for name in part:
            tensor, start = part[name], base[name]
            require_alike(name, [tensor], start, place)
            if tensor.is_floating_point():
                yield (tensor.double() - start.double()).abs()

    total = sum(size.numel() for size in sizes())
    return kth_largest(sizes, max(1, round(density * total)))


def checked_weights(
    method: object, count: int, weights: Sequence[float] | None, taken: bool = True
) -> tuple[float, ...]:
    """The weights, equal ones if none are given.

    Raises:
        ConfigError: none, too few, too many, below 0, or of a sum other than 1.
    """
    if count < 1:
        raise ConfigError("nothing to merge; give at least one model")
    if weights is None:
        return (1.0 / count,) * count
    if not taken:
        raise ConfigError(f"'{method}' takes no weights: what counts is the order and rate")
    if len(weights) != count:
        raise ConfigError(f"got {len(weights)} weight{'s' * (len(weights) != 1)} for {count} models; give one a model")
    total = math.fsum(weights)
    if not all(math.isfinite(w) and w >= 0 for w in weights):
        raise ConfigError(f"got the weights {listed(weights)}; expected numbers of at least 0")
    if abs(total - 1) > 1e-6:
        better = f", such as {listed([w / total for w in weights])}" if total > 0 else ""
        raise ConfigError(f"weights add to {total:g}; expected 1{better}")
    return tuple(weights)


def listed(numbers: Iterable[float]) -> str:
    """Numbers as one types them."""
    return ",".join(f"{number:g}" for number in numbers)


def require(name: str, value: float, fine: bool, expected: str) -> None:
    """Raise `ConfigError` for an option outside its range."""
    if not fine:
        raise ConfigError(f"got {name}={value:g}; expected {expected}")


def require_names(parts: Sequence[State], base: State | None) -> None:
    """Raise `ModelError` that names a tensor which is not in every model."""
    first = set(parts[0])
    others = [(f"model {place}", part) for place, part in enumerate(parts[1:], 2)]
    for label, other in [*others, *([] if base is None else [("the base", base)])]:
        if missing := sorted(first - set(other)):
            raise ModelError(f"'{missing[0]}' is in model 1 and not in {label} ({len(missing)} such tensors)")
        if extra := sorted(set(other) - first):
            raise ModelError(f"'{extra[0]}' is in {label} and not in model 1 ({len(extra)} such tensors)")


def require_alike(name: str, tensors: Sequence[Tensor], base: Tensor | None, place: int = 1) -> None:
    """Raise `ModelError` for shapes that differ, counters that differ, and numbers that are not finite."""
    first = tensors[0]
    others = [(f"models {place} and {k}", t) for k, t in enumerate(tensors[1:], place + 1)]
    for label, other in [*others, *([] if base is None else [(f"model {place} and the base", base)])]:
        if other.shape != first.shape:
            raise ModelError(f"'{name}': shapes {tuple(first.shape)} and {tuple(other.shape)} ({label}) differ")
        if not first.is_floating_point() and not torch.equal(first, other):
            kind = str(first.dtype).removeprefix("torch.")
            raise ModelError(f"'{name}': of {kind}, which is not averaged, and differs between {label}")
    for k, tensor in enumerate(tensors, place):
        if not tensor.isfinite().all():
            raise ModelError(f"'{name}' of model {k} holds numbers that are not finite")
