"""Curating pairs for reward models, by hand on a few rows."""

from __future__ import annotations

from collections import Counter

import pytest

from posttrain.data.curation import (
    Domain,
    binarised,
    contaminated,
    decontaminated,
    first_pass,
    mean_rating,
    patch_pairs,
    top_of_domains,
)
from posttrain.data.formats import parse_rows
from posttrain.errors import ConfigError, DataError
from posttrain.types import Example, Message, Response


def said(text: str, **more) -> Response:
    return Response(messages=(Message(role="assistant", content=text),), **more)


def asked(prompt: str, *responses: Response, kind: str = "") -> Example:
    return Example(prompt=(Message(role="user", content=prompt),), responses=responses, kind=kind)


ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")


def test_ultrafeedback_is_the_mean_of_its_ratings_and_binarised():
    row = {
        "instruction": "What is 2 + 3?",
        "completions": [
            {
                "response": text,
                "overall_score": overall,
                "annotations": {name: {"Rating": str(r)} for name, r in zip(ASPECTS, ratings, strict=True)},
            }
            for text, overall, ratings in (
                ("5", 1, (5, 5, 4, 5)), ("6", 9, (1, 2, 1, 1)), ("five", 8, (4, 4, 4, 4)), ("7", 8, (5, 5, 4, 5))
            )
        ],
    }  # fmt: skip
    (example,) = parse_rows(row, "f", 1)
    example = mean_rating(example)
    assert [r.score for r in example.responses] == [4.75, 1.25, 4.0, 4.75]
    only = mean_rating(example, ["honesty", "truthfulness"])
    assert [r.score for r in only.responses] == [5.0, 1.5, 4.0, 5.0]
    drawn = Counter()
    for seed in range(200):
        (pair,), ties = binarised([example], seed=seed)
        assert ties == 0 and [r.rank for r in pair.responses] == [0, 1]
        drawn[pair.responses[0].text, pair.responses[1].text] += 1
    assert set(drawn) == {(a, b) for a in ("5", "7") for b in ("6", "five")} and min(drawn.values()) > 20
    assert binarised([example], seed=3) == binarised([example], seed=3)
    assert {p.responses[1].text for s in range(30) for p in binarised([example], seed=s, least=1.0).examples} == {"6"}


def test_ties_are_counted_and_scores_are_needed():
    tied = asked("p", said("a", score=1.0), said("b", score=1.0))
    assert binarised([tied]) == ([], 1)
    with pytest.raises(DataError, match="1 of 2 responses have one"):
        binarised([asked("p", said("a", score=1.0), said("b"))])
    with pytest.raises(DataError, match=r"response 0 \(from 0\) has no taste"):
        mean_rating(asked("p", said("a", attributes={"smell": 1.0})), ["taste"])


def test_the_best_of_each_domain_less_offsets():
    rows = [asked(f"p{k}", kind="math" if k % 2 else "other") for k in range(20)]
    scores = [float(k) for k in range(20)]
    found = top_of_domains(rows, scores, {"math": Domain(share=0.3), "other": Domain(share=0.1)})
    assert [e.prompt[0].content for e in found.examples] == ["p15", "p17", "p18", "p19"]
    assert found.found == {"math": 10, "other": 10} and found.kept == {"math": 3, "other": 1}
    lowered = top_of_domains(
        rows,
        scores,
        {"math": Domain(share=0.1), "other": Domain(share=0.1)},
        source=lambda e: "air" if e.prompt[0].content in ("p18", "p19") else "",
        offsets={"air": 3.5},
    )
    assert [e.prompt[0].content for e in lowered.examples] == ["p16", "p17"]
    one_bag = {"": Domain(share=0.5)}
    tied = top_of_domains([asked("a"), asked("b")], [1.0, 1.0], one_bag)
    assert [e.prompt[0].content for e in tied.examples] == ["a"]
    with pytest.raises(ConfigError, match="in the domain 'poetry'"):
        top_of_domains([asked("p", kind="poetry")], [1.0], {"math": Domain(share=1)})


def test_a_first_pass_keeps_what_a_first_model_already_orders():
    rows = [asked(f"p{k}", said("a", rank=0), said("b", rank=1), said("c", rank=1), kind=f"k{k}") for k in range(3)]
    scores = [[2.0, 1.0, 0.0], [2.0, 1.0, 2.0], [0.0, 1.0, 2.0]]
    assert [e.kind for e in first_pass(rows, scores).examples] == ["k0"]
    kept, out = first_pass(rows, scores, only=lambda e: e.kind == "k1")
    assert [e.kind for e in kept] == ["k0", "k2"] and out == 1


BENCH = [
    "A farmer has seventeen sheep and all but nine of them run away at night, how many are left in the morning?",
    "Name the capital of France and describe its river in two words.",
    "Sort: b a",
]


def test_planted_items_are_found_and_others_are_not():
    planted = asked("Hello! a FARMER has   seventeen sheep, and all but nine of them run away at night. How many then?")
    short = asked("name the capital of France, and describe its river!")
    whole = asked("sort: B, A")
    other = [asked("A farmer has seventeen cows and all of them stay."), asked("Sort: c d"), asked("Name two rivers.")]
    rows = [planted, *other, short, whole]
    found = contaminated(rows, BENCH)
    assert [(o.row, o.item) for o in found] == [(0, 0), (4, 1), (5, 2)]
    assert found[2].share == 1.0 and 0 < found[0].share < 1
    kept, out = decontaminated(rows, BENCH)
    assert kept == other and out == 3
    assert decontaminated([planted], BENCH, least=0.9).examples == [planted]
    with pytest.raises(ConfigError, match="expected the short ones shorter"):
        contaminated(rows, BENCH, n=4)


def test_patches_put_the_clean_answer_above_the_hacked_one():
    prompts = [asked("p", kind="math"), asked("q", kind="math")]
    first, second = patch_pairs(prompts, ["a", "b"], lambda prompt, answer: f"{answer} great {prompt}!")
    assert [(r.text, r.rank) for r in first.responses] == [("a", 0), ("a great p!", 1)]
    assert second.responses[1].text == "b great q!" and second.kind == "math"
    assert patch_pairs(prompts[:1], ["a"], lambda *_: "x", domain="chat")[0].kind == "chat"
    with pytest.raises(ConfigError, match="leaves answer 0"):
        patch_pairs(prompts[:1], ["a"], lambda _, answer: answer)
