"""Rows of every kind of source: the same rows whatever holds them, and nothing read whole that can be long."""

from __future__ import annotations

import gzip
import json
import tracemalloc

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from posttrain.data.records import found_rows, records
from posttrain.data.strict import leaves
from posttrain.errors import ConfigError, DataError

ROWS = [
    {"prompt": "Name a colour.", "completion": "Red."},
    {"prompt": "line\u2028separators \x85 and \u2029\nbreaks", "completion": 'a "quote", a \\ and \x7f'},
    {"prompt": "\U0001f600 é", "completion": "two\r\nlines"},
]
LINES = "\n".join(json.dumps(row, ensure_ascii=i % 2 == 0) for i, row in enumerate(ROWS)) + "\n"
YAML = "".join(f"- prompt: {json.dumps(r['prompt'])}\n  completion: {json.dumps(r['completion'])}\n" for r in ROWS)


def table(separator: str) -> str:
    cells = [[row["prompt"].replace('"', '""'), row["completion"].replace('"', '""')] for row in ROWS]
    return "".join(f'"{a}"{separator}"{b}"\n' for a, b in [["prompt", "completion"], *cells])


def parquet() -> bytes:
    out = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), out, row_group_size=2)
    return out.getvalue().to_pybytes()


LAID_OUT = json.dumps(ROWS, indent=2)
FILES = {
    "a.jsonl": LINES.encode(),
    "a.ndjson": LINES.replace("\n", "\r\n").encode(),
    "bom.jsonl": b"\xef\xbb\xbf" + LINES.encode(),
    "no_last_break.jsonl": LINES.rstrip("\n").encode(),
    "lines.json": LINES.encode(),
    "a.json": json.dumps(ROWS).encode(),
    "laid_out.json": LAID_OUT.encode(),
    "array.jsonl": ("\n\n" + LAID_OUT).encode(),
    "sequence.json": "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
    "one_list.json": json.dumps({"rows": ROWS}).encode(),
    "bom.json": b"\xef\xbb\xbf" + LAID_OUT.encode(),
    "no_suffix": LINES.encode(),
    "lines.csv": LINES.encode(),
    "a.csv": table(",").encode(),
    "bom.csv": b"\xef\xbb\xbf" + table(",").encode(),
    "a.tsv": table("\t").encode(),
    "a.yaml": YAML.encode(),
    "a.parquet": parquet(),
    "parquet_named.jsonl": parquet(),
    "a.jsonl.gz": gzip.compress(LINES.encode()),
    "two_members.jsonl.gz": gzip.compress(LINES[:60].encode()) + gzip.compress(LINES[60:].encode()),
    "gzip_unnamed.jsonl": gzip.compress(LINES.encode()),
    "a.csv.gz": gzip.compress(table(",").encode()),
    "a.json.gz": gzip.compress(LAID_OUT.encode()),
    "a.yaml.zst": zstandard.compress(YAML.encode()),
    "a.jsonl.zst": zstandard.compress(LINES.encode()),
    "two_frames.jsonl.zst": zstandard.compress(LINES[:60].encode()) + zstandard.compress(LINES[60:].encode()),
    "zst_unnamed.tsv": zstandard.compress(table("\t").encode()),
}


@pytest.mark.parametrize("name", FILES)
def test_the_same_rows_whatever_holds_them(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(FILES[name])
    found = list(records(path))
    assert [row for _, row in found] == ROWS
    assert {place.file for place, _ in found} == {str(path)}


def test_row_numbers_are_lines_or_elements(tmp_path):
    def numbers(name: str, text: str) -> list[int]:
        (tmp_path / name).write_text(text, newline="")
        return [place.row for place, _ in records(tmp_path / name)]

    assert numbers("a.jsonl", '\n{"a": 1}\r\n\n  \n{"b": 2}\n') == [2, 5]
    assert numbers("a.csv", '\nprompt,kind\na,b\n"c\nd","e\n"\n\nf,g\n') == [3, 4, 8]
    assert numbers("a.json", '[\n\n{"a": 1},\n\n{"b": 2}]') == [1, 2]
    assert numbers("a.yaml", "\n- a: 1\n\n- b: 2\n") == [1, 2]


def test_an_object_of_objects_is_rows_by_name(tmp_path):
    path = tmp_path / "named.json"
    path.write_text('{"first": {"prompt": "a"}, "second": {"prompt": "b"}}')
    assert [row for _, row in records(path)] == [{"key": "first", "prompt": "a"}, {"key": "second", "prompt": "b"}]
    path.write_text('{"prompt": "a", "completion": "b"}')
    assert [row for _, row in records(path)] == [{"prompt": "a", "completion": "b"}]
    path.write_text('{"messages": [{"role": "user", "content": "a"}]}')
    assert [place.row for place, _ in records(path)] == [1]


def test_reading_goes_on_after_a_faulty_row(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1, "a": 2}, {"b": NaN}, 3, {"c": "\\ud800"}, {"d": 4}]')
    found = [row if isinstance(row, dict) else str(row) for _, row in found_rows(path)]
    assert found == [
        f"{path} row 1, field 'a': the key stands twice in one object; keep one",
        f"{path} row 2, field '(row)': NaN is no JSON value; write a finite number or null",
        f"{path} row 3, field '(row)': found a number, expected an object; write each row as one JSON object",
        f"{path} row 4, field 'c': half of a surrogate pair; remove the broken escape",
        {"d": 4},
    ]
    with pytest.raises(DataError, match="row 1, field 'a'"):
        list(records(path))


