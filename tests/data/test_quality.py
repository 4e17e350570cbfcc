from __future__ import annotations

import json
import math
import os
import random
import tracemalloc
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.checking import check, held_out, overlaps
from posttrain.data.quality import FileReport, Survey, Tally, by_reason, shape, survey
from posttrain.data.tally import Pair, compared_pairs, lengths
from posttrain.data.views import label_correlation
from posttrain.errors import DataError
from posttrain.types import Example, Message, Preference, Response, Step, Target

REAL = os.environ.get("POSTTRAIN_REAL_DATA", "")


def user(text: str) -> tuple[Message, ...]:
    return (Message(role="user", content=text),)


def answer(text: str, **feedback) -> Response:
    return Response(messages=(Message(role="assistant", content=text),), **feedback)


def pair(prompt: str, better: str, worse: str, row: int = 1, file: str = "a.jsonl") -> Example:
    return Example(prompt=user(prompt), responses=(answer(better, rank=0), answer(worse, rank=1)), file=file, row=row)


def found(report: FileReport) -> list[tuple[str, int, str]]:
    return [(f"{f.level}: {f.text}", f.count, f.first) for f in report.findings]


# ---------------------------------------------------------------------------- figures


def test_a_report_in_numbers():
    rows = [
        pair("one two three", "a b", "a b c", 1),
        pair("one two", "a b c d", "a", 2),
        pair("one", "x y", "y x", 4),
    ]
    report = survey(rows, "a.jsonl")
    assert (report.source, report.rows, report.examples, report.clean) == ("a.jsonl", 3, 3, True)
    assert report.shapes == {"pairs": 3} and report.findings == []
    prompt, response = report.words["prompt"], report.words["response"]
    assert (prompt.count, prompt.mean, prompt.half, prompt.p95, prompt.longest) == (3, 2.0, 2, 3, 3)
    assert prompt.bars == ((1, 1, 1), (2, 3, 2))
    assert (response.count, response.longest) == (6, 4) and math.isclose(response.mean, 14 / 6)
    assert report.turns is not None and report.turns.bars == ((2, 3, 3),)
    compared = report.compared
    assert compared is not None
    # shorter, longer, equal: (1 + 1/2) / 3; tau (1 - 1) / sqrt(3 * 2)
    assert (compared.pairs, compared.longer_better, compared.tau) == (3, 0.5, 0.0)
    assert (compared.words_better, compared.words_worse) == pytest.approx((8 / 3, 2.0))


def test_lengths_have_exact_percentiles():
    counts = Counter(dict.fromkeys(range(1, 101), 1))
    result = lengths(counts)
    assert result is not None
    assert (result.mean, result.half, result.p95, result.p99, result.longest) == (50.5, 50, 95, 99, 100)
    assert result.bars == ((1, 1, 1), (2, 3, 2), (4, 7, 4), (8, 15, 8), (16, 31, 16), (32, 63, 32), (64, 127, 37))
    assert lengths(Counter()) is None
    zero = lengths(Counter({0: 3, 5: 1}))
    assert zero is not None and zero.bars == ((0, 0, 3), (1, 1, 0), (2, 3, 0), (4, 7, 1))


@given(st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6)), min_size=2, max_size=5), min_size=1))
@settings(max_examples=60, deadline=None)
def test_lengths_compared_equal_the_view_s_correlation(rows: list[list[tuple[int, int]]]):
    rows = [row for row in rows if len({rank for rank, _ in row}) > 1]
    examples = [
        Example(prompt=user(f"{i}"), responses=tuple(answer("w " * n, rank=rank) for rank, n in row))
        for i, row in enumerate(rows)
    ]
    compared = survey(examples).compared
    if not examples:
        assert compared is None
        return
    expected = label_correlation(examples)
    assert compared is not None
    assert (compared.pairs, compared.longer_better) == (expected.pairs, pytest.approx(expected.longer_better))
    if math.isnan(expected.tau):
        assert compared.tau is None
    else:
        assert compared.tau == pytest.approx(expected.tau, abs=1e-12)


