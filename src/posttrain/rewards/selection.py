"""Choosing among samples by their scores: best of n, rejection sampling, and what they are worth."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence

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


def statistical_rejection(
    responses: Sequence[Hashable],
    scores: Sequence[float],
    draws: Iterator[float],
    *,
    samples: int,
    beta: float,
) -> list[int]:
    """Indices of ``samples`` of one prompt's candidates, in the order they were accepted, without replacement.

    Passes over the candidates that remain: one is accepted where ``u < exp((r - r_max) / beta)``, ``r_max`` their largest
    score as the pass began, until there are enough. Of candidates sampled from a policy those accepted follow ``policy(y)
    exp(r(y) / beta)`` up to its normaliser; ``beta`` near 0 takes the best, a large one any. Equal responses count once,
    where the first stood and with the last one's score.

    Args:
        responses: the candidates, as text or ids.
        scores: finite, one each.
        draws: uniform numbers in [0, 1).
        samples: how many to accept.
        beta: in units of the scores.

    Raises:
        ConfigError: fewer different candidates than ``samples``, ``beta`` not above 0.

    Source: Liu et al. 2023, Statistical rejection sampling improves preference optimization, arXiv 2309.06657, algorithm 1.
    """
    first = {r: i for i, r in reversed(list(enumerate(responses)))}
    left = {first[r]: s for r, s in zip(responses, scores, strict=True)}
    if beta <= 0 or not 0 <= samples <= len(left):
        raise ConfigError(
            f"got {samples} of {len(left)} different candidates at beta={beta:g}; expected no more than there are, and beta > 0"
        )
    accepted: list[int] = []
    while len(accepted) < samples:
        most = max(left.values())
        for i, s in list(left.items()):
            if len(accepted) < samples and next(draws) < math.exp((s - most) / beta):
                accepted.append(i)
                del left[i]
    return accepted
