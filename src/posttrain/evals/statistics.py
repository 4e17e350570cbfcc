"""Intervals by bootstrap over clusters, paired differences and tests, rank correlations; deterministic by seed."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from posttrain.errors import ConfigError

_INDEX_BUDGET = 2_000_000  # indices drawn at once: 16 MB, whatever the number of clusters


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its confidence interval.

    ``n`` counts the independent units (clusters), not the values: eight samples of one prompt are one unit.
    With a single cluster nothing is known of the spread and the interval is (-inf, inf).
    """

    mean: float
    low: float
    high: float
    n: int
    level: float = 0.95


def cluster_bootstrap(
    values: ArrayLike,
    clusters: Sequence[Hashable] | NDArray[Any],
    *,
    level: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
) -> Interval:
    """Return the mean of all values with its percentile interval, resampling whole clusters with replacement.

    mean = sum of values / number of values; a resample draws C of the C clusters and takes the same ratio,
    so a cluster with more values weighs more. The interval runs from the (1-level)/2 to the (1+level)/2
    quantile. With few clusters percentile intervals are somewhat short: at 10 clusters of normal values a
    95 % interval covers about 90 %, at 40 about 94 %.

    Args:
        values: ``[N]`` finite numbers.
        clusters: ``[N]`` what each value belongs to (a prompt, a ranking).
        level: confidence, between 0 and 1.
        resamples: how many resamples.
        seed: equal seeds give equal intervals.

    Raises:
        ConfigError: no values, a value that is not finite, lengths that differ, a level outside (0, 1).

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13; Field and Welsh
        (2007) for clusters.
    """
    flat = _finite(values, "values")
    if not 0 < level < 1:
        raise ConfigError(f"got level {level}; expected a number between 0 and 1, such as 0.95")
    if resamples < 1:
        raise ConfigError(f"got {resamples} resamples; expected at least 1, such as 4000")
    index, count = _cluster_index(clusters, flat.size)
    mean = float(flat.mean())
    if count < 2:
        return Interval(mean, -math.inf, math.inf, count, level)
    sums = np.bincount(index, weights=flat, minlength=count).astype(np.float64, copy=False)
    sizes = np.bincount(index, minlength=count).astype(np.float64)
    means = _resampled_means(sums, sizes, resamples, np.random.default_rng(seed))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high), count, level)


def paired_bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    clusters: Sequence[Hashable] | NDArray[Any],
    *,
    level: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
) -> Interval:
    """Return mean(a - b) with its interval by cluster; ``a[i]`` and ``b[i]`` are measured on the same thing.

    Pairing removes what prompts share (some are easy for every policy), so the interval of a difference is
    usually far shorter than the two intervals suggest.

    Raises:
        ConfigError: as `cluster_bootstrap`, and when ``a`` and ``b`` differ in length.
    """
    left, right = _finite(a, "a"), _finite(b, "b")
    if left.size != right.size:
        raise ConfigError(f"got {left.size} values for a and {right.size} for b; expected one of each for every pair")
    return cluster_bootstrap(left - right, clusters, level=level, resamples=resamples, seed=seed)


def excludes_zero(interval: Interval) -> bool:
    """Say whether the interval is evidence of a difference: on one side of 0, and from clusters enough.

    Enough is 2 * 2**-n <= 1 - level, so 6 clusters at 95 %: with fewer, differences that all share a sign
    by pure chance are commoner than the level allows, and the bootstrap, which sees no other sign, would
    call them certain.
    """
    enough = 2.0 ** (1 - interval.n) <= 1 - interval.level + 1e-12
    return enough and (interval.low > 0 or interval.high < 0)


