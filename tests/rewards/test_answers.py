"""Whether answers are right, and whether they keep to a form, to the letter."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import pytest

from posttrain.data import read
from posttrain.errors import ConfigError, DataError
from posttrain.rewards.answers import as_number, boxed, choice, exact, final_answer, mathematics, number, verified
from posttrain.rewards.base import Completion
from posttrain.rewards.constraints import CONSTRAINTS, followed, share_followed, speaks
from posttrain.rewards.text import in_language, length, matches, repetition
from posttrain.types import Example, Message, Target


def numeric(answer):
    return Target(kind="number", answer=answer)


@pytest.mark.parametrize(
    ("wanted", "text", "right"),
    [
        ("18", "9 * 2 = 18\n#### 18", 1.0),
        ("18", "#### 17\nNo: #### 18", 1.0),
        ("1000", "It costs $1,000.", 1.0),
        ("1,000", "so \\boxed{1000} in all, not 3", 1.0),
        ("0.5", "The answer is 1/2.", 1.0),
        ("-3", "x = -3", 1.0),
        ("-3", "5-3", 0.0),
        ("72", "The answer is **72** clips, of which 48 in April", 1.0),
        ("72", "Answer: 71.9999999", 0.0),
        ("5", "Route 66 has 5 stops, see v2", 1.0),
        ("5", "none", 0.0),
        ("5", "", 0.0),
        ("5", "5" * 1000, 0.0),
        ("1", "1/0", 0.0),
        ("3.50", "$3.5", 1.0),
    ],
)
def test_numbers(wanted, text, right):
    assert number(numeric(wanted), text) == right == verified(numeric(wanted), text)


def test_parts_of_answers():
    assert boxed("\\boxed{a{b}c} and \\boxed{d") == ["a{b}c"]
    assert final_answer("first 3 then \\boxed{\\frac{1}{2}}") == "\\frac{1}{2}"
    assert as_number("about 12,345.50 each") == Fraction("12345.5") and as_number("-") is None
    assert number(Target(kind="text", answer="5"), "5") is None and number(numeric("many"), "5") is None


@pytest.mark.parametrize(
    ("wanted", "text", "right"),
    [
        ("\\frac{1}{2}", "It is $\\frac{2}{4}$.", 1.0),
        ("x^2+2x+1", "\\boxed{(x+1)^2}", 1.0),
        ("x^2+2x+1", "\\boxed{(x+2)^2}", 0.0),
        ("7", "#### 7", 1.0),
        ("\\sqrt{2}", "no idea", 0.0),
    ],
)
def test_mathematics(wanted, text, right):
    pytest.importorskip("math_verify")
    assert mathematics(Target(kind="text", answer=wanted), text) == right


def test_short_texts():
    paris = Target(kind="text", answer="the Eiffel Tower")
    assert [exact(paris, t) for t in ("Eiffel tower.", "The answer is: An EIFFEL Tower", "Eiffel")] == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("B", 1.0),
        ("(B) a whale", 1.0),
        ("b.", 1.0),
        ("The answer is B", 1.0),
        ("\\boxed{B}", 1.0),
        ("It must be a whale.", 1.0),
        ("A", 0.0),
        ("A whale shark", 0.0),
        ("a shark or a whale", 0.0),
        ("I don't know", 0.0),
        ("Z", 0.0),
    ],
)
def test_choices(text, right):
    target = Target(kind="choice", choices=("a shark", "a whale", "a whale shark"), correct=(1,))
    assert choice(target, text) == right


KEPT = {  # name: arguments, answers that keep it, answers that don't
    "length_constraints:number_words": ({"relation": "at least", "num_words": 3}, ["one two three"], ["one two"]),
    "length_constraints:number_sentences": ({"relation": "less than", "num_sentences": 3}, ["Dr. No came. He left!"], ["A b. C d. E f."]),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, ["a\n***\nb", "a *** b ***"], ["a", "a *** *** b"]),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "weekend"},
        ["Hi.\n\nWeekend, at last", 'Hi.\n\n"weekend"'],
        ["Weekend.\n\nHi", "Hi.\n\nWeekend\n\nmore", "weekend"],
    ),
    "keywords:existence": ({"keywords": ["Cat", "dog"]}, ["dogs and cats"], ["cats only"]),
    "keywords:forbidden_words": ({"forbidden_words": ["cat"]}, ["a category"], ["a Cat."]),
    "keywords:frequency": ({"relation": "at least", "frequency": 2, "keyword": "ha"}, ["Haha"], ["ha"]),
    "keywords:letter_frequency": ({"let_relation": "less than", "let_frequency": 2, "letter": "q"}, ["Queen", "no"], ["Q q"]),
    "change_case:capital_word_frequency": ({"capital_relation": "at least", "capital_frequency": 2}, ["NO and YES"], ["NO and yes"]),
    "change_case:english_capital": ({}, ["THE END OF IT."], ["The end.", "DAS IST NICHT DER HUND UND DIE KATZE"]),
    "change_case:english_lowercase": ({}, ["the end of it."], ["The end", "1 2 3"]),
    "language:response_language": ({"language": "de"}, ["das ist nicht der Hund"], ["that is not the dog of it", "это не собака"]),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, ["[name], [address]"], ["[name"]),
    "detectable_content:postscript": ({"postscript_marker": "P.P.S"}, ["Bye\nP.P.S. more", "p. p. s. more"], ["Bye\nP.S. more"]),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, ["* a\n* b", "- a\ntext\n  - b"], ["* a", "**a**\n* b"]),
    "detectable_format:constrained_response": ({}, ["Well: My answer is maybe."], ["maybe"]),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 2}, ["*a* and **b c**"], ["*a* b", "** and **"]),
    "detectable_format:multiple_sections": ({"section_spliter": "Part", "num_sections": 2}, ["Part 1\na\nPart 2\nb"], ["Part 1"]),
    "detectable_format:json_format": ({}, ['```json\n{"a": 1}\n```', "[1]"], ["{a: 1}", "sure: {}", "[" * 100_000]),
    "detectable_format:title": ({}, ["<<A title>>\ntext"], ["<< >>", "<title>"]),
    "combination:two_responses": ({}, ["a\n******\nb"], ["a******a", "a", "a****** ******b"]),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say hi."}, ["say hi. Hi!"], ["Hi!"]),
    "startend:end_checker": ({"end_phrase": "That is all."}, ["Well. that is all. ", '"That is all."'], ["That is all. Bye"]),
    "punctuation:no_comma": ({}, ["one and two"], ["one, two"]),
    "startend:quotation": ({}, ['"all of it"'], ['"', 'he said "no"']),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CONSTRAINTS))
def test_constraints(name):
    arguments, good, bad = KEPT[name]
    target = Target(kind="constraints", constraints=((name, arguments),))
    assert [followed(target, text) for text in good] == [1.0] * len(good)
    assert [followed(target, text) for text in [*bad, " "]] == [0.0] * (len(bad) + 1)


def test_constraints_together():
    two = Target(kind="constraints", constraints=(("punctuation:no_comma", {}), ("startend:quotation", {})))
    assert (followed(two, "plain"), share_followed(two, "plain"), share_followed(two, "")) == (0.0, 0.5, 0.0)
    assert followed(numeric("5"), "5") is None
    with pytest.raises(DataError, match=r"unknown constraint 'os:system'; register it"):
        followed(Target(kind="constraints", constraints=(("os:system", {}),)), "x")
    odd = ("length_constraints:number_words", {"relation": "about", "num_words": 3})
    with pytest.raises(DataError, match="'less than' or 'at least'"):
        followed(Target(kind="constraints", constraints=(odd,)), "x")


def test_languages():
    assert speaks("这是一个句子", "zh") and speaks("これは文です", "ja") and speaks("это не так", "ru")
    assert speaks("the cat is in it", "hi") is False and speaks("यह एक वाक्य है", "en") is False
    assert speaks("Jag heter Sven", "en") is None and speaks("12", "en") is None


def said(text, ids=(1, 2)):
    return Completion(
        example=Example(prompt=(Message(role="user", content="?"),)),
        text=text,
        prompt_ids=(1,),
        ids=ids,
        truncated=False,
        group=0,
    )


def values(reward, *texts):
    return [score.value for score in reward([said(t) for t in texts])]


def test_rewards_of_form():
    assert values(length(2, 4), "", "a", "a b", "a b c d", "a b c d e f", "a " * 9) == [0, 0.5, 1, 1, 0.5, 0]
    assert values(length(0, 1, unit="tokens"), "whatever") == [0.0]
    form = matches(r"<think>.*</think>\s*<answer>.*</answer>")
    assert values(form, "<think>a\nb</think> <answer>1</answer>\n", "<answer>1</answer>") == [1.0, 0.0]
    assert values(repetition(2), "a b c d", "a b a b a b", "a") == [0.0, pytest.approx(-(1 - 2 / 5)), 0.0]
    assert values(in_language("de"), "das ist es nicht", "that is it", "42") == [1.0, 0.0, None]
    with pytest.raises(ConfigError, match="no regular expression"):
        matches("(")
    with pytest.raises(ConfigError, match="0 <= least <= most"):
        length(3, 2)


@pytest.mark.real_data
def test_real_answers_are_right():
    folder = os.environ.get("POSTTRAIN_REAL_DATA")
    if not folder:
        pytest.skip("POSTTRAIN_REAL_DATA is not set")
    for name in ("gsm8k__train", "svamp__all"):
        rows = read(Path(folder) / f"verifiable__{name}.jsonl.gz")
        told = [(e.target, e.responses[0].text if e.responses else f"#### {e.target.answer}") for e in rows]
        assert [number(t, text) for t, text in told] == [1.0] * len(rows)
    ifeval = read(Path(folder) / "verifiable__ifeval__all.jsonl.gz")
    assert {name for e in ifeval for name, _ in e.target.constraints} == set(CONSTRAINTS)
    assert all(share_followed(e.target, "A plain answer, of one line.") is not None for e in ifeval)
