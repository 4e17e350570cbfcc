"""Recognition, names and columns asked for, what every format shares; golden records of this library's own columns."""

from __future__ import annotations

import math

import pytest

from posttrain.data.formats import FORMATS, Place, parse_row, parse_rows
from posttrain.data.formats.table import recognise
from posttrain.errors import ConfigError, DataError, UselessRow
from posttrain.types import Example, Message, Preference, Response, Step, ToolCall

EMPTY = "\n\nHuman: hi\n\nAssistant:\n\nHuman: more\n\nAssistant: "
HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: more\n\nAssistant: "
USER = {"role": "user", "content": "u"}
ANSWER = {"role": "assistant", "content": "a"}


def said(text):
    return (Message(role="assistant", content=text),)


def asked(text):
    return (Message(role="user", content=text),)


def only(row, **options):
    (example,) = parse_rows(row, **options)
    return example


def fault(row, **options):
    with pytest.raises(DataError) as caught:
        parse_rows(row, "f.jsonl", 7, **options)
    message = str(caught.value)
    assert message.startswith("f.jsonl row 7, field '")
    assert ";" in message
    return message.removeprefix("f.jsonl row 7, field ")


# ---------------------------------------------------------------------------- every format


@pytest.mark.parametrize("name", FORMATS)
def test_the_example_of_every_format_is_told_from_all_others_and_read(name):
    form = FORMATS[name]
    if not form.asked:
        assert recognise(form.example, Place("f", 1)).name == name
    examples = (
        parse_rows({**form.example, "weight": 0.5, "extra_column": [1]}, "f", 3, format=name)
        if name != "example"
        else [only({**form.example, "weight": 0.5, "meta": {"extra_column": [1]}}, file="f", number=3)]
    )
    assert examples
    for example in examples:
        assert (example.file, example.row, example.weight) == ("f", 3, 0.5)
        assert example.meta["extra_column"] == [1]
        assert example.prompt[-1].role == "user"
        assert form.summary.endswith(".")
    assert not form.needs - form.used


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "example"])
@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (-1, "'weight': found -1, expected at least 0"),
        (math.inf, "'weight': the number isn't finite"),
        (math.nan, "'weight': the number isn't finite"),
        (True, "'weight': found true/false, expected a number"),
        (None, "'weight': found null, expected a number"),
        ("heavy", "'weight': found 'heavy', expected a number"),
    ],
)
def test_every_format_checks_the_weight(name, weight, expected):
    assert expected in fault({**FORMATS[name].example, "weight": weight}, format=name)


@pytest.mark.parametrize("name", FORMATS)
def test_a_missing_column_is_named_when_the_format_is_given(name):
    form = FORMATS[name]
    column = sorted(form.needs)[0]
    row = {key: value for key, value in form.example.items() if key != column}
    message = fault(row, format=name)
    assert message.startswith(f"'{column}': missing column (found ")
    assert f"format '{name}' needs it" in message


# ---------------------------------------------------------------------------- telling formats apart


def test_formats_are_found_by_their_content_where_columns_are_the_same():
    assert only({"prompt": "p", "chosen": "a", "rejected": "b", "subset": "math"}).meta == {"subset": "math"}
    three = {"prompt": "p", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"], "subset": "math"}
    assert [r.rank for r in only(three).responses] == [0, 0, 0, 1, 1, 1]
    assert "are those of 'gsm8k', but not what stands in them" in fault({"question": "q", "answer": "no number"})


def test_a_format_and_columns_can_be_named():
    row = {"question": "q", "answer": "a"}
    example = only(row, columns={"prompt": "question", "completion": "answer"})
    assert (example.prompt, example.responses[0].text, example.meta) == (asked("q"), "a", {})
    swapped = only({"prompt": "a", "completion": "q"}, columns={"prompt": "completion", "completion": "prompt"})
    assert (swapped.prompt, swapped.responses[0].text) == (asked("q"), "a")
    both = only({"prompt": "p", "completion": "c"}, format="prompt")
    assert (both.responses, both.meta) == ((), {"completion": "c"})


def test_faults_call_a_mapped_column_as_the_file_does():
    message = fault({"question": 3, "answer": "a"}, columns={"prompt": "question", "completion": "answer"})
    assert message.startswith("'question': found a number, expected text")
    message = fault({"question": [USER, 3], "answer": "a"}, columns={"prompt": "question", "completion": "answer"})
    assert message.startswith("'question[1]': found a number, expected a message")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"format": "alpacca"}, "unknown format 'alpacca'; did you mean 'alpaca'?"),
        ({"columns": {"promt": "q"}}, "no format reads a column 'promt' (mapped from 'q'); did you mean 'prompt'?"),
    ],
)
def test_unknown_names_are_refused(options, expected):
    with pytest.raises(ConfigError) as caught:
        parse_rows({"q": "a"}, **options)
    assert str(caught.value) == expected


