"""Pairs in which the longer answer is better as often as the shorter one, whatever the difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from posttrain.data.views import rankings
from posttrain.errors import ConfigError, DataError
from posttrain.types import Example, stable_hash


@dataclass(frozen=True, kw_only=True)
class Balance:
    """What balancing did: pairs found, pairs kept, and the share of each in which the longer answer is the better one."""

    pairs: int
    kept: int
    longer_before: float
    longer_after: float
    equal: int

    def __str__(self) -> str:
        shares = f"the longer answer is better in {self.longer_before:.0%}, after in {self.longer_after:.0%}"
        return f"kept {self.kept} of {self.pairs} pairs; {shares}; {self.equal} of equal length"


def ranked_pairs(examples: Sequence[Example]) -> list[Example]:
    """Return an example for each pair of differently ranked responses, the better one first.

    Raises:
        DataError: as `posttrain.data.views.rankings`.
    """
    found: list[Example] = []
    for example in rankings(examples):
        for a, b in combinations(example.responses, 2):
            if a.rank != b.rank:
                better, worse = (a, b) if (a.rank or 0) < (b.rank or 0) else (b, a)
                found.append(
                    replace(example, responses=(replace(better, rank=0), replace(worse, rank=1)), preferences=())
                )
    return found


def length_gap(pair: Example) -> int:
    """Characters of the better answer less those of the worse one."""
    return len(pair.responses[0].text) - len(pair.responses[1].text)


def balance_lengths(examples: Sequence[Example], *, buckets: int = 8, seed: int = 0) -> tuple[list[Example], Balance]:
    """Drop pairs so that in each bucket of length difference the longer answer wins as often as it loses.

    Buckets hold about as many pairs each, by ``|characters better - characters worse|``; from the commoner outcome of a
    bucket pairs are dropped, chosen by seed and content. Pairs of equal length stay. Rankings become their pairs.

    Raises:
        DataError: as `posttrain.data.views.rankings`; nothing left, as one outcome has no pairs.
        ConfigError: fewer than one bucket.

    Source: Hou et al. 2024, ChatGLM-RLHF, arXiv 2404.00934, section 3.2.
    """
    if buckets < 1:
        raise ConfigError(f"got {buckets} buckets; expected at least 1")
    pairs = ranked_pairs(examples)
    gaps = np.array([length_gap(pair) for pair in pairs])
    unequal = np.flatnonzero(gaps)
    kept = set(np.flatnonzero(gaps == 0).tolist())
    order = unequal[np.argsort(np.abs(gaps[unequal]), kind="stable")]
    for bucket in np.array_split(order, min(buckets, max(1, len(order)))):
        sides = [[i for i in bucket.tolist() if (gaps[i] > 0) == longer] for longer in (True, False)]
        least = min(map(len, sides))
        for side in sides:
            kept |= set(sorted(side, key=lambda i: _draw(pairs[i], i, seed))[:least])
    if not kept:
        raise DataError("no pair is left: in every bucket one side always wins; give pairs of both outcomes")
    places = sorted(kept)
    share = lambda at: float((np.sign(gaps[at]) / 2 + 0.5).mean()) if len(at) else 0.5  # noqa: E731
    before, after = share(np.arange(len(pairs))), share(np.array(places))
    return [pairs[i] for i in places], Balance(
        pairs=len(pairs), kept=len(places), longer_before=before, longer_after=after, equal=int((gaps == 0).sum())
    )


def _draw(pair: Example, place: int, seed: int) -> str:
    """A random order that depends on the seed and on what is ordered."""
    return stable_hash([seed, pair.prompt_key, [r.text for r in pair.responses], place])
