from __future__ import annotations

import gzip
import json
import subprocess
import sys

import pytest

from posttrain.data import file_hash, parse_row, read_jsonl, resolve_data
from posttrain.errors import ConfigError, DataError
from posttrain.types import Message

HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: more\n\nAssistant: "


def write(path, *rows):
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n"
    if path.suffix == ".gz":
        with gzip.open(path, "wt", encoding="utf-8") as handle:
            handle.write(text)
    else:
        path.write_text(text, encoding="utf-8")
    return path


def roles(messages):
    return [m.role for m in messages]


def test_reads_every_format(tmp_path):
    path = write(
        tmp_path / "all.jsonl",
        {"prompt": "p", "completion": "c", "kind": "copy"},
        {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "completion": "c"},
        {"prompt": "p", "chosen": "good", "rejected": "bad"},
        {
            "prompt": "p",
            "completions": ["a", "b", "c"],
            "failures": [None, None, "rude"],
            "reason": "b hedges",
        },
        {
            "messages": [
                {"role": "user", "content": "u"},
                {"role": "assistant", "content": "a", "train": True},
            ]
        },
        {"prompt": "p", "answer": 42},
        {"chosen": HH + "good", "rejected": HH + "bad"},
    )
    first, listed, pair, ranking, messages, prompt, hh = read_jsonl(path)
    assert (first.kind, first.prompt[0].content, first.responses[0].text) == ("copy", "p", "c")
    assert first.responses[0].rank is None
    assert roles(listed.prompt) == ["system", "user"]
    assert [(r.text, r.rank) for r in pair.responses] == [("good", 0), ("bad", 1)]
    assert [(r.text, r.rank, r.failure) for r in ranking.responses] == [
        ("a", 0, None),
        ("b", 1, None),
        ("c", 2, "rude"),
    ]
    assert ranking.meta == {"reason": "b hedges"}
    assert messages.responses[0].messages == (Message(role="assistant", content="a", train=True),)
    assert (prompt.responses, prompt.meta) == ((), {"answer": 42})
    assert roles(hh.prompt) == ["user", "assistant", "user"]
    assert [(r.text, r.rank) for r in hh.responses] == [("good", 0), ("bad", 1)]
    assert [e.row for e in read_jsonl(path)] == [1, 2, 3, 4, 5, 6, 7]


def test_gzip_and_plain_give_the_same_examples(tmp_path):
    row = {"prompt": "p\u2028q", "completion": "c"}
    plain, packed = write(tmp_path / "a.jsonl", row), write(tmp_path / "a.jsonl.gz", row)
    assert read_jsonl(plain)[0].prompt == read_jsonl(packed)[0].prompt
    assert read_jsonl(packed)[0].prompt[0].content == "p\u2028q"