def test_columns_that_cannot_be_mapped():
    assert "'qestion': no such column, it was to be read as 'prompt'; did you mean 'question'?" in fault(
        {"question": "q"}, columns={"prompt": "qestion"}
    )
    assert "'question': is to be read as 'prompt', which is another column" in fault(
        {"question": "q", "prompt": "p"}, columns={"prompt": "question"}
    )


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"id": 3}, "'prompt': columns 'id' fit no format; expected {\"prompt\",\"completion\"}"),
        ({}, "'prompt': columns none fit no format"),
        ({"prompt": "p", "completon": "c"}, "'completon': unknown column; did you mean 'completion'?"),
        ({"promt": "p", "completion": "c"}, "'promt': unknown column; did you mean 'prompt'?"),
        ({"prompt": "p", "completion": "c", "wieght": 1}, "'wieght': unknown column; did you mean 'weight'?"),
        ({"prompt": "p", "response": "c"}, "'response': unknown column; did you mean 'completion'?"),
        ({"query": "p", "response": "c"}, "'query': unknown column; did you mean 'prompt'?"),
        ({"completion": "c"}, "'prompt': missing column (found 'completion'); expected"),
        ({"prompt": "p", "chosen": "c"}, "'rejected': missing column (found 'prompt', 'chosen')"),
        ({"prompt": "p", "rejected": "c"}, "'chosen': missing column"),
        (
            {"prompt": "p", "completion": "c", "chosen": "d", "rejected": "e"},
            "fit several formats; keep those of one of 'completion' and 'pair', or name one with --format",
        ),
        (
            {"prompt": "p", "messages": [USER, ANSWER]},
            "'messages': columns 'prompt', 'messages' fit several formats",
        ),
        ({"prompt": "p", "completion": "c", "failures": ["x"]}, "'failures': stands without 'completions'"),
        (
            {"prompt": "p", "response": "r", "helpfulness": 4, "correctness": 4, "coherence": 4, "complexity": 1},
            "nearest is 'helpsteer', which also needs 'verbosity'",
        ),
        (
            {"name": "j", "prompt_template": "x", "output_format": "[[A]]"},
            "these rows are judge templates, not examples; see posttrain.data.judging.read_judge_templates",
        ),
        (
            {"message_id": "m", "parent_id": "p", "role": "prompter", "text": "t"},
            "these rows are single messages of trees, not examples",
        ),
    ],
)
def test_unclear_columns_are_faults_that_name_the_way_out(row, expected):
    assert expected in fault(row)


def test_useless_rows_are_told_from_faulty_ones():
    cases = {
        "identical answers": [
            {"prompt": "p", "chosen": "same", "rejected": "same"},
            {"chosen": HH + "a", "rejected": HH + "a"},
            {"prompt": "p", "completions": ["a", "a"], "ranks": [0, 1]},
        ],
        "all tied": [{"prompt": "p", "completions": ["a", "b"], "ranks": [1, 1]}],
    }
    for reason, rows in cases.items():
        for row in rows:
            with pytest.raises(UselessRow) as caught:
                parse_rows(row)
            assert caught.value.reason == reason
    message = fault({"prompt": "p", "completions": ["a", "b", "a"]})
    assert "answers 0 and 2 (from 0) are identical" in message


def test_one_row_that_makes_several_examples_is_no_single_one():
    row = FORMATS["truthfulqa_mc"].example
    assert len(parse_rows(row)) == 2
    with pytest.raises(DataError, match="makes 2 examples, expected one; use parse_rows"):
        parse_row(row)


def test_a_long_column_or_value_is_shown_in_part():
    assert len(fault({"x" * 10_000: 1})) < 400
    assert len(fault({"prompt": "p", "completion": "c", "weight": "y" * 10_000})) < 200


# ---------------------------------------------------------------------------- own columns


