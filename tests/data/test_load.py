from __future__ import annotations

import gzip
import json
import subprocess
import sys

import pytest

from posttrain.data import ReadReport, file_hash, parse_row, read, resolve_data, stream
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
    first, listed, pair, ranking, messages, prompt, hh = read(path)
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
    assert [e.row for e in read(path)] == [1, 2, 3, 4, 5, 6, 7]


def test_gzip_and_plain_give_the_same_examples(tmp_path):
    row = {"prompt": "p\u2028q", "completion": "c"}
    plain, packed = write(tmp_path / "a.jsonl", row), write(tmp_path / "a.jsonl.gz", row)
    assert read(plain)[0].prompt == read(packed)[0].prompt
    assert read(packed)[0].prompt[0].content == "p\u2028q"


def test_blank_lines_count_as_rows_and_bom_is_no_fault(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n  \n{"prompt": "b"}\n')
    assert [(e.row, e.prompt[0].content) for e in read(path)] == [(1, "a"), (4, "b")]


def test_limit(tmp_path):
    path = write(tmp_path / "a.jsonl", *[{"prompt": str(i)} for i in range(5)], "broken")
    assert [e.row for e in read(path, limit=3)] == [1, 2, 3]
    with pytest.raises(ConfigError, match="limit is 0"):
        read(path, limit=0)


MESSAGE = {"role": "user", "content": "u"}
ANSWER = {"role": "assistant", "content": "a"}
FAULTS = [
    ('{"prompt": "p"', "'(row)': invalid JSON at its end; write one JSON object a line"),
    ("[1]", "'(row)': found a list, expected an object; write one JSON object a line"),
    ('{"prompt": "p", "prompt": "q"}', "'prompt': the key stands twice in one object; keep one"),
    ({"id": 3}, "'prompt': columns 'id' fit no format; expected {\"prompt\",\"completion\"}"),
    ({}, "'prompt': columns none fit no format"),
    ({"prompt": "p", "completon": "c"}, "'completon': unknown column; did you mean 'completion'?"),
    ({"promt": "p", "completion": "c"}, "'promt': unknown column; did you mean 'prompt'?"),
    ({"prompt": "p", "response": "c"}, "'response': unknown column; did you mean 'completion'?"),
    ({"conversations": []}, "'conversations': found 0 entries, expected at least 1"),
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
    ({"prompt": "p", "completion": "\ud800"}, "'completion': half of a surrogate pair"),
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
    ({"chosen": HH + "a", "rejected": HH}, "'rejected': the final answer is empty; remove the row"),
    (
        {"chosen": HH + "a", "rejected": "\n\nHuman: hi\n\nAssistant: no"},
        "differs from 'chosen' from turn 2 on (2 and 4",
    ),
    ({"chosen": HH + "a\n\nHuman: b", "rejected": HH + "c"}, "'chosen': ends with a Human turn"),
]


@pytest.mark.parametrize(("row", "expected"), FAULTS)
def test_faults_name_file_row_field_and_remedy(tmp_path, row, expected):
    path = write(tmp_path / "bad.jsonl", {"prompt": "fine"}, "", row)
    with pytest.raises(DataError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path} row 3, field '")
    assert expected in message
    assert ";" in message


def test_the_first_fault_stops_or_so_many_are_counted(tmp_path):
    path = write(tmp_path / "bad.jsonl", {"prompt": "fine"}, *[{"prompt": ""}] * 3, {"prompt": "too"})
    fault = f"{path} row 2, field 'prompt': empty text; fill it in or remove the row"
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value) == fault
    report = ReadReport()
    assert [e.row for e in read(path, skip_bad=3, report=report)] == [1, 5]
    assert (report.rows, report.examples, report.faulty) == (5, 2, 3)
    assert report.bad == [fault, fault.replace("row 2", "row 3"), fault.replace("row 2", "row 4")]
    assert str(report) == f"5 rows, 2 examples; 3 faulty, first: {fault}"
    with pytest.raises(DataError) as caught:
        read(path, skip_bad=2)
    assert str(caught.value) == f"3 faulty rows of 4 read, more than skip_bad=2; first: {fault}"
    with pytest.raises(ConfigError, match="skip_bad is -1, expected 0"):
        stream(path, skip_bad=-1)