def test_blank_lines_count_as_rows_and_bom_is_no_fault(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n  \n{"prompt": "b"}\n')
    assert [(e.row, e.prompt[0].content) for e in read_jsonl(path)] == [(1, "a"), (4, "b")]


def test_limit(tmp_path):
    path = write(tmp_path / "a.jsonl", *[{"prompt": str(i)} for i in range(5)], "broken")
    assert [e.row for e in read_jsonl(path, limit=3)] == [1, 2, 3]
    with pytest.raises(ConfigError, match="limit is 0"):
        read_jsonl(path, limit=0)


MESSAGE = {"role": "user", "content": "u"}
ANSWER = {"role": "assistant", "content": "a"}
FAULTS = [
    ('{"prompt": "p"', "'(line)': invalid JSON"),
    ("[1]", "'(line)': found a list, expected an object; write one JSON object a line"),
    ('{"prompt": "p", "prompt": "q"}', "'prompt': the key stands twice in one object; keep one"),
    ({"id": 3}, "'prompt': columns 'id' fit no format; expected {\"prompt\",\"completion\"}"),
    ({}, "'prompt': columns none fit no format"),
    ({"prompt": "p", "completon": "c"}, "'completon': unknown column; did you mean 'completion'?"),
    ({"promt": "p", "completion": "c"}, "'promt': unknown column; did you mean 'prompt'?"),
    ({"prompt": "p", "response": "c"}, "'response': unknown column; did you mean 'completion'?"),
    ({"conversations": []}, "'conversations': unknown column; did you mean 'messages'?"),
    ({"completion": "c"}, "'prompt': missing column (found 'completion'); expected"),
    ({"prompt": "p", "chosen": "c"}, "'rejected': missing column (found 'prompt', 'chosen')"),
    ({"prompt": "p", "rejected": "c"}, "'chosen': missing column"),
    (
        {"prompt": "p", "completion": "c", "chosen": "d", "rejected": "e"},
        "fit several formats; keep those of one",
    ),
    (
        {"prompt": "p", "messages": [MESSAGE, ANSWER]},
        "'messages': columns 'prompt', 'messages' fit several formats",
    ),
    ({"prompt": 3, "completion": "c"}, "'prompt': found a number, expected text; write a string"),
    ({"prompt": "p", "completion": None}, "'completion': found null, expected text"),
    ({"prompt": " \n", "completion": "c"}, "'prompt': empty text; fill it in or remove the row"),
    ({"prompt": "p", "completion": "\ud800"}, "'completion': half of a surrogate pair at character 0"),
    ({"prompt": "p", "completion": "c", "kind": 1}, "'kind': found a number, expected a string"),
    ({"prompt": "p", "completions": ["a"]}, "'completions': found 1 entries, expected a list of at least 2"),
    ({"prompt": "p", "completions": "ab"}, "'completions': found a string, expected a list of at least 2"),
    ({"prompt": "p", "completions": ["a", ""]}, "'completions[1]': empty text"),
    (
        {"prompt": "p", "completions": ["a", "b", "a"]},
        "'completions': answers 0 and 2 (from 0) are identical",
    ),
    (
        {"prompt": "p", "completions": ["a", "b"], "failures": ["x"]},
        "'failures': found 1 entries, expected 2",
    ),
    ({"prompt": "p", "completions": ["a", "b"], "failures": [None, 3]}, "'failures[1]': found a number"),
    ({"prompt": "p", "completion": "c", "failures": ["x"]}, "'failures': stands without 'completions'"),
    (
        {"prompt": "p", "chosen": "same", "rejected": "same"},
        "'rejected': answers 0 and 1 (from 0) are identical",
    ),
    ({"prompt": [], "completion": "c"}, "'prompt': found an empty list, expected a list of messages"),
    ({"prompt": ["hi"]}, "'prompt[0]': found a string, expected a message"),
    ({"prompt": [MESSAGE, ANSWER]}, "'prompt': ends in an assistant turn"),
    ({"prompt": [{"from": "human", "value": "x"}]}, "'prompt[0]': the message lacks ['content', 'role']"),
    (
        {"prompt": [{**MESSAGE, "name": "x"}]},
        "'prompt[0]': the message has ['name'], which nothing here reads",
    ),
    (
        {"prompt": [{"role": "asistant", "content": "x"}]},
        "unknown role 'asistant'; did you mean 'assistant'?",
    ),
    ({"prompt": [{**MESSAGE, "train": "yes"}]}, "'prompt[0].train': found a string, expected true or false"),
    (
        {"prompt": "p", "completion": [MESSAGE, ANSWER]},
        "'completion': starts with role 'user' and ends with 'assistant'",
    ),
    ({"messages": [MESSAGE]}, "'messages': ends with role 'user', expected 'assistant'"),
    ({"messages": [ANSWER]}, "'messages': nothing stands before the answer"),
    ({"chosen": "hi", "rejected": "ho"}, r"'chosen': starts with 'hi', expected '\n\nHuman: '"),
    ({"chosen": HH + "a", "rejected": HH + "a"}, "'rejected': answers 0 and 1 (from 0) are identical"),
    ({"chosen": HH + "a", "rejected": HH}, "'rejected turn 4': empty text"),
    (
        {"chosen": HH + "a", "rejected": "\n\nHuman: hi\n\nAssistant: no"},
        "differs from 'chosen' from turn 2 on (2 and 4",
    ),
    ({"chosen": HH + "a\n\nHuman: b", "rejected": HH + "c"}, "'chosen': doesn't end in an assistant turn"),
]


@pytest.mark.parametrize(("row", "expected"), FAULTS)
def test_faults_name_file_row_field_and_remedy(tmp_path, row, expected):
    path = write(tmp_path / "bad.jsonl", {"prompt": "fine"}, "", row)
    with pytest.raises(DataError) as caught:
        read_jsonl(path)
    message = str(caught.value)
    assert message.startswith(f"{path} row 3, field '")
    assert expected in message
    assert ";" in message


def test_all_faulty_rows_are_listed_or_collected(tmp_path):
    path = write(tmp_path / "bad.jsonl", *[{"prompt": ""}] * 7, {"prompt": "fine"})
    with pytest.raises(DataError) as caught:
        read_jsonl(path)
    lines = str(caught.value).splitlines()
    assert lines[0] == "7 faulty rows:"
    assert "row 5" in lines[5]
    assert lines[6] == "and 2 more"
    faults: list[DataError] = []
    assert [e.row for e in read_jsonl(path, faults=faults)] == [8]
    assert len(faults) == 7


def test_file_faults(tmp_path):
    with pytest.raises(DataError, match="no rows"):
        read_jsonl(write(tmp_path / "empty.jsonl", ""))
    with pytest.raises(ConfigError, match="no file"):
        read_jsonl(tmp_path / "none.jsonl")
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ConfigError, match="of another kind"):
        read_jsonl(tmp_path / "a.csv")
    whole = write(tmp_path / "a.jsonl.gz", {"prompt": "p" * 1000}).read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-12])
    with pytest.raises(DataError, match="not a whole gzip file"):
        read_jsonl(tmp_path / "cut.jsonl.gz")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"row 1, field '\(line\)': byte 15 is not UTF-8"):
        read_jsonl(tmp_path / "latin.jsonl")


