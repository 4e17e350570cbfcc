"""Every file in ``malformed`` and every faulty binary made here, against the table of messages beside them.

A line of the table is the file's name, how many examples remain with one faulty row allowed (``-`` = it stops all the
same), and the message, tab-separated.
"""

from __future__ import annotations

import gzip
import io
import os
import sqlite3
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from posttrain.data import read
from posttrain.errors import ConfigError, DataError

zstandard = pytest.importorskip("zstandard")

FOLDER = Path(__file__).parent / "malformed"
TABLE = [line.split("\t") for line in (FOLDER / "MESSAGES").read_text(encoding="utf-8").splitlines()]
GOOD = b'{"prompt": "Name a colour.", "completion": "Red."}\n'


def parquet(columns: dict, schema: pa.Schema | None = None) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(columns, schema), out)
    return out.getvalue()


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("rows.jsonl", GOOD)
    return out.getvalue()


def database() -> bytes:
    with sqlite3.connect(":memory:") as connection:
        connection.execute("create table rows (prompt text)")
        return connection.serialize()


def arrow() -> bytes:
    out = io.BytesIO()
    table = pa.table({"prompt": ["a"]})
    with pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue()


def binaries() -> dict[str, bytes]:
    """Faulty files that a text editor can't hold, by name; a name with a slash is a directory's file."""
    packed = gzip.compress(GOOD * 50, mtime=0)
    frame = zstandard.ZstdCompressor(write_checksum=True).compress(GOOD * 50)
    table = parquet({"prompt": ["a", "b"], "completion": ["c", "d"]})
    rated = {"prompt": ["a", "b"], "completion": ["c", "d"], "score": [float("nan"), 1.0]}
    deep = b'{"prompt": "a", "completion": "b", "extra": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"
    bent = b'{"prompt": "a", "completion": "b", "extra": ' + b"[" * 120 + b"]" * 120 + b"}\n"
    return {
        "empty.jsonl": b"",
        "empty.parquet": b"",
        "latin1.jsonl": GOOD + b'{"prompt": "caf\xe9", "completion": "b"}\n',
        "cesu.jsonl": GOOD + b'{"prompt": "\xed\xa0\x80", "completion": "b"}\n',
        "nul.jsonl": GOOD + b"\x00" * 64 + b"\n",
        "second_bom.jsonl": GOOD + b"\xef\xbb\xbf" + GOOD,
        "latin1.json": b"[" + GOOD + b', {"prompt": "caf\xe9"}]',
        "latin1.csv": b"prompt,completion\nName a colour.,Red.\ncaf\xe9,b\n",
        "latin1.yaml": b"- prompt: caf\xe9\n",
        "utf16.jsonl": GOOD.decode().encode("utf-16"),
        "deep.jsonl": GOOD + deep,
        "bent.jsonl": GOOD + bent,
        "deep.json": b"[" + GOOD + b"," + deep + b"]",
        "deep.yaml": b"- " + b"[" * 100_000,
        "digits.jsonl": GOOD + b'{"prompt": "a", "completion": "b", "id": ' + b"9" * 5000 + b"}\n",
        "digits.json": b'[{"prompt": "a", "id": ' + b"9" * 5000 + b"}, " + GOOD + b"]",
        "long_key.jsonl": GOOD + b'{"' + b"k" * 5000 + b'": 1, "' + b"k" * 5000 + b'": 2}\n',
        "cut.jsonl.gz": packed[:-12],
        "damaged.jsonl.gz": packed[:-8] + b"\x00\x01\x02\x03" + packed[-4:],
        "unpacked.jsonl.gz": GOOD,
        "twice.jsonl.gz": gzip.compress(packed, mtime=0),
        "cut.jsonl.zst": frame[:-9],
        "damaged.jsonl.zst": frame[:-4] + b"\x00\x01\x02\x03",
        "zip.jsonl": zipped(),
        "sqlite.jsonl": database(),
        "arrow.jsonl": arrow(),
        "pickle.jsonl": b"\x80\x04\x95\x10\x00\x00\x00",
        "cut.parquet": table[: len(table) // 2],
        "text.parquet": GOOD,
        "packed.parquet.gz": gzip.compress(table, mtime=0),
        "bytes.parquet": parquet({"prompt": ["a"], "picture": [b"\x89PNG"]}),
        "nan.parquet": parquet(rated),
        "null.parquet": parquet({"prompt": ["a", "b"], "completion": [None, "d"]}),
        "kinds/part-0.jsonl": GOOD,
        "kinds/part-1.csv": b"prompt\na\n",
        "splits/train.jsonl": GOOD,
        "splits/test.jsonl": GOOD,
        "model/part-0.jsonl": GOOD,
        "model/model.bin": b"0",
        "bare/README.md": b"# Nothing\n",
        "saved/dataset_dict.json": b'{"splits": ["train"]}',
        "saved/train/state.json": b"{}",
        "broken/state.json": b'{"_data_files": [{"filename": "data.arrow"}]}',
        "broken/dataset_info.json": b"{}",
        "broken/data.arrow": b"ARROW1\x00\x00",
    }


def test_the_table_holds_every_file_once():
    names = [name for name, _, _ in TABLE]
    files = {p.name for p in FOLDER.iterdir()} - {"MESSAGES"}
    made = {name.partition("/")[0] for name in binaries()}
    assert sorted(names) == sorted(files | made | {"absent.jsonl", "hf:nothing"})
    assert len(files) >= 40


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    for name, data in binaries().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize(("name", "remain", "message"), TABLE, ids=[name for name, _, _ in TABLE])
def test_message_and_policy(name, remain, message, made, monkeypatch, capfd):
    monkeypatch.chdir(FOLDER if (FOLDER / name).exists() else made)
    with pytest.raises((DataError, ConfigError)) as caught:
        read(name)
    assert str(caught.value) == message.replace("\\n", "\n")
    try:
        found = str(len(read(name, skip_bad=1)))
    except (DataError, ConfigError):
        found = "-"
    assert found == remain
    assert capfd.readouterr() == ("", "")
    assert os.listdir(".") != []


def test_no_message_shows_much_of_a_row():
    assert max(len(message) for _, _, message in TABLE) < 420