@pytest.mark.parametrize(
    "example, name",
    [
        (Example(prompt=user("p")), "prompts"),
        (Example(prompt=user("p"), target=Target(kind="number", answer="4")), "verifiable prompts"),
        (Example(prompt=user("p"), responses=(answer("a"),)), "demonstrations"),
        (pair("p", "a", "b"), "pairs"),
        (Example(prompt=user("p"), responses=tuple(answer(c, rank=0) for c in "abc")), "rankings of 3"),
        (Example(prompt=user("p"), responses=(answer("a", label=True),)), "labelled answers"),
        (Example(prompt=user("p"), responses=(answer("a", score=3.0), answer("b", score=1.0))), "rated answers"),
        (Example(prompt=user("p"), responses=(answer("a", attributes={"help": 3.0}),)), "rated answers"),
        (Example(prompt=user("p"), responses=(answer("a", steps=(Step(text="a", label=1),)),)), "labelled steps"),
        (
            Example(
                prompt=user("p"), responses=(answer("a"), answer("b")), preferences=(Preference(a=0, b=1, better=1),)
            ),
            "comparisons",
        ),
        (Example(prompt=user("p"), responses=(answer("a"), answer("b"))), "answers without feedback"),
    ],
)
def test_shapes(example: Example, name: str):
    assert shape(example) == name


# ---------------------------------------------------------------------------- what is compared


def test_pairs_of_ranks_scores_and_comparisons():
    ranked = Example(prompt=user("p"), responses=tuple(answer(str(r), rank=r) for r in (1, 0, 1)))
    assert list(compared_pairs(ranked)) == [Pair(1, 0, "", False), Pair(1, 2, "", False), Pair(0, 2, "", True)]
    scored = Example(prompt=user("p"), responses=(answer("a", score=1.0), answer("b", score=2.5)))
    assert list(compared_pairs(scored)) == [Pair(1, 0, "", False)]
    half = replace(scored, responses=(answer("a", score=1.0), answer("b")))
    assert list(compared_pairs(half)) == []
    votes = (
        Preference(a=0, b=1, better=1, by="x"),
        Preference(a=1, b=0, better=1, by="y"),
        Preference(a=1, b=0, better=0.75, by="z"),
        Preference(a=0, b=1, better=1, axis="safe"),
        Preference(a=0, b=1, better=0.5, axis="kind"),
    )
    voted = replace(scored, preferences=votes)
    assert list(compared_pairs(voted)) == [Pair(1, 0, "", False), Pair(0, 1, "safe", False), Pair(0, 1, "kind", True)]


def test_many_answers_cost_linear_time():
    responses = tuple(answer(f"{r}", rank=r) for r in range(33))
    many = Example(prompt=user("p"), responses=responses)
    assert list(compared_pairs(many)) == [Pair(r, r + 1, "", False) for r in range(32)]
    assert len(list(compared_pairs(replace(many, responses=responses[:32])))) == 32 * 31 / 2
    huge = Example(prompt=user("p"), responses=tuple(answer("w", rank=r) for r in range(20_000)))
    assert survey([huge]).compared is not None


# ---------------------------------------------------------------------------- duplicates and contradictions


def test_duplicates_exact_and_normalised():
    rows = [
        pair("What?", "yes", "no", 1),
        pair("Why?", "yes", "no", 2),
        pair("What?", "yes", "no", 3),
        pair(" what? ", "Yes", "no", 5),
        pair("What?", "maybe", "no", 6),
    ]
    report = survey(rows, "a.jsonl")
    assert report.duplicates == {
        "row, exactly": Tally(count=1, first="a.jsonl row 1", other="a.jsonl row 3"),
        "row, but for case and white space": Tally(count=2, first="a.jsonl row 1", other="a.jsonl row 3"),
        "prompt, exactly": Tally(count=2, first="a.jsonl row 1", other="a.jsonl row 3"),
        "prompt, but for case and white space": Tally(count=3, first="a.jsonl row 1", other="a.jsonl row 3"),
    }
    expected = "note: rows that repeat an earlier one, 1 of them exactly"
    assert found(report) == [(expected, 2, "a.jsonl row 3 repeats a.jsonl row 1")]
    assert report.clean


def test_the_same_two_answers_ordered_both_ways():
    rows = [
        pair("q", "a", "b", 1),
        pair("other", "b", "a", 2),
        pair("Q ", "b", "a", 3),
        pair("q", "b", "a", 4),
        pair("q", "A", "b", 5),  # another answer: case may be what is judged
        pair("q", "c", "a", 6),
    ]
    report = survey(rows, "a.jsonl")
    both = "fault: contradictions: the same two answers are ordered both ways"
    assert found(report)[0] == (both, 1, "a.jsonl row 1 and a.jsonl row 3")
    assert not report.clean


