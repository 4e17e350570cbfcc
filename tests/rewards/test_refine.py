"""Where a model and a judge disagree, and the rows that are made of it."""

from __future__ import annotations

import math

import pytest

from posttrain.errors import ConfigError
from posttrain.rewards.refine import (
    agreement,
    as_pair,
    confirmed,
    disagreements,
    from_scorer,
    next_rows,
    noisy,
    spread_rows,
)
from posttrain.rewards.trained import said
from posttrain.types import Example, Message


def asked(prompt: str, *answers: str) -> Example:
    return Example(prompt=(Message(role="user", content=prompt),), responses=tuple(said(a) for a in answers))


longer = from_scorer(lambda prompt, answer: len(answer), temperature=0.01)


def test_what_surprises_most_comes_first():
    rows = [asked("p", "a", "bbb"), asked("q", "cc", "d", "cc")]
    found = disagreements(rows, [[2.0, 0.0], [0.1, 0.0, 0.1]], longer)
    assert [(c.example, c.a, c.b) for c in found[:1]] == [(0, 0, 1)]
    wrong = found[0]
    assert not wrong.agrees and wrong.judge < 1e-9
    assert wrong.model == pytest.approx(1 / (1 + math.exp(-2)))
    assert wrong.surprise == pytest.approx(-math.log(1 - wrong.model), abs=1e-6)
    assert all(c.agrees for c in found[1:]) and len(found) == 3  # equal texts are no pair
    assert agreement(rows, found) == pytest.approx(2 / 3)


def test_the_closest_and_the_farthest_are_asked_by_turns():
    one = asked("p", "a", "bb", "ccc", "dddd")
    asked_for = [(c.a, c.b) for c in disagreements([one], [[0.0, 1.0, 3.0, 7.0]], lambda *_: 0.9, pairs_per_prompt=2)]
    assert sorted(asked_for) == [(0, 1), (0, 3)]
    with pytest.raises(ConfigError, match="4 responses and 2 scores"):
        disagreements([one], [[0.0, 1.0]], longer)


def test_next_rows_are_ranked_as_the_judge_does_and_hold_what_was_right():
    rows = [asked(f"p{k}", "a", "bbb") for k in range(8)]
    scores = [[1.0 + k, 0.0] for k in range(4)] + [[0.0, 1.0]] * 4
    found = disagreements(rows, scores, longer)
    made = next_rows(rows, found, 4)
    assert [e.prompt[0].content for e in made[:3]] == ["p3", "p2", "p1"]
    assert len(made) == 4 and all([r.text for r in e.responses] == ["bbb", "a"] for e in made)
    assert all([r.rank for r in e.responses] == [0, 1] and e.meta["better"] > 0.99 for e in made)
    assert len(next_rows(rows, found, 100)) == 8
    agreed = [c for c in found if c.agrees]
    assert len(next_rows(rows, agreed, 3)) == 3
    tied = disagreements(rows, scores, lambda *_: 0.5)
    assert next_rows(rows, tied, 5) == [] and all(c.agrees for c in tied)
    with pytest.raises(ConfigError, match="decided none of 8 pairs"):
        agreement(rows, tied)
    assert as_pair(rows[0], found[0]).meta["better"] == pytest.approx(1)


def test_only_disagreements_said_twice_stay():
    rows = [asked(f"p{k}", "a", "bbb") for k in range(4)]
    found = disagreements(rows, [[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 2.0]], longer)
    heard = []

    def second(prompt, a, b):
        heard.append((prompt, a, b))
        return 0.9 if prompt == "p0" else 0.2

    kept = confirmed(rows, found, second)
    assert sorted(heard) == [("p0", "bbb", "a"), ("p1", "bbb", "a")]  # in the other order, and of disagreements alone
    assert sorted(c.example for c in kept) == [0, 2, 3]
    assert [c.example for c in kept if not c.agrees] == [0]
    assert confirmed(rows, found, lambda *_: 0.5) == [c for c in found if c.agrees]


def test_rows_of_one_prompt_are_bounded():
    rows = [asked("p", "a", "bb", "ccc"), asked("q", "a", "bb")]
    found = disagreements(rows, [[5.0, 3.0, 0.0], [1.0, 0.0]], longer)
    assert [len(next_rows(rows, found, 10, per_prompt=n)) for n in (1, 2, None)] == [2, 3, 4]
    (first, *_) = next_rows(rows, found, 10, per_prompt=1)
    assert [r.text for r in first.responses] == ["ccc", "a"]  # the most surprising of them


def test_spread_rows_hold_as_much_agreement_as_there_is():
    rows = [asked(f"p{k}", "a", "bbb") for k in range(9)]
    found = disagreements(rows, [[3.0 - k, 0.0] for k in range(9)], longer)  # wrong in three of nine
    assert [e.prompt[0].content for e in spread_rows(rows, found, 3)] == ["p0", "p3", "p6"]
    assert len(spread_rows(rows, found, 20)) == 9 and spread_rows(rows, [], 4) == []
    assert all([r.text for r in e.responses] == ["bbb", "a"] for e in spread_rows(rows, found, 20))


def test_a_noisy_judge_errs_on_pairs_whatever_their_order():
    judge = noisy(longer, 0.5, lambda key: 0.0 if "p1" in key else 0.9)
    assert judge("p1", "a", "bbb") == pytest.approx(1) and judge("p1", "bbb", "a") == pytest.approx(0)
    assert judge("p2", "a", "bbb") == pytest.approx(0)