def test_rows_that_teach_nothing_are_counted_by_reason_in_every_mode(tmp_path):
    same, pair = {"prompt": "p", "chosen": "a", "rejected": "a"}, {"prompt": "p", "chosen": "a", "rejected": "b"}
    path = write(tmp_path / "pairs.jsonl", pair, same, "", same, pair)
    report = ReadReport()
    assert [e.row for e in read(path, report=report)] == [1, 5]
    assert report.useless == {"identical answers": 2}
    assert report.first["identical answers"][:2] == (str(path), 2)
    assert str(report) == "4 rows, 2 examples; 2 useless (identical answers, first row 2)"
    write(path, same)
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value) == (
        f"{path}: no usable row (1 rows, 0 examples; 1 useless (identical answers, first row 1))"
    )


def test_streaming_reads_no_further_than_asked(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "a"}, {"prompt": "b"}, "broken")
    found = stream(path)
    assert [next(found).row, next(found).row] == [1, 2]
    with pytest.raises(DataError, match="row 3"):
        next(found)


def test_a_named_format_and_mapped_columns(tmp_path):
    path = write(tmp_path / "a.jsonl", {"q": "p", "a": "c"})
    (example,) = read(path, format="completion", columns={"prompt": "q", "completion": "a"})
    assert (example.prompt[0].content, example.responses[0].text) == ("p", "c")
    with pytest.raises(ConfigError, match="unknown format 'completon'; did you mean 'completion'"):
        read(path, format="completon")


def test_file_faults(tmp_path):
    with pytest.raises(DataError, match="no rows"):
        read(write(tmp_path / "empty.jsonl", ""))
    with pytest.raises(ConfigError, match="no file"):
        read(tmp_path / "none.jsonl")


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


def test_resolve_data_knows_a_lone_source_by_its_first_usable_row(tmp_path):
    def part(name: str, *rows) -> str:
        path = write(tmp_path / name, *rows)
        (found,) = resolve_data(path).items()
        assert found[1] == path
        return found[0]

    assert part("a.jsonl", {"prompt": ""}, {"prompt": "p", "chosen": "a", "rejected": "b"}) == "rankings"
    assert part("b.jsonl.gz", {"prompt": "p"}) == "prompts"
    assert part("c.json", {"prompt": "p", "completion": "c", "label": False}) == "labelled"
    (tmp_path / "d.csv").write_text("prompt,completion\np,c\n")
    assert resolve_data(tmp_path / "d.csv") == {"demonstrations": tmp_path / "d.csv"}


def test_resolve_data_takes_shards_and_parts_that_are_directories(tmp_path):
    rankings, shards = tmp_path / "set" / "rankings", tmp_path / "shards"
    rankings.mkdir(parents=True)
    shards.mkdir()
    for number in (1, 2):
        write(rankings / f"part-{number}.jsonl", {"prompt": "p", "chosen": "a", "rejected": "b"})
        write(shards / f"prompts-{number}.jsonl", {"prompt": "p"})
    (tmp_path / "set" / "demonstrations.csv").write_text("prompt,completion\np,c\n")
    parts = {"rankings": rankings, "demonstrations": tmp_path / "set" / "demonstrations.csv"}
    assert resolve_data(tmp_path / "set") == parts
    assert [e.file for e in read(parts["rankings"])] == [str(rankings / f"part-{n}.jsonl") for n in (1, 2)]
    assert resolve_data(shards) == {"prompts": shards}
    with pytest.raises(ConfigError, match="a stage reads files, whose contents it remembers; got 'hf:a/b'"):
        resolve_data("hf:a/b")


def test_resolve_data_refuses_unclear_directories(tmp_path):
    with pytest.raises(ConfigError, match="has no data file; expected demonstrations, rankings"):
        resolve_data(tmp_path)
    write(tmp_path / "prompts.jsonl", {"prompt": "p"})
    write(tmp_path / "demonstration.jsonl", {"prompt": "p"})
    with pytest.raises(ConfigError, match=r"did you mean 'demonstrations'\?"):
        resolve_data(tmp_path)
    (tmp_path / "demonstration.jsonl").unlink()
    write(tmp_path / "prompts.jsonl.gz", {"prompt": "p"})
    with pytest.raises(ConfigError, match="has both"):
        resolve_data(tmp_path)
    (tmp_path / "prompts.jsonl").rename(tmp_path / "train.jsonl")
    (tmp_path / "prompts.jsonl.gz").rename(tmp_path / "test.jsonl.gz")
    with pytest.raises(ConfigError, match="aren't numbered parts of one set"):
        resolve_data(tmp_path)


def test_file_hash(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    assert file_hash(path) == "ba7816bf8f01cfea"  # FIPS 180-2, appendix B.1


def test_reading_imports_no_torch():
    code = "import sys, posttrain.data; assert not {'torch', 'transformers'} & set(sys.modules), 'heavy'"
    subprocess.run([sys.executable, "-c", code], check=True)