def test_answers_given_as_whole_conversations_lose_the_prompt():
    row = {"prompt": "u", "chosen": [MESSAGE, ANSWER], "rejected": [MESSAGE, {**ANSWER, "content": "b"}]}
    example = parse_row(row)
    assert [r.text for r in example.responses] == ["a", "b"]
    shared = [MESSAGE, ANSWER, MESSAGE]
    row = {"chosen": [*shared, ANSWER], "rejected": [*shared, {**ANSWER, "content": "b"}]}
    example = parse_row(row)
    assert roles(example.prompt) == ["user", "assistant", "user"]
    assert [r.text for r in example.responses] == ["a", "b"]


def test_multi_turn_transcripts_keep_words_that_look_like_turns():
    row = {"chosen": HH + "Human: is a word", "rejected": HH + "no\nHuman: too"}
    assert [r.text for r in parse_row(row).responses] == ["Human: is a word", "no\nHuman: too"]


def test_resolve_data(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    rankings = write(folder / "rankings.jsonl", {"prompt": "p", "chosen": "a", "rejected": "b"})
    prompts = write(folder / "heldout_prompts.jsonl.gz", {"prompt": "p"})
    extra = write(folder / "notes.jsonl", {"prompt": "p"})
    assert resolve_data(folder) == {"rankings": rankings, "heldout_prompts": prompts, "notes": extra}
    assert resolve_data(str(rankings)) == {"rankings": rankings}
    other = write(tmp_path / "mine.jsonl", {"prompt": "p", "completion": "c"})
    assert resolve_data(other) == {"demonstrations": other}
    with pytest.raises(ConfigError, match=r"unknown data 'defualt'.*did you mean 'default'\?"):
        resolve_data("defualt")
    with pytest.raises(ConfigError, match=r"did you mean '.*mine\.jsonl'\?"):
        resolve_data(tmp_path / "mime.jsonl")


def test_resolve_data_refuses_unclear_directories(tmp_path):
    with pytest.raises(ConfigError, match=r"has no \.jsonl"):
        resolve_data(tmp_path)
    write(tmp_path / "prompts.jsonl", {"prompt": "p"})
    write(tmp_path / "demonstration.jsonl", {"prompt": "p"})
    with pytest.raises(ConfigError, match=r"did you mean 'demonstrations'\?"):
        resolve_data(tmp_path)
    (tmp_path / "demonstration.jsonl").unlink()
    write(tmp_path / "prompts.jsonl.gz", {"prompt": "p"})
    with pytest.raises(ConfigError, match="has both"):
        resolve_data(tmp_path)


def test_file_hash(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    assert file_hash(path) == "ba7816bf8f01cfea"  # FIPS 180-2, appendix B.1


def test_reading_imports_no_torch():
    code = "import sys, posttrain.data; assert not {'torch', 'transformers'} & set(sys.modules), 'heavy'"
    subprocess.run([sys.executable, "-c", code], check=True)
