from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from posttrain.errors import ConfigError
from posttrain.evals.statistics import (
    Interval,
    cluster_bootstrap,
    excludes_zero,
    kendall,
    paired_bootstrap,
    spearman,
)


def test_two_clusters_by_hand():
    # resampled means are 0, 1/2, 1 with probability 1/4, 1/2, 1/4
    assert cluster_bootstrap([0.0, 1.0], ["a", "b"]) == Interval(0.5, 0.0, 1.0, 2)
    middle = cluster_bootstrap([0.0, 1.0], ["a", "b"], level=0.4)
    assert (middle.low, middle.high) == (0.5, 0.5)


def test_equals_all_resamples_of_unequal_clusters():
    clusters = {"a": [1.0, 2.0, 6.0], "b": [0.0], "c": [4.0, 5.0], "d": [2.5]}
    values = [v for row in clusters.values() for v in row]
    names = [name for name, row in clusters.items() for _ in row]
    exact = [np.mean(list(itertools.chain(*draw))) for draw in itertools.product(clusters.values(), repeat=4)]
    low, high = np.quantile(exact, [0.05, 0.95])
    got = cluster_bootstrap(values, names, level=0.9, resamples=40_000)
    assert got.mean == pytest.approx(20.5 / 7) and got.n == 4
    assert got.low == pytest.approx(low, abs=0.06) and got.high == pytest.approx(high, abs=0.06)


def test_golden_numbers_for_a_seed():
    values = np.sin(np.arange(24.0))
    got = cluster_bootstrap(values, np.arange(24) // 3, seed=7)
    again = cluster_bootstrap(values.tolist(), [str(i // 3) for i in range(24)], seed=7)
    assert got == again
    assert (got.mean, got.low, got.high) == pytest.approx((0.040825242062, -0.217290997879, 0.284276460843))
    assert cluster_bootstrap(values, np.arange(24) // 3, seed=8).low != got.low


def test_coverage_and_what_ignoring_clusters_would_cost():
    rng = np.random.default_rng(0)
    names = np.repeat(np.arange(40), 4)
    covered, naive, runs = 0, 0, 400
    for seed in range(runs):
        values = np.repeat(rng.normal(size=40), 4) + 0.5 * rng.normal(size=160)
        inside = cluster_bootstrap(values, names, resamples=500, seed=seed)
        covered += inside.low <= 0 <= inside.high
        alone = cluster_bootstrap(values, range(160), resamples=500, seed=seed)
        naive += alone.low <= 0 <= alone.high
    assert 0.91 <= covered / runs <= 0.97
    assert naive / runs < 0.8


def test_pairing_removes_what_prompts_share():
    rng = np.random.default_rng(1)
    ease = 3 * rng.normal(size=50)
    a, b = ease + 0.3 + 0.2 * rng.normal(size=50), ease + 0.2 * rng.normal(size=50)
    paired = paired_bootstrap(a, b, range(50))
    assert paired.mean == pytest.approx(np.mean(a - b))
    assert excludes_zero(paired) and paired.high - paired.low < 0.2
    alone = cluster_bootstrap(a, range(50))
    assert alone.high - alone.low > 1


def test_excludes_zero_wants_one_side_and_enough_clusters():
    assert excludes_zero(Interval(1.0, 0.1, 2.0, 6)) and excludes_zero(Interval(-1.0, -2.0, -0.1, 30))
    assert not excludes_zero(Interval(1.0, -0.1, 2.0, 30))
    assert not excludes_zero(Interval(1.0, 0.0, 2.0, 30))
    assert not excludes_zero(Interval(1.0, 0.1, 2.0, 5))
    assert not excludes_zero(Interval(1.0, 0.1, 2.0, 7, level=0.99))
    assert excludes_zero(Interval(1.0, 0.1, 2.0, 8, level=0.99))


def test_one_cluster_has_no_interval():
    got = cluster_bootstrap([1.0, 2.0], ["a", "a"])
    assert got == Interval(1.5, -math.inf, math.inf, 1) and not excludes_zero(got)


@pytest.mark.parametrize(
    ("values", "clusters", "options", "message"),
    [
        ([], [], {}, "expected \\[N\\]"),
        ([1.0, math.nan], [0, 1], {}, "values\\[1\\] is nan"),
        ([1.0, 2.0], [0], {}, "1 cluster names for 2 values"),
        ([[1.0]], [0], {}, "shape \\(1, 1\\)"),
        ([1.0], [0], {"level": 95}, "level 95"),
        ([1.0], [0], {"resamples": 0}, "0 resamples"),
    ],
)
def test_refusals(values, clusters, options, message):
    with pytest.raises(ConfigError, match=message):
        cluster_bootstrap(values, clusters, **options)


def test_paired_lengths_must_agree():
    with pytest.raises(ConfigError, match="2 values for a and 1 for b"):
        paired_bootstrap([1.0, 2.0], [1.0], [0, 1])


def test_rank_correlations_by_hand():
    assert spearman([1, 2, 3, 4], [10, 20, 40, 30]) == pytest.approx(0.8)
    assert kendall([1, 2, 3, 4], [10, 20, 40, 30]) == pytest.approx(4 / 6)
    assert spearman([1, 2, 3], [3, 2, 1]) == kendall([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # ties: ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4; 5 concordant of 6 pairs, 1 tied in a
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert kendall([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(5 / math.sqrt(5 * 6))
    assert math.isnan(spearman([1, 1], [1, 2])) and math.isnan(kendall([1, 1], [1, 2]))
    with pytest.raises(ConfigError, match="at least 2"):
        spearman([1.0], [1.0])
