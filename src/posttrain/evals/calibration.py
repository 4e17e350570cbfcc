"""Whether a reward model's win probabilities are true: a temperature, the calibration error, and the diagram's bins.

A gap is ``score of the better - score of the worse`` of one pair, so that sigmoid(gap) is the model's probability for the
answer that people preferred.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from posttrain.errors import ConfigError

_FLATTEST, _STEEPEST = 1e-4, 1e4  # bounds of 1 / temperature


def fit_temperature(gaps: ArrayLike) -> float:
    """Return the T that minimises ``mean log(1 + exp(-gap / T))``: ``[P] -> T``; 1e4 where no better than chance.

    The loss is convex in 1/T, whose best value is found by bisection of the slope, within 1e-4 and 1e4.

    Raises:
        ConfigError: no pairs, or gaps that are not finite.

    Source: Guo et al. 2017, arXiv 1706.04599, section 4.2.
    """
    g = _gaps(gaps)
    low, high = _FLATTEST, _STEEPEST

    def slope(sharpness: float) -> float:
        return float(-(g * _sigmoid(-sharpness * g)).mean())

    if slope(low) >= 0:
        return 1 / low
    for _ in range(80):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if slope(middle) >= 0 else (middle, high)
    return 1 / math.sqrt(low * high)


def negative_log_likelihood(gaps: ArrayLike, temperature: float = 1.0) -> float:
    """``mean log(1 + exp(-gap / T))`` in nats a pair; log 2 for a coin."""
    return float(np.logaddexp(0.0, -_gaps(gaps) / temperature).mean())


@dataclass(frozen=True, slots=True)
class Bin:
    """Pairs whose predicted winner had a probability in ``(low, high]``: their number, mean probability, share right."""

    low: float
    high: float
    count: int
    confidence: float
    right: float


def calibration_bins(probability: ArrayLike, right: ArrayLike, *, bins: int = 10) -> list[Bin]:
    """Sort predictions into ``bins`` equal intervals ``(low, high]`` of [0, 1]; empty ones are left out.

    Args:
        probability: ``[P]`` of the predicted winner.
        right: ``[P]`` 1 where it is the better one, 0 where it is not, 0.5 at a tie.
        bins: how many intervals.

    Raises:
        ConfigError: lengths that differ, no pairs, probabilities outside [0, 1].
    """
    p, y = np.asarray(probability, dtype=np.float64), np.asarray(right, dtype=np.float64)
    if p.ndim != 1 or p.shape != y.shape or p.size == 0:
        raise ConfigError(f"got {p.shape} probabilities and {y.shape} outcomes; expected as many of each, at least 1")
    if not ((p >= 0) & (p <= 1)).all():
        raise ConfigError("a probability lies outside [0, 1]")
    place = np.clip(np.ceil(p * bins - 1e-12).astype(int) - 1, 0, bins - 1)
    return [
        Bin(k / bins, (k + 1) / bins, int((place == k).sum()), float(p[place == k].mean()), float(y[place == k].mean()))
        for k in range(bins)
        if (place == k).any()
    ]


def calibration_error(bins: list[Bin]) -> float:
    """The expected calibration error ``sum over bins of n_b / n |right_b - confidence_b|``.

    Source: Naeini et al. 2015; Guo et al. 2017, eq. 3.
    """
    total = sum(b.count for b in bins)
    return sum(b.count / total * abs(b.right - b.confidence) for b in bins)


def pair_bins(gaps: ArrayLike, temperature: float = 1.0, *, bins: int = 10) -> list[Bin]:
    """The bins of a reward model's predicted winners, ``sigmoid(|gap| / T)`` each."""
    g = _gaps(gaps)
    return calibration_bins(_sigmoid(np.abs(g) / temperature), (np.sign(g) + 1) / 2, bins=bins)


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(-np.logaddexp(0.0, -x))


def _gaps(gaps: ArrayLike) -> NDArray[np.float64]:
    g = np.asarray(gaps, dtype=np.float64)
    if g.ndim != 1 or g.size == 0 or not np.isfinite(g).all():
        raise ConfigError(f"got gaps of shape {g.shape}; expected [P] finite numbers, at least one pair")
    return g