def test_labelled_rated_and_attributes():
    row = {"prompt": "p", "completion": "c"}
    assert only({**row, "label": True}).responses == (Response(messages=said("c"), label=True),)
    assert only({**row, "label": "False"}).responses[0].label is False
    assert only({**row, "score": "-0.5"}).responses == (Response(messages=said("c"), score=-0.5),)
    listed = only({**row, "score": [1, 2, 6]}).responses[0]
    assert (listed.score, listed.meta) == (3.0, {"scores": [1.0, 2.0, 6.0]})
    assert only({**row, "attributes": {"wit": 3}}).responses[0].attributes == {"wit": 3.0}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"label": 1}, "'label': found 1, expected true or false"),
        ({"label": "0"}, "'label': found '0', expected true or false"),
        ({"label": None}, "'label': found null, expected true or false"),
        ({"score": None}, "'score': found null, expected a number"),
        ({"score": []}, "'score': found 0 entries, expected at least 1"),
        ({"score": [1, None]}, "'score[1]': found null, expected a number"),
        ({"score": "N/A"}, "'score': found 'N/A', expected a number"),
        ({"score": 10**400}, "'score': the number isn't finite"),
        ({"attributes": {}}, "'attributes': no rating"),
        ({"attributes": {"wit": True}}, "'attributes.wit': found true/false, expected a number"),
    ],
)
def test_missing_and_strange_judgements_are_faults_not_zeros(more, expected):
    assert expected in fault({"prompt": "p", "completion": "c", **more})


def test_ranked_scored_and_compared_completions():
    row = {"prompt": "p", "completions": ["a", "b", "c"]}
    assert [r.rank for r in only({**row, "ranks": [2, 1, 2]}).responses] == [1, 0, 1]
    assert [(r.rank, r.score) for r in only({**row, "scores": [0, 2.5, 1]}).responses] == [
        (None, 0.0),
        (None, 2.5),
        (None, 1.0),
    ]
    circle = only({**row, "comparisons": [[0, 1], [1, 2], {"a": 0, "b": 2, "better": 0, "axis": "wit", "by": "ann"}]})
    assert circle.preferences == (
        Preference(a=0, b=1, better=1.0),
        Preference(a=1, b=2, better=1.0),
        Preference(a=0, b=2, better=0.0, axis="wit", by="ann"),
    )
    assert "'scores': found 2 entries, expected 3" in fault({**row, "scores": [1, 2]})
    assert "'ranks[0]': found 0.5, expected a whole number" in fault({**row, "ranks": [0.5, 1, 2]})
    assert "'comparisons[0]': found 3, expected one of 0 to 2" in fault({**row, "comparisons": [[0, 3]]})
    assert "'comparisons[0]': compares answer 1 with itself" in fault({**row, "comparisons": [[1, 1]]})
    assert "better is 2, expected 0 to 1" in fault({**row, "comparisons": [{"a": 0, "b": 1, "better": 2}]})


def test_steps_join_to_the_answer():
    example = only({"prompt": "p", "completions": ["one", "two", "three"], "labels": [True, -1, None]})
    (response,) = example.responses
    assert response.steps == (Step(text="one\n", label=1), Step(text="two\n", label=-1), Step(text="three"))
    assert response.text == "one\ntwo\nthree" == "".join(step.text for step in response.steps)
    assert "'labels[0]': found 2, expected one of -1, 0, 1" in fault(
        {"prompt": "p", "completions": ["a"], "labels": [2]}
    )


def test_transcripts_name_the_three_faults_of_hh_rlhf():
    assert only({"chosen": HH + "good", "rejected": HH + "bad"}) == Example(
        prompt=(*asked("hi"), *said("hello"), *asked("more")),
        responses=(Response(messages=said("good"), rank=0), Response(messages=said("bad"), rank=1)),
        file="row",
        row=1,
    )
    assert "'rejected': the final answer is empty; remove" in fault({"chosen": HH + "a", "rejected": HH})
    message = fault({"chosen": HH + "a\n\nHuman: b", "rejected": HH + "c"})
    assert message.startswith(
        "'chosen': ends with a Human turn: it doesn't end in an assistant turn after another turn, "
    )
    assert (
        ", and the turns before the last differ: 'rejected' differs from 'chosen' from turn 4 on (4 and 5 turns)"
        in message
    )
    short = "\n\nHuman: hi\n\nAssistant: no"
    message = fault({"chosen": HH + "a", "rejected": short})
    assert message.startswith(
        "'rejected': the turns before the last differ: 'rejected' differs from 'chosen' from turn 2 on"
    )
    assert "(2 and 4 turns); remove the row" in message
    both = fault({"chosen": HH, "rejected": "\n\nHuman: hi\n\nAssistant:"})
    assert both.count("the final answer is empty") == 2
    assert "'chosen turn 2': empty text" in fault({"chosen": EMPTY + "a", "rejected": EMPTY + "b"})


# ---------------------------------------------------------------------------- messages


def call(**more):
    function = {"name": "weather", "arguments": '{"place": "Rome", "days": 2}'}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": function}],
        **more,
    }


