"""Pairwise accuracy of anything that scores answers, and the baselines a reward model has to beat.

Everywhere: ``scores[r][k]``, ``ranks[r][k]``, ``texts[r][k]`` belong to answer k of ranking r; rank 0 is
best, equal ranks are ties and make no pair.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from posttrain.errors import ConfigError, DataError
from posttrain.evals.bradley_terry import Array, fit_bradley_terry, ordered_pairs, sum_at
from posttrain.evals.statistics import Interval, cluster_bootstrap
from posttrain.types import Example

UNLABELLED = "(no label)"


@dataclass(frozen=True, slots=True)
class PairOutcome:
    """One pair of answers: ``correct`` is 1 if the better one scored higher, 0.5 at a tie, else 0.

    ``better`` and ``worse`` are positions in ranking ``ranking``; ``failure`` is the worse answer's label,
    None if it has none.
    """

    ranking: int
    correct: float
    better: int
    worse: int
    failure: str | None = None


def pair_outcomes(
    scores: Sequence[ArrayLike],
    ranks: Sequence[Sequence[int]],
    failures: Sequence[Sequence[str | None]] | None = None,
) -> list[PairOutcome]:
    """Compare every pair of answers of differing rank within each ranking.

    Args:
        scores: one row of finite scores a ranking, in the order of its responses; higher is meant to be
            better.
        ranks: one row of ranks a ranking, 0 = best.
        failures: one row of labels (or None) a ranking; None = no labels at all.

    Raises:
        ConfigError: rows that do not match in number or length, or a score that is not finite.
    """
    labels = failures if failures is not None else [[None] * len(row) for row in ranks]
    if not len(scores) == len(ranks) == len(labels):
        raise ConfigError(
            f"got {len(scores)} rows of scores, {len(ranks)} of ranks, {len(labels)} of failures; "
            "expected one of each a ranking"
        )
    outcomes: list[PairOutcome] = []
    for ranking, (score_row, rank_row, label_row) in enumerate(zip(scores, ranks, labels, strict=True)):
        row = np.asarray(score_row, dtype=np.float64)
        if row.shape != (len(rank_row),) or len(label_row) != len(rank_row):
            raise ConfigError(
                f"ranking {ranking} has scores {row.shape}, {len(rank_row)} ranks, {len(label_row)} labels; "
                "expected one of each a response"
            )
        if not np.isfinite(row).all():
            raise ConfigError(f"ranking {ranking} has scores {row.tolist()}; expected finite numbers")
        for better, worse in ordered_pairs(rank_row):
            correct = float((np.sign(row[better] - row[worse]) + 1) / 2)
            outcomes.append(PairOutcome(ranking, correct, better, worse, label_row[worse]))
    return outcomes


def accuracy(outcomes: Sequence[PairOutcome], *, level: float = 0.95, resamples: int = 4000, seed: int = 0) -> Interval:
    """Return the share of pairs scored in the right order (ties count half), with its interval over rankings.

    Raises:
        ConfigError: no pairs at all.
    """
    if not outcomes:
        raise ConfigError("got no pairs; expected at least one ranking with two answers of differing rank")
    return cluster_bootstrap(
        [o.correct for o in outcomes],
        [o.ranking for o in outcomes],
        level=level,
        resamples=resamples,
        seed=seed,
    )


def accuracy_by_failure(
    outcomes: Sequence[PairOutcome], *, level: float = 0.95, resamples: int = 4000, seed: int = 0
) -> dict[str, Interval]:
    """Return the accuracy for each label of the worse answer; pairs without one stand under `UNLABELLED`."""
    groups = group_by_failure(outcomes)
    return {name: accuracy(g, level=level, resamples=resamples, seed=seed) for name, g in groups.items()}


def group_by_failure(outcomes: Sequence[PairOutcome]) -> dict[str, list[PairOutcome]]:
    """Split the pairs by the worse answer's label, labels in alphabetical order, `UNLABELLED` last."""
    groups: dict[str, list[PairOutcome]] = {}
    for outcome in outcomes:
        groups.setdefault(UNLABELLED if outcome.failure is None else outcome.failure, []).append(outcome)
    return {name: groups[name] for name in sorted(groups, key=lambda n: (n == UNLABELLED, n))}


def ranking_texts(rankings: Sequence[Example]) -> list[list[str]]:
    """Return the answers' texts, one row a ranking."""
    return [[response.text for response in example.responses] for example in rankings]


def ranking_ranks(rankings: Sequence[Example]) -> list[list[int]]:
    """Return the answers' ranks, one row a ranking.

    Raises:
        DataError: a response without a rank.
    """
    rows: list[list[int]] = []
    for example in rankings:
        ranks = [response.rank for response in example.responses]
        if any(rank is None for rank in ranks):
            raise DataError.at(
                example.file,
                example.row,
                "completions",
                "a response has no rank",
                "give the answers from best to worst",
            )
        rows.append([rank for rank in ranks if rank is not None])
    return rows


