"""When proxy and gold part: the trend by hand, no alarm on honest series, one where gold falls, and the drawing."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from PIL import Image

from posttrain.evals.overoptimisation import WINDOW, parted, trend
from posttrain.evals.plots import gold_png

STEPS = 80


def alarm(proxy, gold):
    """The number of measurements after which the first alarm comes, None without."""
    return next((k for k in range(1, len(gold) + 1) if parted(proxy[:k], gold[:k])), None)


def honest(draw):
    """Proxy and gold that learn at any speed, stop anywhere, and share noise: what a sample is worth, it is worth to both."""
    t = np.arange(STEPS) / STEPS
    curve = 1 - np.exp(-draw.uniform(0.5, 6) * t)
    gold = np.minimum(curve, draw.uniform(0.3, 1.0)) * draw.uniform(0.2, 1.0)
    proxy = (curve + draw.uniform(0, 1) * t) * draw.uniform(0.5, 4)
    shared = draw.normal(size=STEPS)
    return proxy + 0.1 * (shared + draw.normal(size=STEPS)), gold + 0.05 * (shared + draw.normal(size=STEPS))


def over_optimised(draw, depth):
    """Both rise; then gold falls by ``depth`` times its noise while the proxy rises on."""
    t = np.arange(STEPS) / STEPS
    gold = np.where(t < 0.4, t, 0.4 - depth * 0.05 * (t - 0.4) / 0.6)
    return 2 * t + 0.1 * draw.normal(size=STEPS), gold + 0.05 * draw.normal(size=STEPS)


def test_the_trend_by_hand():
    """Slope 0.8, squared errors 1.8 with 2 degrees of freedom, 5 = sum (i - mean)^2."""
    assert trend([1, 3, 2, 4]) == pytest.approx(0.8 / math.sqrt(1.8 / 2 / 5)) == -trend([4, 2, 3, 1])
    assert trend([10, 30, 20, 40]) == pytest.approx(trend([1, 3, 2, 4]))
    assert trend([1, 2, 3]) == math.inf == -trend([3, 2, 1]) and trend([2, 2, 2, 2]) == trend([1, 2]) == 0.0
    at_one_blow = [1.0] * 10 + [0.0] * 10
    assert trend(at_one_blow) == pytest.approx(-7.39, abs=0.01)  # r^2 is 0.752


def test_honest_learning_gives_no_alarm():
    draw = np.random.default_rng(0)
    assert [alarm(*honest(draw)) for _ in range(200)] == [None] * 200


def test_where_they_part_there_is_an_alarm_and_not_before():
    draw = np.random.default_rng(1)
    found = [alarm(*over_optimised(draw, 16)) for _ in range(100)]
    assert None not in found and min(found) > 0.4 * STEPS
    assert sorted(found)[50] < 0.4 * STEPS + 1.2 * WINDOW  # the usual one comes within about a window of the turn


def test_both_conditions_are_needed():
    rises, falls = list(range(20)), list(range(20, 0, -1))
    assert (
        parted(rises, falls) and not parted(rises, rises) and not parted(falls, falls) and not parted([1] * 20, falls)
    )
    assert not parted(rises[1:], falls[1:])  # fewer than the window
    assert parted([*falls, *rises], [*rises, *falls]) and parted(rises[:14], falls[:14], window=14)


def rows(kl, proxy, gold):
    return [
        {"step": k, "kl/mean": d, "reward/mean": p, "gold/reward": g}
        for k, (d, p, g) in enumerate(zip(kl, proxy, gold, strict=True))
    ]


def test_both_are_drawn_over_the_distance():
    measured = rows([-0.01, 1, 2, 4, 6], [0, 1, 2, 3, 4], [0, 0.5, 0.6, 0.4, 0.1])
    image = gold_png([*measured, {"step": 9, "loss/total": 1.0}])
    assert image == gold_png(measured) and Image.open(io.BytesIO(image)).size == (600, 380)
    assert image != gold_png(measured[:4])
    assert gold_png(measured[:1]) is None and gold_png([{"step": 0, "reward/mean": 1.0}]) is None