def test_shards_are_read_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 9, 1):
        (tmp_path / f"part-{number}.jsonl").write_text(json.dumps({"prompt": str(number)}) + "\n")
    (tmp_path / "README.md").write_text("What these are.")
    found = [(place.file, place.row, row["prompt"]) for place, row in records(tmp_path)]
    assert found == [(str(tmp_path / f"part-{n}.jsonl"), 1, str(n)) for n in (1, 9, 10)]


def test_data_sets_in_hand_saved_and_streamed(tmp_path):
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "saved")
    assert [row for _, row in records(data)] == ROWS
    assert [row for _, row in records(data.select([2, 0]))] == [ROWS[2], ROWS[0]]
    assert [row for _, row in records(data.to_iterable_dataset())] == ROWS
    assert [(place.row, row) for place, row in records(tmp_path / "saved")] == list(enumerate(ROWS, 1))
    both = datasets.DatasetDict({"train": data, "test": data})
    both.save_to_disk(tmp_path / "both")
    assert [row for _, row in records(tmp_path / "both" / "test")] == ROWS
    with pytest.raises(ConfigError, match=r"holds the splits test, train; name one"):
        list(records(tmp_path / "both"))
    with pytest.raises(ConfigError, match=r"got the splits train, test; expected one of them, as in data\['train'\]"):
        list(records(both))
    with pytest.raises(ConfigError, match="can't read rows of int"):
        list(records(3))


def test_a_null_in_a_structure_of_a_table_is_an_absent_field(tmp_path):
    rows = [
        {
            "messages": [
                {"role": "user", "content": "a", "name": None},
                {"role": "assistant", "content": "b", "name": "c"},
            ]
        },
        {"messages": None, "prompt": "d"},
    ]
    message = pa.struct([(key, pa.string()) for key in ("role", "content", "name")])
    schema = pa.schema([("messages", pa.list_(message)), ("prompt", pa.string())])
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "a.parquet")
    assert [row for _, row in records(tmp_path / "a.parquet")] == [
        {
            "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "c"}],
            "prompt": None,
        },
        {"messages": None, "prompt": "d"},
    ]


def test_hub_names(monkeypatch):
    with pytest.raises(ConfigError, match=r"got 'hf:only'; expected hf:ORG/NAME, hf:ORG/NAME:CONFIG"):
        list(records("hf:only"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"can't open 'hf:nobody/nothing:main/train' on the hub .*; check the name"):
        list(records("hf:nobody/nothing:main/train"))


def test_memory_does_not_grow_with_the_file(tmp_path):
    def peak(name: str, data: bytes) -> int:
        (tmp_path / name).write_bytes(data)
        source = records(tmp_path / name)
        next(source)  # imports are not counted
        tracemalloc.start()
        assert sum(1 for _ in source) == 7999
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    row = json.dumps({"prompt": "p" * 1000, "completion": "c" * 1000})
    lines, array = "\n".join([row] * 8000).encode(), f"[{','.join([row] * 8000)}]".encode()
    assert len(array) > 16e6
    assert peak("a.jsonl", lines) < 1e6
    assert peak("a.json", array) < 8e6
    assert peak("a.jsonl.gz", gzip.compress(lines, 1)) < 2e6
    assert peak("a.jsonl.zst", zstandard.compress(lines)) < 16e6  # little is fed, but it may unpack to much


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_row_of_millions_of_characters_takes_time_linear_in_its_length(tmp_path, name):
    text = "[{" * 4_000_000  # brackets in text nest nothing
    body = {"a.jsonl": json.dumps({"prompt": text}), "a.json": "[" + json.dumps({"prompt": text}, indent=1) + "]"}
    (tmp_path / name).write_text(body.get(name, f"prompt\n{text}\n"))
    ((_, row),) = records(tmp_path / name)
    assert row == {"prompt": text}


def test_a_row_has_a_largest_size(tmp_path, monkeypatch):
    monkeypatch.setattr("posttrain.data.records.MAX_ROW", 1 << 20)
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a"}\n' + json.dumps({"prompt": "b" * (1 << 21)}) + "\n")
    found = records(path)
    assert next(found)[1] == {"prompt": "a"}
    with pytest.raises(DataError, match=r"row 2, field '\(row\)': the line is longer than 1 MiB; write one row a line"):
        next(found)


def test_leaves_name_every_value_and_key():
    found = set(leaves({"a": [1, {"b": None}], "c": "d"}))
    assert found == {("a[0]", 1), ("a[1].b", None), ("c", "d"), ("(row)", "a"), ("(row)", "c"), ("a[1]", "b")}
