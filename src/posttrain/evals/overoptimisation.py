"""Best of n by a proxy reward, measured by gold: the curve over n, its interval, and the fitted over-optimisation laws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from posttrain.errors import ConfigError
from posttrain.evals.statistics import Interval, cluster_bootstrap
from posttrain.rewards.selection import best_of_n_kl

Array = NDArray[np.float64]


def best_of_n(proxy: ArrayLike, value: ArrayLike, counts: Sequence[int]) -> Array:
    """The expected value of the sample that the proxy likes best among ``n``, for each prompt and n: ``[P, len(counts)]``.

    Exact over all subsets of the N samples: the sample of proxy rank i (from 1, ascending) is the best of n with chance
    ``C(i - 1, n - 1) / C(N, n)``. Samples of equal proxy share their chances.

    Args:
        proxy: ``[P, N]`` scores that choose.
        value: ``[P, N]`` what the chosen one is worth (gold, or the proxy itself).
        counts: values of n, from 1 to N.

    Raises:
        ConfigError: shapes that differ, or an n out of range.

    Source: Nakano et al. 2021 (WebGPT), appendix I, with another value than the one chosen by.
    """
    p, v = np.asarray(proxy, dtype=np.float64), np.asarray(value, dtype=np.float64)
    if p.ndim != 2 or p.shape != v.shape or p.size == 0:
        raise ConfigError(f"got proxy {p.shape} and values {v.shape}; expected both [prompts, samples]")
    if not (np.isfinite(p).all() and np.isfinite(v).all()):
        raise ConfigError("a score is not finite; leave such prompts out and count them")
    samples = p.shape[1]
    if bad := [n for n in counts if not 1 <= n <= samples]:
        raise ConfigError(f"got best of {bad[0]} from {samples} samples; expected 1 to {samples}")
    below = np.sort(p, axis=1)
    least = np.stack([np.searchsorted(row, given, "left") for row, given in zip(below, p, strict=True)])
    most = np.stack([np.searchsorted(row, given, "right") for row, given in zip(below, p, strict=True)])
    out = np.empty((len(p), len(counts)))
    for column, n in enumerate(counts):
        # under[i]: the chance that all n lie among the i lowest, C(i, n) / C(N, n)
        under = np.array([_all_among(i, n, samples) for i in range(samples + 1)])
        out[:, column] = ((under[most] - under[least]) / (most - least) * v).sum(axis=1)
    return out


def _all_among(i: int, n: int, samples: int) -> float:
    if i < n:
        return 0.0
    logs = [math.lgamma(k + 1) for k in (i, samples - n, i - n, samples)]
    return math.exp(logs[0] + logs[1] - logs[2] - logs[3])


def curve(proxy: ArrayLike, gold: ArrayLike, counts: Sequence[int], *, seed: int = 0) -> list[dict[str, float]]:
    """Return a row for each n: KL bound in nats, mean proxy and gold of the chosen samples, gold's interval over prompts."""
    by_proxy, by_gold = best_of_n(proxy, proxy, counts), best_of_n(proxy, gold, counts)
    prompts = list(range(len(by_gold)))
    rows = []
    for k, n in enumerate(counts):
        found: Interval = cluster_bootstrap(by_gold[:, k], prompts, seed=seed)
        rows.append(
            {
                "n": n,
                "kl": best_of_n_kl(n),
                "proxy": float(by_proxy[:, k].mean()),
                "gold": found.mean,
                "low": found.low,
                "high": found.high,
            }
        )
    return rows


@dataclass(frozen=True, slots=True)
class Law:
    """A fitted law of gold against distance ``d = sqrt(KL)``; ``error`` is the root mean square of what it misses.

    ``peak`` is the d at which gold is highest, infinite where it never falls.
    """

    alpha: float
    beta: float
    error: float
    peak: float