def test_annotators_of_one_row_may_disagree_and_axes_are_apart():
    votes = tuple(Preference(a=0, b=1, better=v, by=f"{v}") for v in (1.0, 0.0, 1.0))
    one = Example(prompt=user("q"), responses=(answer("a"), answer("b")), preferences=votes, row=1)
    safe = replace(one, preferences=(Preference(a=0, b=1, better=0, axis="safe"),), row=2)
    assert survey([one, safe]).clean
    assert not survey([one, replace(one, preferences=(Preference(a=1, b=0, better=1),), row=3)]).clean


def test_the_same_answer_labelled_both_ways():
    rows = [
        Example(prompt=user("q"), responses=(answer("a", label=True),), file="k.jsonl", row=1),
        Example(prompt=user("q"), responses=(answer("b", label=False),), file="k.jsonl", row=2),
        Example(prompt=user("Q"), responses=(answer("a", label=False),), file="k.jsonl", row=3),
    ]
    report = survey(rows)
    both = "fault: contradictions: the same answer is labelled both ways"
    assert found(report) == [(both, 1, "k.jsonl row 1 and k.jsonl row 3")]
    assert report.labels is not None and (report.labels.good, report.labels.bad) == (1, 2)
    assert (report.labels.words_good, report.labels.words_bad) == (1.0, 1.0)


# ---------------------------------------------------------------------------- findings


def test_labels_of_one_class_and_missing_labels():
    good = [Example(prompt=user(f"{i}"), responses=(answer("a", label=True),), row=i) for i in range(3)]
    text = "fault: every label is true: one class alone can't be learnt from"
    assert found(survey(good)) == [(text, 3, "")]
    bare = Example(prompt=user("q"), responses=(answer("a"),), file="k.jsonl", row=9)
    bad = Example(prompt=user("p"), responses=(answer("a", label=False),))
    report = survey([*good, bad, bare, replace(bare, row=10)])
    assert found(report)[0] == ("fault: answers without a label among labelled ones", 2, "k.jsonl row 9")


def test_scores_that_are_all_the_same_and_ties():
    rated = [Example(prompt=user(f"{i}"), responses=(answer("a", score=3.0),)) for i in range(2)]
    assert found(survey(rated)) == [("fault: every score is the same: they order nothing", 2, "")]
    other = Example(prompt=user("q"), responses=(answer("a", score=4.0),))
    assert survey([*rated, other]).clean
    tied = Example(prompt=user("q"), responses=(answer("a", rank=0), answer("b", rank=0)), file="a.jsonl", row=7)
    assert found(survey([tied])) == [("fault: rows whose answers are all tied", 1, "a.jsonl row 7")]


def test_a_better_answer_that_is_mostly_the_longer_one_is_a_note():
    rows = [pair(f"{i}", "w " * (2 if i < 75 else 1), "w " * (1 if i < 75 else 2)) for i in range(100)]
    text = "note: pairs; in 75% of them the better answer is the longer one"
    assert found(survey(rows)) == [(text, 100, "")]
    assert found(survey(rows[:99])) == []  # too few to say
    other = survey([pair(f"{i}", "w", "w w") for i in range(100)])
    assert found(other) == [("note: pairs; in 100% of them the better answer is the shorter one", 100, "")]


def test_mixed_shapes_are_a_note_and_nothing_at_all_is_a_fault():
    report = survey([pair("q", "a", "b"), Example(prompt=user("p"))])
    assert found(report) == [("note: shapes of rows in one source: pairs, prompts", 2, "")]
    assert found(survey([])) == [("fault: no row became an example", 0, "")]


def test_faulty_rows_are_counted_by_reason():
    errors = [
        DataError.at("a.jsonl", 3, "messages[0].role", "unknown role 'usr'", "did you mean 'user'?"),
        DataError.at("a.jsonl", 8, "messages[2].role", "unknown role 'bot'", "known: user"),
        DataError.at("a.jsonl", 9, "prompt", "empty text", "fill it in or remove the row"),
        DataError("a.jsonl: not a whole gzip file"),
        DataError.at("a.jsonl", 7, "chosen", "ends in \"x y\" and isn't 'a' or 'b'", "remove it"),
    ]
    reasons = by_reason(map(str, errors))
    assert reasons == {
        "'messages[N].role': unknown role '...'": Tally(count=2, first="a.jsonl row 3"),
        "'prompt': empty text": Tally(count=1, first="a.jsonl row 9"),
        "a.jsonl: not a whole gzip file": Tally(count=1),
        "'chosen': ends in '...' and isn't '...' or '...'": Tally(count=1, first="a.jsonl row 7"),
    }
    rows = [pair("q", "a", "b")]
    useless = {"identical answers": Tally(count=2, first="a.jsonl row 5")}
    found_ = Survey("a.jsonl")
    found_.add(rows[0])
    report = found_.report(rows=8, bad=reasons, useless=useless, allowed=4)
    assert [(f.level, f.count) for f in report.findings] == [("fault", n) for n in (2, 1, 1, 1, 2)]
    allowed = found_.report(rows=6, bad=reasons, allowed=5)
    assert allowed.clean and [(f.level, f.count) for f in allowed.findings] == [("note", n) for n in (2, 1, 1, 1)]


