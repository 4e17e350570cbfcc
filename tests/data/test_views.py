from __future__ import annotations

import math

import pytest

from posttrain.data import demonstrations, label_correlation, parse_row, prompts, rankings
from posttrain.data.views import (
    labelled,
    preferences_as_pairs,
    rated,
    references,
    scored_as_rankings,
    steps,
    targets,
)
from posttrain.errors import DataError
from posttrain.types import Example, Message, Preference, Response, Step, Target


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


def answered(text, **feedback):
    return Response(messages=(Message(role="assistant", content=text),), **feedback)


def judged(*responses, **fields):
    return Example(prompt=(Message(role="user", content="p"),), responses=responses, **fields)


def texts(examples):
    return [[r.text for r in e.responses] for e in examples]


def test_labelled_needs_good_and_bad_answers():
    good, bad = answered("a", label=True), answered("b", label=False)
    assert texts(labelled([judged(good, bad), judged(bad)])) == [["a"], ["b"], ["b"]]
    with pytest.raises(DataError, match=r"all 2 labels are true; expected good and bad answers"):
        labelled([judged(good), judged(good)])
    with pytest.raises(DataError, match=r"all 1 labels are false"):
        labelled([judged(bad)])
    with pytest.raises(DataError, match=r"example 1 .*'label': response 1 \(from 0\) has none"):
        labelled([judged(good, bad), judged(good, answered("c"))])
    with pytest.raises(DataError, match="no response"):
        labelled([judged()])


def test_rated_by_score_or_attribute():
    response = answered("a", score=2.0, attributes={"wit": 4.0})
    assert [r.score for e in rated([judged(response)]) for r in e.responses] == [2.0]
    assert [r.score for e in rated([judged(response)], "wit") for r in e.responses] == [4.0]
    with pytest.raises(DataError, match=r"field 'attributes.length': response 0 \(from 0\) has none"):
        rated([judged(response)], "length")
    with pytest.raises(DataError, match="field 'score'"):
        rated([judged(answered("a"))])


def test_steps_need_a_label():
    stepped = answered("ab", steps=(Step(text="a", label=1), Step(text="b")))
    assert texts(steps([judged(stepped, stepped)])) == [["ab"], ["ab"]]
    with pytest.raises(DataError, match="field 'steps'"):
        steps([judged(answered("a", steps=(Step(text="a"),)))])


def test_targets_are_prompts_with_a_right_answer():
    target = Target(kind="number", answer="5")
    assert targets([judged(answered("5"), target=target)]) == [judged(target=target)]
    with pytest.raises(DataError, match="field 'target': no target"):
        targets([judged()])


def test_scores_become_ranks_with_ties():
    found = scored_as_rankings(
        [
            judged(answered("a", score=1), answered("b", score=3), answered("c", score=1)),
            judged(answered("a", score=2), answered("b", score=2)),
        ]
    )
    assert [[r.rank for r in e.responses] for e in found.examples] == [[1, 0, 1]]
    assert found.ties == 1
    assert rankings(found.examples) == found.examples
    wit = [answered("a", attributes={"wit": 0}), answered("b", attributes={"wit": 1}, score=9)]
    assert [r.rank for r in scored_as_rankings([judged(*wit)], "wit").examples[0].responses] == [1, 0]
    assert [r.score for r in scored_as_rankings([judged(*wit)], "wit").examples[0].responses] == [None, 9]
    with pytest.raises(DataError, match="found 1 responses, expected at least 2"):
        scored_as_rankings([judged(answered("a", score=1))])


def test_preferences_become_pairs_of_one_axis():
    given = (
        Preference(a=0, b=1, better=1.0, axis="wit", by="ann"),
        Preference(a=0, b=2, better=0.25, axis="wit", by="bob"),
        Preference(a=1, b=2, better=0.5, axis="wit", by="ann"),
        Preference(a=1, b=0, better=1.0, axis="tact"),
    )
    examples = [judged(answered("a"), answered("b"), answered("c"), preferences=given)]
    found = preferences_as_pairs(examples, "wit")
    assert (texts(found.examples), found.ties) == ([["a", "b"], ["c", "a"]], 1)
    assert [e.meta for e in found.examples] == [{"better": 1.0, "by": "ann"}, {"better": 0.75, "by": "bob"}]
    assert [[r.rank for r in e.responses] for e in found.examples] == [[0, 1], [0, 1]]
    assert all(not e.preferences for e in found.examples)
    assert texts(preferences_as_pairs(examples, "wit", by="bob").examples) == [["c", "a"]]
    assert texts(preferences_as_pairs(examples, "tact").examples) == [["b", "a"]]
    with pytest.raises(
        DataError, match=r"no comparisons along the axis ''; name one of those in the data: 'tact', 'wit'"
    ):
        preferences_as_pairs(examples)
    with pytest.raises(DataError, match="no comparisons by 'eve'"):
        preferences_as_pairs(examples, "wit", by="eve")


def test_references_become_demonstrations():
    example = judged(answered("x", rank=0), meta={"references": {"gold": "g", "turns": ["first", "second"]}})
    assert texts(references([example], "gold")) == [["g"]]
    assert texts(references([example], "turns")) == [["first"]]
    assert references([example], "gold")[0].responses[0].rank is None
    with pytest.raises(DataError, match=r"no reference 'silver' \(found 'gold', 'turns'\)"):
        references([example], "silver")
