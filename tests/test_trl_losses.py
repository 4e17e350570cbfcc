"""The comparison of losses with TRL's: our values are still those on the page, and each difference is explained."""

from __future__ import annotations

import json

import pytest
import torch
from benchmarks import trl_losses
from benchmarks.trl_losses import CASES, PAGE, RESULTS, given, made_up, values

FOUND = json.loads(RESULTS.read_text())


def test_the_pairs_that_are_compared_are_of_all_lengths():
    data = made_up()
    pairs = given(data).pairs
    assert pairs.chosen_len.tolist() == [2, 2, 5, 5, 2, 3] and pairs.rejected_len.tolist() == [5, 2, 6, 5, 6, 1]
    assert pairs.chosen.dtype == torch.float64 and data["input_ids"].shape == (12, 9)
    assert given(data).labelled.matched.tolist() == [True] * 12 + [False] * 12


@pytest.mark.parametrize("case", [case for case in CASES if case.loss], ids=lambda case: case.name)
def test_our_value_is_the_one_on_the_page(case):
    row = next(row for row in FOUND["cases"] if row["name"] == case.name)
    value, gradient = values(case.loss, made_up())
    assert value == pytest.approx(row["ours"], abs=1e-12)
    assert bool(gradient.isfinite().all()) and float(gradient.abs().max()) > 0


def test_the_page_says_what_was_found():
    assert trl_losses.page(FOUND) == PAGE.read_text(), "run: python -m benchmarks.trl_losses page"
    text = PAGE.read_text()
    assert "| sigmoid | " in text and "| equal |  |  |" in text


def test_a_difference_without_a_reason_is_refused():
    rows = [row | ({"ours": row["ours"] + 1} if row["name"] == "sigmoid" else {}) for row in FOUND["cases"]]
    with pytest.raises(AssertionError, match=r"sigmoid: 1.00e\+00 apart, and the reason given is ''"):
        trl_losses.page(FOUND | {"cases": rows})