def test_a_report_is_json():
    rows = [pair("q", "a", "b"), Example(prompt=user("p"), responses=(answer("a", label=True),))]
    text = json.dumps(asdict(survey(rows)), allow_nan=False)
    assert json.loads(text)["shapes"] == {"pairs": 1, "labelled answers": 1}


# ---------------------------------------------------------------------------- several sources


def surveyed(source: str, prompts: list[str]) -> Survey:
    made = Survey(source)
    for i, prompt in enumerate(prompts, 1):
        made.add(Example(prompt=user(prompt), file=source, row=i))
    return made


def test_prompts_that_sources_share():
    train, test = surveyed("train.jsonl", ["a", "b", "B ", "c"]), surveyed("test.jsonl", ["x", "b", "c", "C"])
    more = surveyed("more.jsonl", ["c", "z"])
    one, two, three = overlaps([train, test, more])
    assert (one.a, one.b, one.prompts, one.rows_a, one.rows_b, one.leak) == ("train.jsonl", "test.jsonl", 2, 3, 3, True)
    assert (one.first_a, one.first_b) == ("train.jsonl row 2", "test.jsonl row 2")
    assert (two.b, two.prompts, two.leak) == ("more.jsonl", 1, False)
    assert (three.a, three.b, three.leak) == ("test.jsonl", "more.jsonl", True)
    assert overlaps([train, surveyed("far.jsonl", ["y"]), surveyed("none.jsonl", [])]) == []


@pytest.mark.parametrize(
    "source, expected",
    [
        ("heldout_rankings.jsonl", True),
        ("data/pairs__hh__test.jsonl.gz", True),
        ("dev.parquet", True),
        ("eval-set.csv", True),
        ("test/train.jsonl", False),
        ("contest.jsonl", False),
        ("develop.jsonl", False),
    ],
)
def test_held_out_is_told_by_the_name(source: str, expected: bool):
    assert held_out(source) == expected


# ---------------------------------------------------------------------------- cost


def test_memory_is_bounded_by_hashes():
    rng = random.Random(0)
    words = [f"word{i}" for i in range(1000)]

    def rows(count: int):
        for i in range(count):
            yield pair(
                f"{i} " + " ".join(rng.choices(words, k=50)), f"{i} " + " ".join(rng.choices(words, k=50)), "no", i
            )

    found_ = Survey("a.jsonl")
    for example in rows(1000):
        found_.add(example)
    tracemalloc.start()
    for example in rows(4000):
        found_.add(example)
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown / 4000 < 200  # bytes a row; the texts are 700


def test_the_report_takes_no_quadratic_time_on_a_long_text():
    long = Example(prompt=user("a b\n" * 250_000), responses=(answer("'x' 1; " * 150_000, label=True),))
    assert survey([long]).words["prompt"].longest == 500_000


# ---------------------------------------------------------------------------- real files


@pytest.mark.real_data
@pytest.mark.skipif(not REAL, reason="POSTTRAIN_REAL_DATA is not set")
def test_the_known_faults_of_the_hh_files_are_found():
    report = check(sorted(Path(REAL).glob("pairs__hh-*.jsonl.gz")))
    assert len(report.files) == 6
    phrases = ("identical answers", "the turns before the last differ", "the final answer is empty", "a Human turn")
    counts: Counter[str] = Counter()
    for file in report.files:
        for reason, tally in [*file.bad.items(), *file.useless.items()]:
            counts.update({phrase: tally.count for phrase in phrases if phrase in reason})
            assert f"{Path(file.source).name} row " in tally.first
        left_out = sum(t.count for t in [*file.bad.values(), *file.useless.values()])
        assert file.rows == file.examples + left_out
    assert [counts[phrase] for phrase in phrases] == [36, 17, 10, 2]
    assert not report.clean
