"""Counting with bounded memory: distributions of lengths, repeated and contradicted hashes, compared lengths."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import NamedTuple

import numpy as np

from posttrain.types import Example

FEW = 32
"""Answers to one prompt that are all compared with each other; of more, only neighbours in order."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """A distribution of lengths: ``bars`` are (from, to, how many), both ends included, doubling in width."""

    count: int
    mean: float
    half: int
    p95: int
    p99: int
    longest: int
    bars: tuple[tuple[int, int, int], ...]


def lengths(counts: Counter[int]) -> Lengths | None:
    """Return the distribution of counted lengths; None without any."""
    total = counts.total()
    if not total:
        return None
    values = sorted(counts)
    ends = np.cumsum([counts[v] for v in values])
    half, p95, p99 = (values[int(np.searchsorted(ends, math.ceil(q * total)))] for q in (0.5, 0.95, 0.99))
    buckets = Counter[int]()
    for value in values:
        buckets[value.bit_length()] += counts[value]
    bars = tuple((2**b // 2, 2**b - 1, buckets[b]) for b in range(min(buckets), max(buckets) + 1))
    mean = sum(v * n for v, n in counts.items()) / total
    return Lengths(count=total, mean=mean, half=half, p95=p95, p99=p99, longest=values[-1], bars=bars)


# ---------------------------------------------------------------------------- hashes


class Found(NamedTuple):
    """How often something was found; the first and second example (from 0) it concerns, -1 if none."""

    count: int
    first: int = -1
    second: int = -1


class Log:
    """64-bit hashes with the number of the example each came from, 12 bytes an entry."""

    def __init__(self) -> None:
        self._keys, self._examples = array("Q"), array("I")

    def add(self, key: int, example: int) -> None:
        """Note that an example (from 0) has this key."""
        self._keys.append(key)
        self._examples.append(example)

    def distinct(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the distinct keys in order, the first example of each, and how many entries each has."""
        keys, first, counts = np.unique(self._array(), return_index=True, return_counts=True)
        return keys, np.frombuffer(self._examples, dtype=np.uint32)[first] if len(first) else first, counts

    def repeats(self) -> Found:
        """Return how many entries repeat an earlier one's key, with the first that does and what it repeats."""
        keys = self._array()
        order = np.argsort(keys, kind="stable")
        again = order[1:][keys[order][1:] == keys[order][:-1]]
        if not len(again):
            return Found(0)
        second = int(again.min())
        return Found(len(again), self._examples[int(np.argmax(keys == keys[second]))], self._examples[second])

    def both_ways(self) -> Found:
        """Return how many keys, but for their last bit, were entered with it 0 and with it 1, and where first."""
        keys, first, _ = self.distinct()
        at = np.flatnonzero(keys[1:] >> 1 == keys[:-1] >> 1)
        if not len(at):
            return Found(0)
        i = int(at[np.argmin(np.maximum(first[at], first[at + 1]))])
        one, two = sorted((int(first[i]), int(first[i + 1])))
        return Found(len(at), one, two)

    def _array(self) -> np.ndarray:
        return np.frombuffer(self._keys, dtype=np.uint64) if self._keys else np.zeros(0, dtype=np.uint64)


# ---------------------------------------------------------------------------- pairs


class Pair(NamedTuple):
    """Two responses of an example, ``better`` the preferred one unless they are ``tied``, along an axis."""

    better: int
    worse: int
    axis: str
    tied: bool


def compared_pairs(example: Example) -> Iterator[Pair]:
    """Yield the pairs of responses that an example compares.

    Comparisons if it has any, those of one pair along one axis summed; else by rank if all responses are ranked;
    else by score if all are scored. Of more than 32 answers, only neighbours in order, so that a row's cost is
    linear.
    """
    votes: dict[tuple[int, int, str], float] = {}
    for p in example.preferences:
        key = (min(p.a, p.b), max(p.a, p.b), p.axis)
        votes[key] = votes.get(key, 0.0) + (p.better - 0.5) * (1 if p.a < p.b else -1)
    for (low, high, axis), vote in votes.items():
        yield Pair(low, high, axis, vote == 0) if vote >= 0 else Pair(high, low, axis, False)
    values = [] if votes else _values(example)
    order = sorted(range(len(values)), key=lambda i: -values[i])
    for a, b in combinations(order, 2) if len(order) <= FEW else pairwise(order):
        yield Pair(a, b, "", values[a] == values[b])


def _values(example: Example) -> list[float]:
    """A number for each response, higher for better; empty if not all have one."""
    ranks = [-r.rank for r in example.responses if r.rank is not None]
    scores = [r.score for r in example.responses if r.score is not None]
    return next((list(v) for v in (ranks, scores) if len(v) == len(example.responses)), [])


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Length of better against worse answers, over pairs of answers to one prompt; words split at white space.

    ``pairs`` counts those of which one is better; ``longer_better`` is the share of them whose better answer is the longer,
    a tie in length counting half; ``tau`` is Kendall's tau-b of better and longer, None where lengths never differ:

    tau_b = (C - D) / sqrt(pairs that are not tied x pairs of different lengths), with C the pairs whose better answer is
    the longer, D those whose better is the shorter (Kendall 1945, "The treatment of ties in ranking problems").
    """

    pairs: int
    longer_better: float
    tau: float | None
    words_better: float
    words_worse: float


class PairLengths:
    """Sums that `Compared` is made of."""

    def __init__(self) -> None:
        self._pairs = self._longer = self._shorter = self._sized = self._better = self._worse = 0

    def add(self, words: Sequence[int], pairs: Sequence[Pair]) -> None:
        """Count the pairs of one example; ``words`` holds the length of each of its responses."""
        for pair in pairs:
            better, worse = words[pair.better], words[pair.worse]
            self._sized += better != worse
            if not pair.tied:
                self._pairs += 1
                self._longer += better > worse
                self._shorter += better < worse
                self._better += better
                self._worse += worse

    def result(self) -> Compared | None:
        """Return the comparison; None without pairs in which one is better."""
        n, equal = self._pairs, self._pairs - self._longer - self._shorter
        if not n:
            return None
        return Compared(
            pairs=n,
            longer_better=(self._longer + equal / 2) / n,
            tau=(self._longer - self._shorter) / math.sqrt(n * self._sized) if self._sized else None,
            words_better=self._better / n,
            words_worse=self._worse / n,
        )
