"""The paired test for few pairs, and Holm's correction."""

from __future__ import annotations

import math

import numpy as np
import pytest

from posttrain.errors import ConfigError
from posttrain.evals.statistics import holm, paired_bootstrap, paired_test, student_quantile


@pytest.mark.parametrize(
    ("level", "freedom", "expected"),  # from printed tables of Student's t
    [
        (0.95, 1, 12.7062),
        (0.95, 2, 4.3027),
        (0.95, 3, 3.1824),
        (0.95, 9, 2.2622),
        (0.99, 5, 4.0321),
        (0.9, 30, 1.6973),
        (0.95, 120, 1.9799),
    ],
)  # fmt: skip
def test_student_quantiles_are_those_of_the_tables(level: float, freedom: int, expected: float):
    assert student_quantile(level, freedom) == pytest.approx(expected, abs=1e-4)


def test_few_pairs_widen_the_interval_and_many_do_not():
    draw = np.random.default_rng(0)
    for count, factor in ((3, 2.69), (6, 1.44), (50, 1.036)):
        a, b = draw.normal(size=(2, count))
        plain = paired_bootstrap(a, b, range(count))
        wide, _ = paired_test(a, b)
        assert wide.mean == plain.mean
        assert wide.high - wide.mean == pytest.approx(factor * (plain.high - plain.mean), rel=5e-3)
        assert wide.mean - wide.low == pytest.approx(factor * (plain.mean - plain.low), rel=5e-3)


def test_p_is_below_five_per_cent_just_when_the_95_per_cent_interval_leaves_zero_out():
    draw = np.random.default_rng(1)
    outside = []
    for shift in np.linspace(0, 2, 30):
        interval, p = paired_test(draw.normal(shift, 1, size=8), np.zeros(8))
        outside.append(interval.low > 0 or interval.high < 0)
        assert outside[-1] == (p < 0.05), (shift, interval, p)
    assert 5 < sum(outside) < 28


@pytest.mark.parametrize(("count", "fewest"), [(3, 0.92), (5, 0.92), (12, 0.92)])
def test_a_95_per_cent_interval_covers_the_truth_about_that_often(count: int, fewest: float):
    draw = np.random.default_rng(2)
    covered = 0
    for _ in range(400):
        interval, _ = paired_test(draw.normal(0.3, 1, size=count), np.zeros(count), resamples=400)
        covered += interval.low <= 0.3 <= interval.high
    assert fewest <= covered / 400 <= 0.99


def test_pairs_that_say_nothing_of_their_spread_show_nothing():
    assert paired_test([1.0], [0.0])[0].high == math.inf and paired_test([1.0], [0.0])[1] == 1.0
    interval, p = paired_test([1.0, 2.0, 3.0], [0.5, 1.5, 2.5])
    assert (interval.low, interval.high, p) == (-math.inf, math.inf, 1.0)
    interval, p = paired_test([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (interval.low, interval.mean, interval.high, p) == (0.0, 0.0, 0.0, 1.0)
    interval, p = paired_test(np.full(6, 2.0), np.ones(6))
    assert interval.low == interval.high == 1.0 and p == 1 / 4000


def test_holm_by_hand():
    # sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1, then the running maximum
    assert holm([0.04, 0.01, 0.03, 0.02]).tolist() == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]).tolist() == [1.0, 1.0] and holm([0.2]).tolist() == [0.2]
    with pytest.raises(ConfigError, match="between 0 and 1"):
        holm([0.2, 1.2])
    with pytest.raises(ConfigError, match="N of at least 1"):
        holm([])
