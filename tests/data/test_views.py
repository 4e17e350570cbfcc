from __future__ import annotations

import math

import pytest

from posttrain.data import demonstrations, label_correlation, parse_row, prompts, rankings
from posttrain.errors import DataError
from posttrain.types import Example, Message, Response


def pair(chosen="good", rejected="bad", row=1):
    return parse_row({"prompt": "p", "chosen": chosen, "rejected": rejected}, "f.jsonl", row)


def ranked(*answers, ranks=None):
    ranks = range(len(answers)) if ranks is None else ranks
    responses = [
        Response(messages=(Message(role="assistant", content=a),), rank=r) for a, r in zip(answers, ranks, strict=True)
    ]
    return Example(prompt=(Message(role="user", content="p"),), responses=tuple(responses))


def test_demonstrations_take_the_only_or_the_best_response():
    single = parse_row({"prompt": "p", "completion": "c"})
    backwards = ranked("worst", "best", "middle", ranks=[2, 0, 1])
    assert [e.responses[0].text for e in demonstrations([single, pair(), backwards])] == ["c", "good", "best"]


@pytest.mark.parametrize(
    ("example", "found"),
    [
        (
            parse_row({"prompt": "p"}, "f.jsonl", 4),
            "f.jsonl row 4, field 'responses': no response to imitate",
        ),
        (
            ranked("a", "b", ranks=[0, 0]),
            "example 0 (from 0), field 'responses': no single best response (ranks 0, 0)",
        ),
        (ranked("a", "b", ranks=[0, None]), "no single best response (ranks 0, none)"),
        (
            parse_row({"prompt": "p", "completions": ["a", "b"], "failures": ["rude", None]}, "f.jsonl", 4),
            "f.jsonl row 4, field 'failures': the response to imitate is labelled a failure ('rude')",
        ),
        (Example(prompt=()), "field 'prompt': no turns"),
        (
            Example(prompt=(Message(role="assistant", content="a"),)),
            "field 'prompt': ends in an assistant turn",
        ),
    ],
)
def test_demonstrations_refuse(example, found):
    with pytest.raises(DataError) as caught:
        demonstrations([example])
    assert found in str(caught.value)


@pytest.mark.parametrize(
    ("example", "found"),
    [
        (
            parse_row({"prompt": "p", "completion": "c"}, "f.jsonl", 9),
            "f.jsonl row 9, field 'responses': found 1",
        ),
        (ranked("a", "b", ranks=[0, None]), "response 1 has no rank"),
        (ranked("a", "b", ranks=[1, 1]), "all responses are tied"),
    ],
)
def test_rankings_refuse(example, found):
    with pytest.raises(DataError) as caught:
        rankings([pair(), example])
    assert found in str(caught.value)
    assert rankings([pair()]) == [pair()]


def test_prompts_keep_order_and_repeats():
    found = prompts([pair(row=1), pair("x", "y", row=2)])
    assert [(e.row, e.responses) for e in found] == [(1, ()), (2, ())]
    with pytest.raises(DataError, match="no turns"):
        prompts([Example(prompt=())])


def test_label_correlation_by_hand():
    # Words 3 > 2 > 1 in rank order: all 3 pairs agree. Then 1 < 2: the only pair disagrees.
    found = label_correlation([ranked("a b c", "a b", "a"), ranked("a", "a b")])
    assert found.tau == pytest.approx((3 - 1) / 4)
    assert (found.pairs, found.longer_better) == (4, 0.75)
    assert (found.words_best, found.words_worst) == (2.0, 1.5)


def test_label_correlation_with_ties():
    # Ranks 0, 1, 1 and words 2, 1, 2: pairs with different ranks 2, different words 2, agreeing 1.
    found = label_correlation([ranked("a b", "a", "c d", ranks=[0, 1, 1])])
    assert found.tau == pytest.approx(1 / math.sqrt(2 * 2))
    assert found.longer_better == 0.75
    assert (found.words_best, found.words_worst) == (2.0, 1.5)
    same = label_correlation([ranked("a", "b")])
    assert math.isnan(same.tau)
    assert same.longer_better == 0.5


def test_label_correlation_needs_rankings():
    with pytest.raises(DataError, match="no rankings"):
        label_correlation([])
