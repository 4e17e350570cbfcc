"""What is written is read back code point for code point; damage never reads as anything but faults or rows."""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import replace

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from posttrain.data import read, write_jsonl
from posttrain.data.formats.turns import identity
from posttrain.data.write import row_of
from posttrain.errors import ConfigError, DataError
from posttrain.types import Example, Message, Preference, Response, Step, Target, ToolCall

few = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

# Characters that end a line for some reader, or that a careless one would normalise, escape or drop.
ODD = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\ufeff\x00\x7f\ufffe\uffff\u0301\U0001f600\U0010ffff\"\\'/"
anything = st.text(st.one_of(st.sampled_from(ODD), st.characters(exclude_categories=["Cs"])), max_size=12)
said = anything.map(lambda text: text if text.strip() else text + "x")
numbers = st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**80), 2**80) | numbers | anything,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(anything, inner, max_size=3),
    max_leaves=6,
)
objects = st.dictionaries(anything, values, max_size=3)
calls = st.lists(st.builds(ToolCall, name=said, arguments=objects, id=said | st.just("")), min_size=1, max_size=2)
maybe = st.none() | st.booleans()
turn = st.one_of(
    st.builds(Message, role=st.sampled_from(["system", "developer", "user", "assistant"]), content=said, train=maybe),
    st.builds(Message, role=st.just("assistant"), content=anything, tool_calls=calls.map(tuple)),
    st.builds(Message, role=st.just("tool"), content=anything, name=said | st.just(""), call_id=said | st.just("")),
)
turns = st.lists(turn, min_size=1, max_size=3).map(tuple)
steps = st.lists(st.builds(Step, text=anything, label=st.sampled_from([None, -1, 0, 1])), max_size=2).map(tuple)
response = st.builds(
    Response,
    messages=turns,
    rank=st.none() | st.integers(0, 9),
    score=st.none() | numbers,
    label=maybe,
    attributes=st.dictionaries(anything, numbers, max_size=2),
    steps=steps,
    failure=st.none() | said,
    meta=objects,
)
target = st.one_of(
    st.builds(Target, kind=st.sampled_from(["number", "text"]), answer=anything),
    st.builds(Target, kind=st.just("choice"), choices=st.just(("a", "", "\x85")), correct=st.just((0, 2))),
    st.builds(Target, kind=st.just("code"), tests=st.lists(said, max_size=2).map(tuple)),
    st.builds(
        Target, kind=st.just("constraints"), constraints=st.lists(st.tuples(said, objects), max_size=2).map(tuple)
    ),
)


@st.composite
def examples(draw) -> Example:
    answers = draw(st.lists(response, max_size=3, unique_by=lambda r: identity(r.messages)))
    places = st.lists(st.integers(0, len(answers) - 1), min_size=2, max_size=2, unique=True)
    preference = st.builds(
        lambda ab, better, axis, by: Preference(a=ab[0], b=ab[1], better=better, axis=axis, by=by),
        places,
        st.floats(0, 1),
        anything,
        anything,
    )
    return Example(
        prompt=draw(turns),
        responses=tuple(answers),
        preferences=tuple(draw(st.lists(preference, max_size=2))) if len(answers) > 1 else (),
        target=draw(st.none() | target),
        tools=tuple(draw(st.lists(objects, max_size=2))),
        weight=draw(st.floats(0, allow_infinity=False)),
        kind=draw(anything),
        meta=draw(objects),
    )


