"""Best of n and rejection sampling on numbers worked out by hand."""

from __future__ import annotations

from itertools import combinations

import pytest

from posttrain.errors import ConfigError
from posttrain.rewards.selection import best_of_n_kl, expected_best, kept, pass_at_k


@pytest.mark.parametrize(("n", "nats"), [(1, 0), (2, 0.193147), (4, 0.636294), (16, 1.835089), (256, 4.549084)])
def test_the_distance_of_best_of_n(n, nats):
    assert best_of_n_kl(n) == pytest.approx(nats, abs=1e-6)


def test_the_expected_best_is_the_mean_over_all_subsets():
    scores = [3.0, -1.0, 2.5, 2.5, 0.0]
    for n in range(1, 6):
        subsets = [max(s) for s in combinations(scores, n)]
        assert expected_best(scores, n) == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)
    with pytest.raises(ConfigError, match="best of 6 from 5 scores"):
        expected_best(scores, 6)


def test_pass_at_k():
    assert pass_at_k(10, 3, 5) == pytest.approx(0.916667, abs=1e-6)
    assert pass_at_k(4, 0, 2) == 0 and pass_at_k(4, 3, 2) == 1


def test_what_is_kept():
    responses, scores = ["a", "b", "a", "c", "d"], [1.0, None, 5.0, 1.0, 0.5]
    assert kept(responses, scores) == [0]
    assert kept(responses, scores, most=10) == [0, 3, 4]
    assert kept(responses, scores, most=10, least=0.6) == [0, 3]
    assert kept(responses, scores, least=2.0) == []
