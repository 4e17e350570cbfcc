"""Bradley-Terry logistic regression on pairs of answers, for any linear map from weights to scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from posttrain.errors import CheckError, ConfigError

Array = NDArray[np.float64]
LinearMap = Callable[[Array], Array]


class Pairs(NamedTuple):
    """The better and the worse answer of each pair ``[P]``, numbered across rankings; ``answers`` in all."""

    better: NDArray[Any]
    worse: NDArray[Any]
    answers: int

    def margins(self, scores: Array) -> Array:
        """Return ``[P]`` score of the better minus score of the worse answer."""
        return scores[self.better] - scores[self.worse]

    def spread(self, values: Array) -> Array:
        """Return ``[R]``: the transpose of `margins`, from pairs back to answers."""
        return sum_at(self.better, values, self.answers) - sum_at(self.worse, values, self.answers)


def ordered_pairs(ranks: Sequence[int]) -> list[tuple[int, int]]:
    """List the positions (better, worse) of every pair of differing rank; 0 = best."""
    size = range(len(ranks))
    return [(i, j) for i in size for j in size if ranks[i] < ranks[j]]


def index_pairs(ranks: Sequence[Sequence[int]]) -> Pairs:
    """Number all answers across rankings and list their pairs.

    Raises:
        ConfigError: no pair of differing rank.
    """
    better: list[int] = []
    worse: list[int] = []
    offset = 0
    for row in ranks:
        for i, j in ordered_pairs(row):
            better.append(offset + i)
            worse.append(offset + j)
        offset += len(row)
    if not better:
        raise ConfigError("got no training pairs; expected at least one ranking with two differing ranks")
    return Pairs(np.array(better), np.array(worse), offset)


def fit_bradley_terry(
    forward: LinearMap,
    backward: LinearMap,
    ranks: Sequence[Sequence[int]],
    size: int,
    *,
    l2: float = 1.0,
    tolerance: float = 1e-8,
) -> Array:
    """Minimise sum over pairs of softplus(-(s_better - s_worse)) + l2/2 |w|^2, with s = forward(w).

    Newton steps. The problem is strictly convex: the answer is unique and depends on no seed or starting
    point.

    Args:
        forward: the linear map from weights ``[size]`` to scores ``[R]`` of all answers, rankings in order.
        backward: its transpose, ``[R]`` to ``[size]``.
        ranks: one row of ranks a ranking, 0 = best.
        size: number of weights.
        l2: positive, so that a minimum exists even for separable pairs.
        tolerance: stop when the gradient's norm falls below this share of its norm at w = 0.

    Returns:
        the weight ``[size]``.

    Raises:
        ConfigError: no pairs, or ``l2`` not positive.
        CheckError: no convergence.
    """
    if l2 <= 0:
        raise ConfigError(f"got l2 {l2}; expected a positive number")
    pairs = index_pairs(ranks)
    weight, margin, first = np.zeros(size), np.zeros(pairs.better.size), 0.0
    for _ in range(100):
        wrong = 0.5 * (1 - np.tanh(0.5 * margin))  # sigmoid(-margin), without overflow
        gradient = backward(pairs.spread(-wrong)) + l2 * weight
        norm = float(np.linalg.norm(gradient))
        first = first or norm
        if norm <= tolerance * first:
            return weight

        def curvature(v: Array, scale: Array = wrong * (1 - wrong)) -> Array:
            return backward(pairs.spread(scale * pairs.margins(forward(v)))) + l2 * v

        step = _conjugate_gradient(curvature, -gradient, min(0.1, norm / first))
        move = pairs.margins(forward(step))
        length = _line_search(weight, step, margin, move, float(gradient @ step), l2)
        weight, margin = weight + length * step, margin + length * move
    raise CheckError(
        f"the fit on {pairs.better.size} pairs did not converge in 100 Newton steps; look for huge features"
    )


def sum_at(index: NDArray[Any], values: Array, size: int) -> Array:
    """Return ``[size]``: the sum of the values at each index."""
    return np.bincount(index, weights=values, minlength=size).astype(np.float64, copy=False)


def _line_search(weight: Array, step: Array, margin: Array, move: Array, slope: float, l2: float) -> float:
    """Return the first of 1, 1/2, 1/4 ... that lowers the objective by 1e-4 of what its slope promises."""

    def objective(length: float) -> float:
        moved = weight + length * step
        return float(np.logaddexp(0.0, -margin - length * move).sum() + 0.5 * l2 * (moved @ moved))

    start, length = objective(0.0), 1.0
    rounding = 1e-13 * abs(start)  # near the minimum the true descent is smaller than rounding
    while objective(length) > start + 1e-4 * length * slope + rounding and length > 1e-9:
        length *= 0.5
    return length


def _conjugate_gradient(product: LinearMap, target: Array, tolerance: float) -> Array:
    """Solve product(x) = target for a positive definite map, to a residual of ``tolerance`` * |target|."""
    x, residual = np.zeros_like(target), target.copy()
    direction, energy = residual.copy(), float(residual @ residual)
    stop = (tolerance**2) * energy
    for _ in range(1000):
        if energy <= stop:
            break
        moved = product(direction)
        length = energy / float(direction @ moved)
        x, residual = x + length * direction, residual - length * moved
        energy, before = float(residual @ residual), energy
        direction = residual + (energy / before) * direction
    return x