@few
@given(rows=st.lists(examples(), min_size=1, max_size=3), suffix=st.sampled_from(["", ".gz", ".zst"]))
def test_what_is_written_is_read_back(tmp_path, rows, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    assert write_jsonl(path, rows) == len(rows)
    assert read(path) == [replace(row, file=str(path), row=i) for i, row in enumerate(rows, 1)]
    first = path.read_bytes()
    write_jsonl(path, read(path))
    assert path.read_bytes() == first


@few
@given(prompt=said, completion=said)
def test_any_text_survives_every_container(tmp_path, prompt, completion):
    """JSON lines with and without escapes, an array, a table."""
    row = {"prompt": prompt, "completion": completion}
    cells = ",".join('"' + text.replace('"', '""') + '"' for text in row.values())
    for name, text in [
        ("a.jsonl", json.dumps(row, ensure_ascii=False)),
        ("b.jsonl", json.dumps(row)),
        ("c.json", json.dumps([row], ensure_ascii=False, indent=1)),
        ("d.csv", f"prompt,completion\n{cells}\n"),
    ]:
        (tmp_path / name).write_bytes(text.encode())
        (found,) = read(tmp_path / name)
        assert (found.prompt[0].content, found.responses[0].text) == (prompt, completion), name


EXAMPLES = [
    Example(prompt=(Message(role="user", content=f"Question {i}?"),), meta={"n": i, "x": "\u2028é"}) for i in range(40)
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of one set of examples in each container."""
    folder = tmp_path_factory.mktemp("whole")
    for suffix in ("", ".gz", ".zst"):
        write_jsonl(folder / f"a.jsonl{suffix}", EXAMPLES)
    lines = (folder / "a.jsonl").read_bytes()
    array = b"[" + b",\n".join(lines.splitlines()) + b"]"
    table = "prompt,kind\n" + "".join(f'"Question {i}, or not?",é\n' for i in range(40))
    made = {f"a.jsonl{suffix}": (folder / f"a.jsonl{suffix}").read_bytes() for suffix in ("", ".gz", ".zst")}
    return made | {"a.json": array, "a.csv": table.encode(), "a.yaml": b"- prompt: a\n  kind: b\n- prompt: c\n"}


@settings(few, max_examples=400)
@given(data=st.data())
def test_damage_gives_faults_or_rows_and_packed_files_only_their_own(tmp_path, whole, data):
    name = data.draw(st.sampled_from(sorted(whole)))
    damaged = bytearray(whole[name])
    for at in data.draw(st.lists(st.integers(0, len(damaged) - 1), min_size=1, max_size=3)):
        damaged[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(0, len(damaged))) :]
    path = tmp_path / name
    path.write_bytes(bytes(damaged))
    try:
        found = read(path, skip_bad=data.draw(st.sampled_from([0, 3])))
    except (DataError, ConfigError) as error:
        assert len(str(error)) < 1200
        return
    if name.endswith((".gz", ".zst")):
        assert [replace(e, file="", row=0) for e in found] == EXAMPLES


def example(**fields) -> Example:
    return Example(prompt=(Message(role="user", content="a"),), **fields)


def test_the_row_of_an_example_leaves_defaults_out():
    assert row_of(example()) == {"prompt": [{"role": "user", "content": "a"}], "responses": []}
    call = ToolCall(name="add", arguments={"x": 1}, id="c1")
    turns = (
        Message(role="assistant", content="", tool_calls=(call,)),
        Message(role="tool", content="2", name="add", call_id="c1"),
    )
    ranked = Response(messages=turns, rank=0, score=0.0, label=False, failure="rude", steps=(Step(text="s", label=0),))
    assert row_of(example(responses=(ranked,), weight=0.5, kind="k", file="f", row=9)) == {
        "prompt": [{"role": "user", "content": "a"}],
        "responses": [
            {
                "messages": [
                    {
                        "role": "assistant",
                        "content": "",
                        "tool_calls": [{"name": "add", "arguments": {"x": 1}, "id": "c1"}],
                    },
                    {"role": "tool", "content": "2", "name": "add", "tool_call_id": "c1"},
                ],
                "rank": 0,
                "score": 0.0,
                "label": False,
                "steps": [{"text": "s", "label": 0}],
                "failure": "rude",
            }
        ],
        "weight": 0.5,
        "kind": "k",
    }


REFUSED = [
    (example(meta={"a": (1,)}), "row 1, field 'meta': would not be read back as it is; keep JSON values"),
    (example(meta={1: "a"}), "row 1, field 'meta': would not be read back as it is"),
    (example(meta={"a": math.nan}), "row 1, field '(row)': not JSON values (Out of range float values"),
    (example(meta={"a": {1}}), "row 1, field '(row)': not JSON values (Object of type set"),
    (example(kind="\ud800"), "row 1, field '(row)': half of a surrogate pair; remove it"),
    (example(weight=-1.0), "row 1, field 'weight': found -1, expected at least 0"),
    (Example(prompt=(Message(role="user", content=" "),)), "row 1, field 'prompt[0].content': empty text"),
    (Example(prompt=()), "row 1, field 'prompt': found 0 entries, expected at least 1"),
    (example(responses=(Response(messages=()),)), "row 1, field 'responses[0].messages': found 0 entries"),
    (example(preferences=(Preference(a=0, b=1, better=1),)), "row 1, field 'preferences[0].a': found 0, expected"),
]


@pytest.mark.parametrize(("row", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_what_could_not_be_read_back_is_not_written(tmp_path, row, message):
    path = tmp_path / "a.jsonl"
    path.write_text("before")
    with pytest.raises(DataError) as caught:
        write_jsonl(path, [row])
    assert message in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]
    assert path.read_text() == "before"


def test_names_that_say_another_kind_are_refused(tmp_path):
    for name in ("a.json", "a.parquet", "a.txt", "a.jsonl.bz2"):
        with pytest.raises(ConfigError, match=r"expected a name ending in \.jsonl, \.jsonl\.gz or \.jsonl\.zst"):
            write_jsonl(tmp_path / name, EXAMPLES)
    with pytest.raises(ConfigError, match=r"can't write '.*': No such file or directory"):
        write_jsonl(tmp_path / "none" / "a.jsonl", EXAMPLES)


def test_bytes_depend_on_the_examples_only(tmp_path):
    for suffix, unpack in (("", bytes), (".gz", gzip.decompress), (".zst", zstandard.ZstdDecompressor().decompressobj)):
        for name in ("a", "other"):
            write_jsonl(tmp_path / f"{name}.jsonl{suffix}", EXAMPLES)
        data = [(tmp_path / f"{name}.jsonl{suffix}").read_bytes() for name in ("a", "other")]
        assert data[0] == data[1]
        text = unpack().decompress(data[0]) if suffix == ".zst" else unpack(data[0])
        assert text.count(b"\n") == 40
    first = json.loads((tmp_path / "a.jsonl").read_text("utf-8").splitlines()[0].split("\u2028")[0] + '"}}')
    assert first["prompt"] == [{"role": "user", "content": "Question 0?"}]
