"""Calibration, over-optimisation, style matrices, correlations and edits on numbers worked out by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from posttrain.data.lengths import balance_lengths, length_gap
from posttrain.errors import ConfigError, DataError
from posttrain.evals.bias import EDITS, STYLES, auroc, edit_effects, within_correlation
from posttrain.evals.calibration import (
    Bin,
    calibration_bins,
    calibration_error,
    fit_temperature,
    negative_log_likelihood,
    pair_bins,
)
from posttrain.evals.overoptimisation import best_of_n, curve, fit_best_of_n_law, fit_reinforcement_law
from posttrain.evals.reward_bench import SECTIONS, section_scores, style_matrix, style_summary, styled_rows, total_score
from posttrain.evals.statistics import spearman
from posttrain.rewards.selection import expected_best

from .test_reward import ranking


def test_calibration_error_by_hand():
    bins = calibration_bins([0.55, 0.65, 0.9, 0.95, 0.6], [1, 0, 1, 1, 1])
    assert calibration_error(bins) == pytest.approx(0.33)
    assert bins[0] == Bin(0.5, 0.6, 2, pytest.approx(0.575), 1.0)
    assert [b.count for b in bins] == [2, 1, 1, 1]  # (0.8, 0.9] holds 0.9
    assert calibration_error(calibration_bins([0.0, 1.0], [0, 1])) == 0
    with pytest.raises(ConfigError, match="outside"):
        calibration_bins([1.2], [1])


def test_temperature_is_the_one_that_made_the_labels():
    rng = np.random.default_rng(0)
    true = rng.normal(size=20000) * 1.5
    won = rng.random(20000) < 1 / (1 + np.exp(-true))
    gaps = np.where(won, 1, -1) * np.abs(true) * np.sign(true) * 3.0  # overconfident by three
    found = fit_temperature(gaps)
    assert found == pytest.approx(3.0, rel=0.05)
    best = negative_log_likelihood(gaps, found)
    assert best < negative_log_likelihood(gaps, found * 1.05) and best < negative_log_likelihood(gaps, found / 1.05)
    before, after = (calibration_error(pair_bins(gaps, t)) for t in (1.0, found))
    assert before > 0.1 and after < 0.02
    assert fit_temperature([-1.0, -2.0, 0.5]) == pytest.approx(1e4)  # worse than chance: as flat as can be
    assert negative_log_likelihood([0.0, 0.0]) == pytest.approx(math.log(2))
    with pytest.raises(ConfigError, match="at least one pair"):
        fit_temperature([])


def test_best_of_n_is_the_mean_over_all_subsets():
    proxy, gold = [0.3, -1.0, 2.0, 2.0, 0.7], [1.0, 5.0, 0.0, 4.0, -2.0]
    for n in range(1, 6):
        picks = []
        for subset in itertools.combinations(range(5), n):
            top = max(proxy[i] for i in subset)
            picks.append(np.mean([gold[i] for i in subset if proxy[i] == top]))
        assert best_of_n([proxy], [gold], [n])[0, 0] == pytest.approx(np.mean(picks), abs=1e-12)
        assert best_of_n([proxy], [proxy], [n])[0, 0] == pytest.approx(expected_best(proxy, n), abs=1e-12)
    with pytest.raises(ConfigError, match="best of 6 from 5"):
        best_of_n([proxy], [gold], [6])


def test_a_curve_and_the_laws_that_made_it():
    rng = np.random.default_rng(1)
    gold = rng.normal(size=(50, 64))
    rows = curve(gold + rng.normal(size=gold.shape), gold, [1, 2, 8, 64])
    assert [r["n"] for r in rows] == [1, 2, 8, 64] and rows[0]["kl"] == 0
    assert rows[1]["kl"] == pytest.approx(0.193147, abs=1e-6)
    golds = [r["gold"] for r in rows]
    assert golds == sorted(golds) and all(r["low"] <= r["gold"] <= r["high"] for r in rows)
    kl = np.array([0.0, 0.2, 0.6, 1.8, 4.5, 6.0])
    d = np.sqrt(kl)
    law = fit_best_of_n_law(kl, d * (1.2 - 0.4 * d))
    assert (law.alpha, law.beta, law.peak) == pytest.approx((1.2, 0.4, 1.5)) and law.error < 1e-12
    moved = d[1:]
    other = fit_reinforcement_law(kl, [0.0, *(moved * (0.8 - 0.3 * np.log(moved)))])
    assert (other.alpha, other.beta) == pytest.approx((0.8, 0.3))
    assert other.peak == pytest.approx(math.exp(0.8 / 0.3 - 1))
    assert fit_best_of_n_law(kl, d).peak == math.inf or fit_best_of_n_law(kl, d).beta < 1e-12
    with pytest.raises(ConfigError, match="two at least above 0"):
        fit_best_of_n_law([0.0, 1.0], [0.0, 1.0])


def test_rewardbench_weights():
    assert {name: sum(w.values()) for name, w in SECTIONS.items()} == {
        "Chat": 358,
        "Chat Hard": 456,
        "Safety": 740,
        "Reasoning": 984 * 2,
    }
    accuracy = {name: 0.5 for weights in SECTIONS.values() for name in weights} | {"math-prm": 1.0, "unknown": 0.0}
    found = section_scores(accuracy)
    assert found == {"Chat": 0.5, "Chat Hard": 0.5, "Safety": 0.5, "Reasoning": 0.75}
    assert total_score(found) == pytest.approx(0.5625)
    assert total_score(found | {"Prior Sets": 1.0}) == pytest.approx((2.25 + 0.5) / 4.5)
    with pytest.raises(ConfigError, match="no accuracy for Safety"):
        total_score({k: v for k, v in found.items() if k != "Safety"})
    assert section_scores({"alpacaeval-easy": 1.0}) == {}


def test_the_matrix_of_styles():
    # a model that likes only length: right when its answer is the longer one, a coin at equal style
    matrix = style_matrix([[1, 2, 3]] * 2, [[1, 2, 3]] * 2)
    assert matrix.tolist() == [[0.5, 0, 0], [1, 0.5, 0], [1, 1, 0.5]]
    assert style_summary(matrix) == {"hard": 0, "normal": 0.5, "easy": 1, "mean": 0.5}
    with pytest.raises(ConfigError, match="expected both"):
        style_matrix([[1, 2]], [[1]])
    assert styled_rows([ranking("a", "b")]) == []


def test_correlation_within_prompts_ignores_what_prompts_share():
    rng = np.random.default_rng(2)
    lengths = [rng.integers(1, 50, 4) + 1000 * k for k in range(60)]
    between = [1000.0 * k + rng.normal(size=4) for k in range(60)]
    assert spearman(np.concatenate(between), np.concatenate(lengths)) > 0.9
    found = within_correlation(between, lengths)
    assert found is not None and abs(found.mean) < 0.2 and found.low < 0 < found.high and found.n == 60
    same = within_correlation([n * 2.0 for n in lengths], lengths)
    assert same is not None and same.mean == pytest.approx(1) and same.low == pytest.approx(1)
    assert within_correlation([[1.0, 1.0]], [[1, 2]]) is None


def test_counts_of_style():
    text = "# Heading\n- one\n2. two\n**bold** sorry!\n"
    assert {name: count(text) for name, count in STYLES.items()} == {
        "length": len(text),
        "lists": 2,
        "bold and headings": 2,
        "exclamation marks": 1,
        "question marks": 0,
        "apologies": 1,
    }


def test_edits_change_form_and_effects_are_in_deviations():
    assert EDITS["format: a list"]("It rained. We stayed in!") == "- It rained.\n- We stayed in!"
    assert all(edit("Yes.") != "Yes." and "Yes." in edit("Yes.") for edit in EDITS.values())
    rows = edit_effects([0.0, 2.0], {"up": [1.0, 3.0], "mixed": [None, 1.0]}, ["p", "q"])
    assert rows[0] | {"low": 1.0, "high": 1.0} == {
        "edit": "up", "mean": 1.0, "low": 1.0, "high": 1.0, "n": 2, "better": 1.0, "skipped": 0
    }  # fmt: skip
    assert (rows[1]["mean"], rows[1]["better"], rows[1]["skipped"]) == (-1.0, 0.0, 1)
    with pytest.raises(ConfigError, match="don't vary"):
        edit_effects([1.0, 1.0], {}, ["p", "q"])


def test_auroc_counts_pairs():
    assert auroc([1.0, 2.0], [2.0, 3.0]) == pytest.approx((1 + 1 + 0.5 + 1) / 4)
    assert auroc([0.0], [1.0]) == 1 and auroc([1.0], [0.0]) == 0


def test_balanced_pairs_tell_nothing_by_length():
    rng = np.random.default_rng(3)
    examples = []
    for _ in range(300):
        short, long = sorted(rng.choice(np.arange(3, 60), 2, replace=False).tolist())
        texts = ["a" * long, "b" * short] if rng.random() < 0.8 else ["a" * short, "b" * long]
        examples.append(ranking(*texts))
    pairs, report = balance_lengths(examples, seed=1)
    assert report.pairs == 300 and report.kept == len(pairs) and report.longer_before > 0.7
    assert report.longer_after == 0.5
    gaps = np.array([length_gap(p) for p in pairs])
    small = np.abs(gaps) <= np.median(np.abs(gaps))
    assert abs((gaps[small] > 0).mean() - 0.5) < 0.1  # not only over all
    assert balance_lengths(examples, seed=1)[0] == pairs != balance_lengths(examples, seed=2)[0]
    (alone,), _ = balance_lengths([ranking("aa", "bb")])
    assert [r.rank for r in alone.responses] == [0, 1]
    with pytest.raises(DataError, match="no pair is left"):
        balance_lengths([ranking("aaa", "b")])
