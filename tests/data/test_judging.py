"""Principles, rules, judge templates, and what is joined to examples by id; on files written here."""

from __future__ import annotations

import json

import pytest

from posttrain.data.formats import FORMATS, parse_row
from posttrain.data.judging import JudgeTemplate, join_references, join_verdicts, read_judge_templates
from posttrain.data.principles import Principle, read_chats, read_principles, read_rules
from posttrain.errors import DataError
from posttrain.types import Message, Preference


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_principles_of_three_shapes(tmp_path):
    marked = {
        "kind0": {
            "prompt": ["\n\nCritiqueRequest: Is it rude?\n\nCritique:"],
            "edit_request": "\n\nRevisionRequest: Be kind.\n\nRevision:",
        },
        "kind1": {"prompt": ["CritiqueRequest: Is it true?\n\nCritique:"], "edit_request": "Say what is true."},
    }
    chat = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    listed = {"constitutions": [{"critic": "Is it rude?", "revision": "Be kind."}], "system_chat": [chat]}
    for name, value in (("marked", marked), ("listed", listed)):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    assert read_principles(tmp_path / "marked.json") == [
        Principle(name="kind0", critique="Is it rude?", revision="Be kind."),
        Principle(name="kind1", critique="Is it true?", revision="Say what is true."),
    ]
    assert read_principles(tmp_path / "listed.json") == [
        Principle(name="principle 1", critique="Is it rude?", revision="Be kind.")
    ]
    assert read_chats(tmp_path / "listed.json") == [
        (Message(role="user", content="u"), Message(role="assistant", content="a"))
    ]
    own = lines(tmp_path / "own.jsonl", {"name": "n", "critique": "c", "revision": "r"})
    assert read_principles(own) == [Principle(name="n", critique="c", revision="r")]
    assert read_chats(own) == []


def test_faulty_principles(tmp_path):
    twice = lines(tmp_path / "twice.jsonl", *[{"name": "n", "critique": "c", "revision": "r"}] * 2)
    with pytest.raises(DataError, match="two principles are named 'n'"):
        read_principles(twice)
    with pytest.raises(DataError, match=r"row 1, field 'critique': found null, expected text"):
        read_principles(lines(tmp_path / "none.jsonl", {"name": "n", "revision": "r"}))


RULES = """\
prompt_template: "{question} {response}"
completion_class_order: [good, bad]
completion_classes:
  good: {comply: {polite: true}, refuse: {sorry: true, rude: false}}
  bad: {comply: {polite: false}}
derived_propositions:
  polite: {rude: false}
simple_propositions:
  rude: {prompt: "Is it rude?"}
  sorry: {prompt: "Does it say sorry?"}
"""


def test_rules(tmp_path):
    path = tmp_path / "rules.yaml"
    path.write_text(RULES)
    rules = read_rules(path)
    assert (rules.template, rules.order) == ("{question} {response}", ("good", "bad"))
    assert rules.questions == {"rude": "Is it rude?", "sorry": "Does it say sorry?"}
    assert rules.derived == {"polite": {"rude": False}}
    assert rules.classes["good"] == {"comply": {"polite": True}, "refuse": {"sorry": True, "rude": False}}


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("polite: {rude: false}", "polite: {rode: false}", "names the proposition 'rode', which isn't defined before"),
        ("[good, bad]", "[good]", "orders good, but the classes are bad, good"),
        ("sorry: true", "sorry: 1", "found 1, expected true or false"),
        ("completion_class_order", "completion_order", "completion_class_order': missing"),
    ],
)
def test_faulty_rules(tmp_path, old, new, expected):
    assert old in RULES
    path = tmp_path / "rules.yaml"
    path.write_text(RULES.replace(old, new, 1))
    with pytest.raises(DataError) as caught:
        read_rules(path)
    assert expected in str(caught.value)


def test_judge_templates(tmp_path):
    row = {
        "name": "pair",
        "type": "pairwise",
        "system_prompt": "",
        "prompt_template": "{answer_a} {answer_b}",
        "category": "general",
        "output_format": "[[A]]",
    }
    template = JudgeTemplate(
        name="pair",
        kind="pairwise",
        system="",
        prompt="{answer_a} {answer_b}",
        verdict="[[A]]",
        category="general",
    )
    assert read_judge_templates(lines(tmp_path / "t.jsonl", row)) == [template]
    with pytest.raises(DataError, match="'type': expected 'pairwise' or 'single'"):
        read_judge_templates(lines(tmp_path / "u.jsonl", {**row, "type": "triple"}))


def pairs():
    return [parse_row({**FORMATS["pandalm"].example, "idx": i}) for i in range(4)]


def test_verdicts_are_joined_by_id(tmp_path):
    verdicts = [("1", 0), ("Tie", 2), ("garbage", 1), ("2", 9)]
    rows = [{"idx": i, "gpt_result": v, "gpt_reason": "r", "gpt_reference": "x"} for v, i in verdicts]
    found = join_verdicts(pairs(), lines(tmp_path / "v.jsonl", *rows), by="gpt")
    assert (found.unmatched, found.unreadable) == (1, 1)
    assert [e.preferences[3:] for e in found.examples] == [
        (Preference(a=0, b=1, better=1.0, by="gpt"),),
        (),
        (Preference(a=0, b=1, better=0.5, by="gpt"),),
        (),
    ]
    assert found.examples[0].meta["verdicts"] == {"gpt": {"reason": "r", "reference": "x"}}
    with pytest.raises(DataError, match=r"row 2, field 'idx': 0 stands twice"):
        join_verdicts(pairs(), lines(tmp_path / "w.jsonl", rows[0], rows[0]), by="gpt")
    with pytest.raises(DataError, match="'gpt_result': no verdict"):
        join_verdicts(pairs(), lines(tmp_path / "x.jsonl", {"idx": 0, "gpt_result": "3"}), by="gpt")
    with pytest.raises(DataError, match="field 'idx': the example has none to join by"):
        join_verdicts([parse_row({"prompt": "p"})], tmp_path / "v.jsonl", by="gpt")


def test_reference_answers_are_joined_by_question(tmp_path):
    prompts = [parse_row(FORMATS["mt_bench"].example), parse_row({**FORMATS["mt_bench"].example, "question_id": 82})]
    row = {"question_id": 81, "model_id": "gpt", "choices": [{"index": 0, "turns": ["five", "ten"]}]}
    found = join_references(prompts, lines(tmp_path / "r.jsonl", row, {**row, "question_id": 7}))
    assert found.unmatched == 1
    assert found.examples[0].meta["references"] == {"reference": ["5", "10"], "gpt": ["five", "ten"]}
    assert found.examples[1] == prompts[1]