TOOL = {"role": "tool", "tool_call_id": "c1", "content": "sunny"}


def test_tools_and_calls_are_read():
    schema = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    example = only({"messages": [USER, call(), TOOL, ANSWER], "tools": [schema]})
    asking = ToolCall(name="weather", arguments={"place": "Rome", "days": 2}, id="c1")
    assert example.prompt == (
        *asked("u"),
        Message(role="assistant", content="", tool_calls=(asking,)),
        Message(role="tool", content="sunny", name="weather", call_id="c1"),
    )
    assert example.tools == (schema,)
    assert only({"messages": [USER, ANSWER], "tools": "[]"}).tools == ()
    flat = {"role": "assistant", "tool_calls": [{"name": "weather", "arguments": {}}]}
    assert only({"messages": [USER, flat]}).responses[0].messages[0].tool_calls == (
        ToolCall(name="weather", arguments={}),
    )


def test_only_records_of_our_own_may_hold_empty_answers():
    turns = [{"messages": [{"role": "assistant", "content": ""}], "rank": 1}, {"messages": [ANSWER], "rank": 0}]
    assert [r.text for r in only({"prompt": [USER], "responses": turns}).responses] == ["", "a"]
    assert "'messages[1].content': empty text" in fault({"messages": [USER, {"role": "assistant", "content": ""}]})
    turns[0]["messages"][0]["content"] = None
    assert "'responses[0].messages[0].content': found null" in fault({"prompt": [USER], "responses": turns})


def test_text_parts_are_joined_and_null_says_nothing():
    parts = [{"type": "text", "text": "look "}, {"type": "text", "text": "here"}]
    example = only({"messages": [{"role": "user", "content": parts, "name": None}, {**ANSWER, "refusal": None}]})
    assert example.prompt == asked("look here")


def test_the_weight_of_a_message_says_whether_it_is_trained():
    turns = [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}]
    example = only({"messages": turns})
    assert [m.train for m in example.prompt] == [None, False, None]
    assert example.responses[0].messages[0].train is True


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ANSWER],
            "'messages[0].content[0]': a content part of type 'image_url'; only text is read",
        ),
        ([{"role": "user", "content": []}, ANSWER], "'messages[0].content': found 0 entries, expected at least 1"),
        ([{"role": "user", "content": {"text": "x"}}, ANSWER], "found an object, expected text"),
        ([{**USER, "name": "ann"}, ANSWER], "has ['name'], which nothing here reads on a turn of role 'user'"),
        ([{**USER, "thinking": "hm"}, ANSWER], "has ['thinking'], which nothing here reads"),
        ([{**USER, "tool_calls": [{}]}, ANSWER], "'tool_calls' belongs to a turn of role 'assistant'"),
        ([{"role": "asistant", "content": "x"}, ANSWER], "unknown role 'asistant'; did you mean 'assistant'?"),
        ([USER, TOOL, ANSWER], "answers the call 'c1', which no earlier turn makes"),
        ([USER, call(), {**TOOL, "name": "news"}, ANSWER], "answers the call 'c1' of 'weather', but is named 'news'"),
        (
            [USER, call(tool_calls=[{"name": "x"}])],
            "'messages[1].tool_calls[0].arguments': missing (found keys 'name')",
        ),
        ([USER, call(tool_calls=[{"type": "code", "name": "x"}])], "found 'code', expected 'function'"),
        ([USER, call(tool_calls="[]")], "'messages[1].tool_calls': found a string, expected a list"),
        ([USER, {"role": "assistant", "content": None}], "'messages[1].content': found null, expected text"),
        ([USER, {**ANSWER, "weight": 0.5}], "'messages[1].weight': found 0.5, expected 0 or 1"),
        ([USER, {**ANSWER, "weight": 1, "train": True}], "'messages[1].weight': stands beside 'train'"),
        ([USER, {"content": "x"}], "the message lacks ['role']"),
    ],
)
def test_faulty_messages(turns, expected):
    assert expected in fault({"messages": turns})


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("{'a': 1}", "the text isn't JSON"),
        ('{"a": NaN}', "NaN is no JSON value"),
        ('{"a": 1, "a": 2}', "the key stands twice in one object"),
        ("[1]", "found a list, expected an object"),
        ("", "empty text"),
        ("[" * 100_000, "the text isn't JSON"),
        (None, "found null, expected an object"),
    ],
)
def test_arguments_are_json_read_strictly(arguments, expected):
    calls = [{"name": "weather", "arguments": arguments}]
    message = fault({"messages": [USER, call(tool_calls=calls)]})
    assert message.startswith("'messages[1].tool_calls[0].arguments': ")
    assert expected in message
