"""What could slip through or take too long: odd names, doubled meanings, cut-off masks, many faults, many duplicates."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

import posttrain.data as data
from posttrain.data.control import encode_text, make_coder
from posttrain.data.exporting import export
from posttrain.data.formats import parse_rows
from posttrain.data.load import ReadReport, read, stream
from posttrain.data.principles import read_principles
from posttrain.data.quality import Survey
from posttrain.data.records import shards
from posttrain.errors import ConfigError, DataError
from posttrain.types import Example, Message

from .conftest import llama3, mistral, smol, wrap

USER = {"role": "user", "content": "u"}
ANSWER = {"role": "assistant", "content": "a"}
PAIR = {"prompt": "u", "chosen": "a", "rejected": "b"}


def fault(row, **options) -> str:
    with pytest.raises(DataError) as caught:
        parse_rows(row, "f.jsonl", 7, **options)
    return str(caught.value)


def quick(work: Callable[[], object], seconds: float = 5.0) -> None:
    """Run what took minutes when its time was quadratic."""
    began = time.process_time()
    work()
    assert time.process_time() - began < seconds


# ---------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    "row",
    [
        {"\x1b[31mprompt": "a", "id": "b"},
        {"prompt\x1b": "a", "completion": "b"},
        {"prompt": "a", "chosen": "b", "x\n\x1b]0;title\x07": 1, "z\x00": 2},
        {"prompt": "a", "completion": "b", "attributes": {"\x1b[2J": "x"}},
        {"messages": [{**USER, "\x1b[31m": 1}, ANSWER]},
        {"messages": [USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": {}, "\x9b31m": 1}]}]},
    ],
)
def test_names_in_messages_are_escaped(row):
    message = fault(row)
    assert message.isprintable()
    assert message.startswith("f.jsonl row 7, field '")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "completion": "b", "attributes": {"k" * 100_000: "x"}},
        {"prompt": "a", "completion": "b", "propositions": {"k" * 100_000: "x"}},
        {"question": {"problem": "p"}, "label": {"steps": [], "finish_reason": "k" * 100_000}},
        {"messages": [{"role": "k" * 100_000, "content": "c"}, ANSWER]},
    ],
)
def test_long_names_are_shown_in_part(row):
    assert len(fault(row)) < 1500


# ---------------------------------------------------------------------------- what a row says is read or refused


def test_a_labelled_conversation_is_no_demonstration():
    assert "doesn't read: is this a good or a bad answer?" in fault({"messages": [USER, ANSWER], "label": False})
    assert "format 'alpaca' doesn't read" in fault({"instruction": "i", "output": "o", "label": True})
    (named,) = parse_rows({"messages": [USER, ANSWER], "label": False}, format="messages")
    assert named.meta == {"label": False}
    (topic,) = parse_rows({"messages": [USER, ANSWER], "label": "maths"})
    assert topic.meta == {"label": "maths"}


def test_sharegpt_turns_say_what_is_trained():
    turns = [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a", "weight": 0}]
    more = [{"from": "human", "value": "v"}, {"from": "gpt", "value": "b", "train": True, "loss": None}]
    (example,) = parse_rows({"conversations": [*turns, *more]})
    assert [m.train for m in (*example.prompt, *example.responses[0].messages)] == [None, False, None, True]
    odd = [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a", "loss": 0.5}]
    assert "field 'conversations[1]': the turn has ['loss'], which nothing here reads" in fault({"conversations": odd})
    wrong = [{"from": "human", "value": "u", "weight": 1}, {"from": "gpt", "value": "a"}]
    assert "'weight' belongs to a turn of role 'assistant'" in fault({"conversations": wrong})


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({**USER, "content": [{"type": "text", "text": "t", "image_url": "x"}]}, "the content part has ['image_url']"),
        ({**ANSWER, "tool_calls": [{"name": "f", "arguments": {}, "output": "42"}]}, "the call has ['output']"),
        (
            {**ANSWER, "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {}}, "name": "g"}]},
            "the call has ['name']",
        ),
        (
            {**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": {}, "result": "42"}}]},
            "tool_calls[0].function': the call has ['result']",
        ),
    ],
)
def test_parts_and_calls_lose_nothing(message, expected):
    assert expected in fault({"messages": [USER, message, ANSWER]})


def test_the_place_of_a_call_is_no_loss():
    call = {"index": 0, "id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    (example,) = parse_rows({"messages": [USER, {**ANSWER, "tool_calls": [call]}]})
    assert example.responses[0].messages[0].tool_calls[0].name == "f"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"a": 1e999}', "in the JSON text: the number 1e999 is too large"),
        ('{"a": ' + "1" * 5000 + "}", "the text isn't JSON, or nested too deeply, or of huge numbers"),
        ('{"a": "\\ud800"}', "half of a surrogate pair in the JSON text"),
        ('{"a": ' + "[" * 150 + "]" * 150 + "}", "JSON text nested deeper than 100 levels"),
    ],
)
def test_json_text_within_a_row_is_as_strict_as_the_row(arguments, expected):
    calls = [{"name": "f", "arguments": arguments}]
    message = fault({"messages": [USER, {**ANSWER, "tool_calls": calls}]})
    assert "row 7, field 'messages[1].tool_calls[0].arguments': " in message
    assert expected in message


def test_side_information_never_replaces_a_column():
    row = {**PAIR, "metadata": {"score_chosen": 9.0, "score_rejected": 4.5, "source": "a"}, "source": "b"}
    assert "field 'source': this format keeps something else under that name; rename the column" in fault(row)
    (same,) = parse_rows({**row, "source": "a"})
    assert same.meta == {"source": "a"}


def test_a_column_is_mapped_once():
    columns = {"prompt": "q", "completion": "q"}
    with pytest.raises(ConfigError, match="the column 'q' is mapped to two of ours; map it to one"):
        parse_rows({"q": "a"}, columns=columns)


def test_what_answers_say_besides_their_text_is_kept():
    answers = [{"answer": "6", "rank": 2, "votes": 3}, {"answer": "5", "rank": 1, "model": "m"}]
    (nectar,) = parse_rows({"prompt": "\n\nHuman: hi\n\nAssistant:", "answers": answers})
    assert [r.meta for r in nectar.responses] == [{"votes": 3}, {"model": "m"}]
    asked = {"full_text": "Why?", "dataset": "eli5", "id": "x1"}
    (webgpt,) = parse_rows({"question": asked, "answer_0": "a", "answer_1": "b", "score_0": 1, "score_1": -1})
    assert webgpt.meta == {"question": {"dataset": "eli5", "id": "x1"}}


def test_values_of_any_kind_are_faults_not_crashes():
    tree = {"message_tree_id": "t", "prompt": {"text": "Hi", "role": ["prompter"], "replies": []}}
    assert "field 'prompt.role': unknown role a list" in fault(tree)
    assert "found 1e+308, expected a whole number" in fault(
        {"prompt": "p", "completions": ["a", "b"], "ranks": [0, 1e308]}
    )


# ---------------------------------------------------------------------------- masks


@pytest.mark.parametrize("overlong", ["truncate_completion"])
def test_a_cut_that_leaves_no_trained_token_is_dropped_and_counted(overlong):
    def turns(last):
        said = [("assistant", "General greeting " * 8, False), ("tool", "Hello", None), ("assistant", last, True)]
        return [{"role": role, "content": text, "train": train} for role, text, train in said]

    (example,) = parse_rows({"prompt": "Hello", "chosen": turns("Red"), "rejected": turns("Blue")})
    tokenizer = smol()
    (whole,), _ = data.ranking_rows(tokenizer, [example], max_length=500)
    assert all(any(b.masks["loss"]) and not b.masks["loss"][0] for b in whole.branches)
    limit = len(whole.prompt) + whole.branches[0].masks["loss"].index(True)
    rows, report = data.ranking_rows(tokenizer, [example], max_length=limit, overlong=overlong)
    assert rows == []
    assert report.dropped == {"no trained token left after truncation": 1}
    assert report.truncated == {}


def test_a_sampled_text_that_reenters_a_prompt_is_text():
    tokenizer = llama3()
    vocabulary = tokenizer.get_vocab()
    stop, header = vocabulary["<|eot_id|>"], vocabulary["<|start_header_id|>"]
    (user,) = asked = (Message(role="user", content="Hello"),)
    sampled = [*tokenizer.encode("Red", add_special_tokens=False), stop, header, stop]
    said = Message(role="assistant", content=str(tokenizer.decode(sampled)))
    assert said.content == "Red<|eot_id|><|start_header_id|><|eot_id|>"
    clean = data.render_prompt(tokenizer, [*asked, Message(role="assistant", content="Red"), user])
    again = data.render_prompt(tokenizer, [*asked, said, user])
    for control in (stop, header):
        assert again.count(control) == clean.count(control)


# ---------------------------------------------------------------------------- time and memory


def test_many_spellings_of_a_control_token_take_linear_time():
    pieces = [("<unk>", -9.0), ("<s>", 0.0), ("</s>", 0.0), *[(c, -5.0) for c in "▁<>/sabc"]]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.add_special_tokens(["<s>", "</s>"])
    tokenizer = wrap(backend, str(mistral().chat_template), bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    coder, text = make_coder(tokenizer), "a</s>" * 20_000

    def work():
        coded = encode_text(coder, text)
        assert len(coded.ids) == len(text)
        assert [text[a:b] for a, b in coded.chars[:6]] == list("a</s>a")

    quick(work)


def test_many_names_and_duplicates_take_linear_time(tmp_path):
    header = tmp_path / "wide.csv"
    header.write_text(",".join(f"c{i}" for i in range(60_000)) + ",c1\n")
    names = tmp_path / "principles.jsonl"
    many = [{"name": f"n{i}", "critique": "c", "revision": "r"} for i in [*range(20_000), 19_999]]
    names.write_text("\n".join(map(json.dumps, many)))

    def work():
        with pytest.raises(DataError, match="two columns are named 'c1'"):
            read(header)
        with pytest.raises(DataError, match="two principles are named 'n19999'"):
            read_principles(names)

    quick(work)


def test_a_solution_has_so_many_steps():
    step = {"completions": [{"text": "s", "rating": 1}, {"text": "t", "rating": -1}], "chosen_completion": 0}
    row = {"question": {"problem": "p"}, "label": {"steps": [step] * 1001}}
    assert "field 'label.steps': found 1001 entries, expected 0 to 1000" in fault(row)


def test_kinds_are_counted_one_by_one_up_to_a_number():
    found = Survey("s")
    for i in range(1500):
        found.add(Example(prompt=(Message(role="user", content="u"),), kind=f"k{i}"))
    kinds = found.report().kinds
    assert len(kinds) == 1001
    assert kinds["(others)"] == 500


def test_rows_that_can_not_be_rendered_are_counted_and_only_some_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("posttrain.data.load._KEPT", 3)
    file = tmp_path / "a.jsonl"
    chat = {"messages": [{"role": "system", "content": "s"}, USER, ANSWER]}
    file.write_text("\n".join(json.dumps(chat) for _ in range(5)))
    (report,) = data.check([file], tokenizer=mistral()).files
    assert not report.clean
    assert report.examples == 5
    faulty = [f for f in report.findings if f.text.startswith("faulty rows: ")]
    assert [f.count for f in faulty] == [3, 2]
    assert "field" not in faulty[0].text
    assert "chat template" in faulty[0].text
    assert faulty[1].text.endswith("beyond the first listed")


# ---------------------------------------------------------------------------- files


def test_a_report_beside_shards_is_no_shard(tmp_path):
    for i in range(2):
        (tmp_path / f"part-{i}.jsonl").write_text(json.dumps(PAIR) + "\n")
    (tmp_path / "part-0.jsonl.check.json").write_text("{}")
    assert [path.name for path in shards(tmp_path)] == ["part-0.jsonl", "part-1.jsonl"]
    assert len(read(tmp_path)) == 2


def test_export_into_no_directory_reads_nothing(tmp_path):
    report = ReadReport()
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(PAIR) + "\n")
    for name in ("x.jsonl", "x.parquet"):
        with pytest.raises(ConfigError, match="there is no directory"):
            export(stream(file, report=report), tmp_path / "none" / name)
    assert report.rows == 0


# ---------------------------------------------------------------------------- public names


def test_public_names_load_on_first_use():
    code = (
        "import sys, posttrain.data as d\n"
        "print({'torch', 'transformers', 'tokenizers'} & set(sys.modules) or 'none')\n"
        "d.read, d.stream, d.FORMATS, d.parse_rows, d.mix, d.split, d.Shuffle, d.write_jsonl, d.export, d.views, d.check\n"
        "print({'torch', 'transformers'} & set(sys.modules) or 'none')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["none", "none"]
    assert all(callable(getattr(data, name)) for name in data.__all__ if name not in ("FORMATS", "views"))
    assert sorted(data.__all__) == sorted({*data._MODULES, "views"})
    assert dir(data) == sorted(data.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = data.nothing
