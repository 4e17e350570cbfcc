from __future__ import annotations

import numpy as np
import pytest

from posttrain.errors import ConfigError, DataError
from posttrain.evals.bradley_terry import fit_bradley_terry
from posttrain.evals.reward import (
    UNLABELLED,
    PairOutcome,
    accuracy,
    accuracy_by_failure,
    bag_of_words_scores,
    frozen_head,
    head_scores,
    length_direction,
    length_scores,
    pair_outcomes,
    ranking_failures,
    ranking_ranks,
    ranking_texts,
)
from posttrain.types import Example, Message, Response


def ranking(*texts: str, ranks: list[int | None] | None = None) -> Example:
    given = ranks or list(range(len(texts)))
    responses = tuple(
        Response(messages=(Message(role="assistant", content=text),), rank=rank)
        for text, rank in zip(texts, given, strict=True)
    )
    return Example(prompt=(Message(role="user", content="?"),), responses=responses, file="r.jsonl", row=3)


def test_pairs_ties_and_labels_by_hand():
    outcomes = pair_outcomes(
        [[0.9, 0.5, 0.5], [1.0, 2.0]],
        [[0, 1, 2], [0, 1]],
        [[None, "rude", "short"], ["ignored: it is the better one", "rude"]],
    )
    assert outcomes == [
        PairOutcome(0, 1.0, 0, 1, "rude"),
        PairOutcome(0, 1.0, 0, 2, "short"),
        PairOutcome(0, 0.5, 1, 2, "short"),
        PairOutcome(1, 0.0, 0, 1, "rude"),
    ]
    got = accuracy(outcomes)
    assert got.mean == pytest.approx(2.5 / 4) and got.n == 2
    by_failure = accuracy_by_failure(outcomes)
    assert {name: interval.mean for name, interval in by_failure.items()} == {"rude": 0.5, "short": 0.75}


def test_equal_ranks_make_no_pair_and_missing_labels_are_named():
    outcomes = pair_outcomes([[3.0, 2.0, 1.0]], [[0, 1, 1]])
    assert [(o.better, o.worse) for o in outcomes] == [(0, 1), (0, 2)]
    assert list(accuracy_by_failure(outcomes)) == [UNLABELLED]


@pytest.mark.parametrize(
    ("scores", "ranks", "failures", "message"),
    [
        ([[1.0]], [[0], [0]], None, "1 rows of scores, 2 of ranks"),
        ([[1.0]], [[0, 1]], None, "ranking 0 has scores"),
        ([[1.0, 2.0]], [[0, 1]], [[None]], "1 labels"),
        ([[1.0, float("nan")]], [[0, 1]], None, "expected finite"),
    ],
)
def test_pair_refusals(scores, ranks, failures, message):
    with pytest.raises(ConfigError, match=message):
        pair_outcomes(scores, ranks, failures)
    with pytest.raises(ConfigError, match="no pairs"):
        accuracy(pair_outcomes([[1.0, 2.0]], [[0, 0]]))


def test_length_direction_comes_from_training():
    train, test = [["aaa", "a"], ["aaaa", "a"], ["a", "aa"]], [["a", "aaaa"]]
    ranks = [[0, 1]] * 3
    assert length_direction(train, ranks) == 1
    assert length_direction([row[::-1] for row in train], ranks) == -1
    assert length_scores(test, direction=1) == [[1.0, 4.0]]
    assert length_scores(test, direction=-1) == [[-1.0, -4.0]]
    longer = accuracy(pair_outcomes(length_scores(train), ranks)).mean
    shorter = accuracy(pair_outcomes(length_scores(train, direction=-1), ranks)).mean
    assert longer == pytest.approx(2 / 3) and longer + shorter == pytest.approx(1)
    with pytest.raises(ConfigError, match="direction 0"):
        length_scores(test, direction=0)


def test_bag_of_words_is_the_minimum_and_generalises():
    train = [ranking("Please wait", "wait"), ranking("please go", "go go"), ranking("yes please", "yes no")]
    scores = bag_of_words_scores(train, [ranking("PLEASE", "no", "unheard")])
    assert scores[0][0] > 0.3 and scores[0][1] < -0.1 and scores[0][2] == 0.0
    # one word, one pair: softplus(-x w) + w^2/2 is least where w = x sigmoid(-x w)
    x = np.log(2.0)
    weight = bag_of_words_scores([ranking("a", "")], [ranking("a")])[0][0] / x
    assert weight == pytest.approx(x / (1 + np.exp(x * weight)), abs=1e-9)


def test_bag_of_words_on_held_out_rankings():
    rng = np.random.default_rng(0)

    def draw(count: int) -> list[Example]:
        words = [[" ".join(f"w{i}" for i in rng.integers(0, 40, 12)) for _ in range(3)] for _ in range(count)]
        return [ranking(*sorted(row, key=lambda t: -sum(int(w[1:]) < 20 for w in t.split()))) for row in words]

    train, test = draw(150), draw(60)
    got = accuracy(pair_outcomes(bag_of_words_scores(train, test), ranking_ranks(test)))
    assert got.mean > 0.85 and got.n == 60
    assert bag_of_words_scores(train, test) == bag_of_words_scores(train, test)


def test_frozen_head_finds_the_direction_whatever_the_scale():
    rng = np.random.default_rng(1)
    truth = np.array([1.0, -2.0, 0.0])
    features = [rng.normal(size=(4, 3)) for _ in range(200)]
    ranks = [np.argsort(np.argsort(-(f @ truth + 0.1 * rng.normal(size=4)))).tolist() for f in features]
    weight = frozen_head(features, ranks)
    assert weight[:2] / np.linalg.norm(weight) == pytest.approx(truth[:2] / np.sqrt(5), abs=0.05)
    assert abs(weight[2]) < 0.05 * np.linalg.norm(weight)
    scale = np.array([1000.0, 1e-3, 1.0])
    moved = [np.hstack([f * scale + 5, np.full((4, 1), 7.0)]) for f in features]  # and a feature without variance
    other = frozen_head(moved, ranks)
    assert other[:3] * scale == pytest.approx(weight, rel=1e-6) and other[3] == 0
    assert accuracy(pair_outcomes(head_scores(moved, other), ranks)).mean > 0.95


def test_fit_reaches_the_stationary_point():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(30, 5)) * np.array([30.0, 1, 1, 1, 0.1])
    ranks = [[0, 1, 2]] * 10
    w = fit_bradley_terry(lambda v: x @ v, lambda g: g @ x, ranks, 5, l2=0.3)
    gradient = 0.3 * w
    for r in range(10):
        for i, j in ((0, 1), (0, 2), (1, 2)):
            d = x[3 * r + i] - x[3 * r + j]
            gradient = gradient - d / (1 + np.exp(d @ w))
    assert np.abs(gradient).max() < 1e-5
    with pytest.raises(ConfigError, match="l2 0"):
        fit_bradley_terry(lambda v: x @ v, lambda g: g @ x, ranks, 5, l2=0)
    with pytest.raises(ConfigError, match="no training pairs"):
        frozen_head([x[:2]], [[0, 0]])
    with pytest.raises(ConfigError, match="features and ranks differ"):
        frozen_head([x[:2]], [[0, 1, 2]])


def test_views_of_examples():
    example = ranking("good", "bad")
    assert ranking_texts([example]) == [["good", "bad"]]
    assert ranking_ranks([example]) == [[0, 1]] and ranking_failures([example]) == [[None, None]]
    with pytest.raises(DataError, match=r"r\.jsonl row 3, field 'completions'"):
        ranking_ranks([ranking("a", "b", ranks=[0, None])])
