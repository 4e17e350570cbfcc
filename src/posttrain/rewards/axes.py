"""Help and harm, judged apart: rankings out of comparisons along one axis (`posttrain.rewards.builders` has them by name)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from posttrain.types import Example


def helpfulness(example: Example, seed: int) -> list[Example]:
    """The data's comparisons along the axis "helpfulness", a pair each; without any, its ranking as it is."""
    return along(example, "helpfulness", [r.rank for r in example.responses])


def harmlessness(example: Example, seed: int) -> list[Example]:
    """The data's comparisons along the axis "harmlessness", a pair each, every answer safe (1) or not (0), for a cost model.

    Where the data does not say what is safe, it is what is no failure called "unsafe"; without comparisons the unsafe answers
    of its ranking follow the others.
    """
    safe = [r.attributes.get("safe", float(r.failure != "unsafe")) for r in example.responses]
    responses = zip(example.responses, safe, strict=True)
    told = tuple(replace(r, attributes={**r.attributes, "safe": s}) for r, s in responses)
    keys = [(-s, r.rank) for r, s in zip(told, safe, strict=True) if r.rank is not None]
    ranks = [sorted(set(keys)).index(k) for k in keys] if len(keys) == len(told) else []
    return along(replace(example, responses=told), "harmlessness", ranks)


def along(example: Example, axis: str, ranks: Sequence[int | None]) -> list[Example]:
    """A pair for each comparison along an axis that is no tie; where there are none along any, the responses with ``ranks``."""
    if example.preferences:
        told = [p for p in example.preferences if p.axis == axis and p.better != 0.5]
        pairs = [(p.a, p.b) if p.better > 0.5 else (p.b, p.a) for p in told]
        return [_ranked(example, (a, b), (0, 1)) for a, b in pairs]
    known = [k for k in ranks if k is not None]
    if len(known) < len(example.responses) or len(set(known)) < 2:
        return []
    return [_ranked(example, range(len(known)), known)]


def _ranked(example: Example, places: Sequence[int], ranks: Sequence[int]) -> Example:
    """The responses at some places with ranks, and no comparisons."""
    chosen = tuple(replace(example.responses[i], rank=k) for i, k in zip(places, ranks, strict=True))
    return replace(example, responses=chosen, preferences=())