def paired_test(
    a: ArrayLike, b: ArrayLike, *, level: float = 0.95, resamples: int = 4000, seed: int = 0
) -> tuple[Interval, float]:
    """Return mean(a - b) with an interval that holds for few pairs too, and the p-value of no difference.

    With m the mean and q the quantiles of the paired bootstrap's means, the interval runs from m + w (q_low - m) to
    m + w (q_high - m). The factor w = sqrt(n / (n-1)) t / z widens it as Student's t widens a normal interval: 2.7 for
    n = 3, 1.4 for n = 6, 1.03 for n = 50. It makes up for what n differences don't tell of their own spread, on the
    assumption that they are roughly normal. p is the smallest 1 - level whose interval leaves 0 out, at least
    1 / resamples. A single pair, or 2 to 5 whose differences are all the same number, tell nothing of the spread: the
    interval is then (-inf, inf) and p 1, unless that number is 0.

    Args:
        a: ``[N]`` one side of each pair.
        b: ``[N]`` the other.
        level: confidence, between 0 and 1.
        resamples: how many resamples.
        seed: equal seeds give equal results.

    Raises:
        ConfigError: lengths that differ, no pairs, a value that is not finite, a level outside (0, 1).

    Source: Hesterberg, What Teachers Should Know About the Bootstrap, The American Statistician 69 (2015), section 4.3,
        who adjusts the quantiles by the same factor.
    """
    percentile = paired_bootstrap(a, b, range(np.size(a)), level=level, resamples=resamples, seed=seed)
    differences = _finite(a, "a") - _finite(b, "b")
    count, mean = differences.size, percentile.mean
    if not np.ptp(differences) and (count < 6 or mean == 0):
        known = mean == 0 and count > 1
        return (
            Interval(mean, mean, mean, count, level) if known else Interval(mean, -math.inf, math.inf, count, level)
        ), 1.0
    means = np.sort(_resampled_means(differences, np.ones(count), resamples, np.random.default_rng(seed))) - mean

    def bounds(alpha: float) -> tuple[float, float]:
        low, high = np.quantile(means, [alpha / 2, 1 - alpha / 2]) * _widening(count, 1 - alpha)
        return mean + float(low), mean + float(high)

    low, high = bounds(1 - level)
    found = Interval(mean, low, high, count, level)
    inside, outside = 1 / resamples, 1.0  # alphas: at 1 the interval is a point, away from 0
    if _outside(bounds(inside)):
        return found, inside
    for _ in range(30):
        middle = math.sqrt(inside * outside)
        inside, outside = (inside, middle) if _outside(bounds(middle)) else (middle, outside)
    return found, outside


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Return p-values ``[M]`` corrected for their number: below alpha means shown while all M err with chance alpha at most.

    The i-th smallest becomes max over j <= i of min(1, (M - j + 1) p_j).

    Raises:
        ConfigError: no values, or one outside [0, 1].

    Source: Holm, A Simple Sequentially Rejective Multiple Test Procedure, Scandinavian Journal of Statistics 6 (1979).
    """
    values = _finite(p_values, "p_values")
    if values.min() < 0 or values.max() > 1:
        raise ConfigError(f"got p-values from {values.min()} to {values.max()}; expected numbers between 0 and 1")
    order = np.argsort(values, kind="stable")
    steps = np.minimum(1.0, values[order] * np.arange(values.size, 0, -1))
    corrected = np.empty_like(values)
    corrected[order] = np.maximum.accumulate(steps)
    return corrected


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Return Spearman's rho, the correlation of ranks, ties at their mean rank; nan if one side is constant.

    Raises:
        ConfigError: fewer than two values, lengths that differ, a value that is not finite.
    """
    x, y = _two(a, b)
    x, y = rank_values(x), rank_values(y)
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if scale > 0 else math.nan


def kendall(a: ArrayLike, b: ArrayLike) -> float:
    """Return Kendall's tau-b; nan if one side is constant.

    tau-b = (concordant - discordant) / sqrt(pairs untied in a * pairs untied in b).

    Raises:
        ConfigError: fewer than two values, lengths that differ, a value that is not finite.
    """
    x, y = _two(a, b)
    upper = np.triu_indices(x.size, k=1)
    dx, dy = np.sign(x[:, None] - x[None, :])[upper], np.sign(y[:, None] - y[None, :])[upper]
    scale = math.sqrt(float(np.abs(dx).sum()) * float(np.abs(dy).sum()))
    return float(dx @ dy) / scale if scale > 0 else math.nan


def _outside(bounds: tuple[float, float]) -> bool:
    return bounds[0] > 0 or bounds[1] < 0


def _widening(count: int, level: float) -> float:
    """Return sqrt(n / (n-1)) t / z: how much wider an interval of n values is than their bootstrap's."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    return math.sqrt(count / (count - 1)) * student_quantile(level, min(count - 1, 1000)) / z if z > 0 else 1.0


def student_quantile(level: float, freedom: int) -> float:
    """Return the t with P(|T| < t) = level for Student's T of integer degrees of freedom, by bisection.

    Source: the finite series for P(|T| < t) in Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3-4.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2  # t = sqrt(freedom) tan(angle)
        low, high = (angle, high) if _student_within(angle, freedom) < level else (low, angle)
    return math.sqrt(freedom) * math.tan(low)


def _student_within(angle: float, freedom: int) -> float:
    """Return P(|T| < sqrt(freedom) tan(angle))."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def _resampled_means(
    sums: NDArray[np.float64], sizes: NDArray[np.float64], resamples: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    """Draw ``[resamples]`` means, in blocks that bound memory."""
    count = sums.size
    block = max(1, _INDEX_BUDGET // count)
    means = np.empty(resamples)
    for start in range(0, resamples, block):
        stop = min(start + block, resamples)
        drawn = generator.integers(0, count, size=(stop - start, count))
        means[start:stop] = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    return means


def _cluster_index(clusters: Sequence[Hashable] | NDArray[Any], size: int) -> tuple[NDArray[np.int64], int]:
    """Number the clusters from 0 in order of first appearance: ``[N]`` numbers and how many there are."""
    names = clusters.tolist() if isinstance(clusters, np.ndarray) else list(clusters)
    if len(names) != size:
        raise ConfigError(f"got {len(names)} cluster names for {size} values; expected one name a value")
    numbers: dict[Hashable, int] = {}
    index = np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int64)
    return index, len(numbers)


def _finite(values: ArrayLike, name: str) -> NDArray[np.float64]:
    """Return the values as ``[N]`` float64, refusing an empty list, other shapes, nan and infinity."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ConfigError(f"{name} has shape {array.shape}; expected [N] with N of at least 1")
    if not np.isfinite(array).all():
        bad = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ConfigError(
            f"{name}[{bad}] is {array[bad]}; expected finite numbers: leave abstentions out and count them"
        )
    return array


def _two(a: ArrayLike, b: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Check the two sides of a correlation."""
    x, y = _finite(a, "a"), _finite(b, "b")
    if x.size != y.size or x.size < 2:
        raise ConfigError(f"got {x.size} and {y.size} values; expected as many of each, at least 2")
    return x, y


def rank_values(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rank ``[N]`` values from 1 upward; equal ones share the mean of the ranks they cover."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]