def ranking_failures(rankings: Sequence[Example]) -> list[list[str | None]]:
    """Return the answers' failure labels, one row a ranking."""
    return [[response.failure for response in example.responses] for example in rankings]


def length_scores(texts: Sequence[Sequence[str]], *, direction: int = 1) -> list[list[float]]:
    """Score an answer by direction * its length in characters: the baseline every reward model must beat.

    Choose the direction with `length_direction` on training rankings, never on the split that is reported.
    """
    if direction not in (1, -1):
        raise ConfigError(f"got direction {direction}; expected 1 (longer is better) or -1 (shorter is better)")
    return [[float(direction * len(text)) for text in row] for row in texts]


def length_direction(train_texts: Sequence[Sequence[str]], train_ranks: Sequence[Sequence[int]]) -> int:
    """Return 1 if the longer answer is at least as often the better one in the training rankings, else -1."""
    outcomes = pair_outcomes(length_scores(train_texts), train_ranks)
    if not outcomes:
        raise ConfigError("got no training pairs; expected at least one ranking with two answers of differing rank")
    return 1 if sum(o.correct for o in outcomes) >= 0.5 * len(outcomes) else -1


def bag_of_words_scores(
    train_rankings: Sequence[Example], test_rankings: Sequence[Example], *, l2: float = 1.0
) -> list[list[float]]:
    """Score test answers by a Bradley-Terry logistic regression on words, fitted to the training pairs.

    Features are log(1 + count) of lower-cased words; minimised is sum over pairs of -log sigmoid(w .
    (x_better - x_worse)) + l2/2 |w|^2. Words that training never saw score 0. The prompt takes no part: it
    cancels within a pair.

    Returns:
        one row of scores a test ranking.

    Raises:
        ConfigError: no training pairs.
        DataError: a training response without a rank.
    """
    train_texts, ranks = ranking_texts(train_rankings), ranking_ranks(train_rankings)
    counts = [_words(text) for row in train_texts for text in row]
    column = {word: i for i, word in enumerate(sorted(set().union(*counts)))}
    forward, backward = _sparse_map(counts, column)
    weight = fit_bradley_terry(forward, backward, ranks, len(column), l2=l2)
    return [
        [
            float(sum(np.log1p(n) * weight[column[w]] for w, n in sorted(_words(text).items()) if w in column))
            for text in row
        ]
        for row in ranking_texts(test_rankings)
    ]


def frozen_head(train_features: Sequence[ArrayLike], train_ranks: Sequence[Sequence[int]], *, l2: float = 1.0) -> Array:
    """Fit a linear Bradley-Terry head on frozen features: what the trunk knows before it is trained.

    Features are standardised over all training answers before fitting (so that ``l2`` means the same for
    each), and the scale is folded back into the weight; the mean cancels within a pair. Features without
    variance get weight 0.

    Args:
        train_features: one array ``[K, d]`` a ranking, in the order of its responses.
        train_ranks: one row of K ranks a ranking, 0 = best.
        l2: weight of |w|^2 / 2 against the sum over pairs, on the standardised scale.

    Returns:
        weight ``[d]``; `head_scores` applies it to raw features.

    Raises:
        ConfigError: no training pairs, or features that do not match the ranks.
    """
    rows = [np.asarray(features, dtype=np.float64) for features in train_features]
    if [row.shape[0] for row in rows] != [len(rank_row) for rank_row in train_ranks]:
        raise ConfigError("features and ranks differ; expected features [K, d] for the K ranks of every ranking")
    stacked = np.concatenate(rows) if rows else np.zeros((0, 1))
    spread = stacked.std(axis=0) if len(stacked) else np.zeros(1)
    varies = spread > 1e-12 * (1 + np.abs(stacked).max(axis=0, initial=0.0))
    scale = np.where(varies, 1 / np.where(varies, spread, 1.0), 0.0)
    standard = (stacked - stacked.mean(axis=0)) * scale if len(stacked) else stacked
    weight = fit_bradley_terry(lambda w: standard @ w, lambda g: g @ standard, train_ranks, stacked.shape[1], l2=l2)
    return weight * scale


def head_scores(features: Sequence[ArrayLike], weight: Array) -> list[list[float]]:
    """Return features ``[K, d]`` . weight ``[d]`` for each ranking."""
    return [(np.asarray(row, dtype=np.float64) @ weight).tolist() for row in features]


def _words(text: str) -> Counter[str]:
    """Count lower-cased words: runs of letters, digits, underscores and apostrophes."""
    return Counter(re.findall(r"[\w']+", text.lower()))


def _sparse_map(
    counts: Sequence[Counter[str]], column: dict[str, int]
) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """Return the map from word weights to answers' scores, and its transpose, without a dense [R, V]."""
    entries = [(row, column[w], n) for row, count in enumerate(counts) for w, n in count.items()]
    row, word, count = (np.array(part) for part in zip(*entries, strict=True)) if entries else (np.zeros(0, int),) * 3
    value = np.log1p(count)
    return (
        lambda weight: sum_at(row, value * weight[word], len(counts)),
        lambda gradient: sum_at(word, value * gradient[row], len(column)),
    )
