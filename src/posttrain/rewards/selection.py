"""Choosing among samples by their scores: best of n, rejection sampling, and what they are worth."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

from posttrain.errors import ConfigError


def best_of_n_kl(n: int) -> float:
    """An upper bound of KL(best of n || policy) in nats, ``log n - (n - 1) / n``; reached where scores have no ties.

    Source: Beirami et al. 2024, arXiv 2401.01879.
    """
    return math.log(n) - (n - 1) / n


def expected_best(scores: Sequence[float], n: int) -> float:
    """The unbiased estimate of the mean best of ``n`` samples from ``N >= n`` scores.

    ``sum_i C(i - 1, n - 1) / C(N, n) s_(i)``, scores in ascending order, counted from 1.
    Source: Nakano et al. 2021 (WebGPT), appendix I.
    """
    if not 1 <= n <= len(scores):
        raise ConfigError(f"got best of {n} from {len(scores)} scores; expected 1 to {len(scores)}")
    ways = math.comb(len(scores), n)
    return sum(math.comb(i, n - 1) / ways * s for i, s in enumerate(sorted(scores)))


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The chance that one of ``k`` samples is right, from ``correct`` of ``samples``: ``1 - C(N - c, k) / C(N, k)``.

    Source: Chen et al. 2021 (Codex), eq. 1.
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ConfigError(
            f"got {correct} of {samples} right, k={k}; expected no more right than samples, and k from 1 to {samples}"
        )
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def kept(
    responses: Sequence[Hashable], scores: Sequence[float | None], *, least: float = -math.inf, most: int = 1
) -> list[int]:
    """The indices of one prompt's samples that rejection sampling keeps, best first.

    Equal responses count once; ties go to the earlier one; a response without a score is not kept. ``most`` 1 is RAFT
    (Dong et al. 2023, arXiv 2304.06767); a threshold ``least`` that rises is ReST's Improve step (Gulcehre et al. 2023,
    arXiv 2308.08998); 1 of scores 0 and 1 with ``most`` 10 is ReST-EM (Singh et al. 2023, arXiv 2312.06585).
    """
    first = {r: i for i, r in reversed(list(enumerate(responses)))}
    known = [(i, s) for i, s in enumerate(scores) if s is not None and s >= least and first[responses[i]] == i]
    return [i for i, _ in sorted(known, key=lambda pair: -pair[1])[:most]]