def fit_best_of_n_law(kl: ArrayLike, gain: ArrayLike) -> Law:
    """Fit ``gain = d (alpha - beta d)`` with ``d = sqrt(KL)``; gain is gold less gold at KL 0.

    Raises:
        ConfigError: fewer than two points with KL above 0.

    Source: Gao et al. 2022, arXiv 2210.10760, eq. 1.
    """
    d, y = _points(kl, gain)
    alpha, beta = _least_squares(np.stack([d, -d * d], axis=1), y)
    peak = alpha / (2 * beta) if beta > 0 else math.inf
    return Law(alpha, beta, _miss(d * (alpha - beta * d), y), peak)


def fit_reinforcement_law(kl: ArrayLike, gain: ArrayLike) -> Law:
    """Fit ``gain = d (alpha - beta log d)`` with ``d = sqrt(KL)``, for policies that reinforcement learning moved.

    Raises:
        ConfigError: fewer than two points with KL above 0.

    Source: Gao et al. 2022, arXiv 2210.10760, eq. 2.
    """
    d, y = _points(kl, gain)
    alpha, beta = _least_squares(np.stack([d, -d * np.log(d)], axis=1), y)
    peak = math.exp(min(alpha / beta - 1, 700.0)) if beta > 0 else math.inf
    return Law(alpha, beta, _miss(d * (alpha - beta * np.log(d)), y), peak)


def _points(kl: ArrayLike, gain: ArrayLike) -> tuple[Array, Array]:
    nats, y = np.asarray(kl, dtype=np.float64), np.asarray(gain, dtype=np.float64)
    if nats.ndim != 1 or nats.shape != y.shape or (nats > 0).sum() < 2:
        raise ConfigError(f"got {nats.shape} distances and {y.shape} gains; expected as many, two at least above 0")
    moved = nats > 0
    return np.sqrt(nats[moved]), y[moved]


def _least_squares(columns: Array, y: Array) -> tuple[float, float]:
    found = np.linalg.lstsq(columns, y, rcond=None)[0]
    return float(found[0]), float(found[1])


def _miss(fitted: Array, y: Array) -> float:
    return float(np.sqrt(np.mean((fitted - y) ** 2)))


WINDOW, UP, DOWN = 20, 3.0, -5.0
"""Measurements that `parted` looks at, and its limits on the trend of the proxy and of gold, in standard errors."""


def trend(values: Sequence[float]) -> float:
    """The t of the slope of a straight line through equally spaced values: ``b / sqrt(SSE / (n - 2) / sum (i - mean)^2)``.

    0 where they are all equal or fewer than 3, infinite where a line fits them without error. A single outlier is error, too, and
    draws t towards 0; a fall at one blow in the middle of 20 values comes to -7 at most, a steady one to any depth.
    """
    y = np.asarray(values, dtype=np.float64)
    n = len(y)
    if n < 3:
        return 0.0
    x = np.arange(n) - (n - 1) / 2
    y = y - y.mean()
    slope = float(x @ y / (x @ x))
    if slope == 0.0:
        return 0.0
    error = math.sqrt(float(np.square(y - slope * x).sum()) / (n - 2) / float(x @ x))
    return slope / error if error > 1e-12 * abs(slope) else math.copysign(math.inf, slope)


def parted(proxy: Sequence[float], gold: Sequence[float], window: int = WINDOW) -> bool:
    """Whether proxy and gold have parted: over the newest ``window`` measurements the proxy rises and gold falls.

    The rule: `trend` of the proxy above 3 and that of gold below -5. Fewer measurements than the window say nothing. Where gold
    is flat, which is the worst that honest learning does while its proxy still rises, chance alone falls below -5 in about 5 of
    100,000 windows of 20; where gold rises with the proxy, hardly ever. What is found is a fall over the window that is about four
    deviations of a measurement deep.
    """
    if len(gold) < window:
        return False
    return trend(proxy[-window:]) > UP and trend(gold[-window:]) < DOWN
