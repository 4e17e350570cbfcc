"""Rows a second and peak memory of reading preference pairs: this library beside `datasets`, each in a process of its own.

    python -m benchmarks.data_reading [--rows 2000000] [--folder DIRECTORY]

``rows`` yields dictionaries, ``examples`` checked records, as training reads them; ``cached`` converts the file to Arrow
in an empty cache, then reads that; ``streamed`` reads the file itself. Imports are timed by nobody; memory counts them.
Every measurement is a line that is appended to benchmarks/results/data_reading.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "data_reading.jsonl"
PACKAGES = ("posttrain", "datasets", "pyarrow", "tokenizers", "transformers")


def write_files(folder: Path, rows: int) -> list[Path]:
    """Write the same pairs, of about 200 words each, as JSON lines and as Parquet; return the two files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    draw = random.Random(0)
    words = [
        f"{a}{b}{c}" for a in "bdfgklmnprst" for b in ("a", "e", "i", "ou", "é") for c in ("n", "r", "st", "\n", ".")
    ]

    def text(low: int, high: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(low, high)))

    lines, table = folder / "pairs.jsonl", folder / "pairs.parquet"
    schema = pa.schema([(column, pa.string()) for column in ("prompt", "chosen", "rejected")])
    with lines.open("w", encoding="utf-8") as out, pq.ParquetWriter(table, schema) as writer:
        for start in range(0, rows, 10_000):
            count = min(10_000, rows - start)
            pairs = [{"prompt": text(10, 50), "chosen": text(40, 140), "rejected": text(40, 140)} for _ in range(count)]
            out.writelines(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
            writer.write_table(pa.Table.from_pylist(pairs, schema))
    return [lines, table]


def rows(path: str) -> Iterable:
    from posttrain.data.records import records

    return records(path)


def examples(path: str) -> Iterable:
    from posttrain.data import stream

    return stream(path)


def cached(path: str) -> Iterable:
    return load(path, streaming=False)


def streamed(path: str) -> Iterable:
    return load(path, streaming=True)


def load(path: str, *, streaming: bool) -> Iterable:
    import datasets

    datasets.disable_progress_bars()
    builder = "parquet" if path.endswith(".parquet") else "json"
    cache = str(Path(path).with_name("cache"))
    return datasets.load_dataset(builder, data_files=path, split="train", streaming=streaming, cache_dir=cache)


READERS: dict[str, Callable[[str], Iterable]] = {
    "posttrain rows": rows,
    "posttrain examples": examples,
    "datasets streamed": streamed,
    "datasets cached": cached,
}


def measure(reader: str, path: str) -> None:
    """Read a file to its end and print count, seconds and peak memory as JSON."""
    import datasets
    import pyarrow.parquet

    import posttrain.data

    assert datasets and pyarrow.parquet and posttrain.data
    began, before = time.perf_counter(), time.process_time()
    count = sum(1 for _ in READERS[reader](path))
    seconds, busy = time.perf_counter() - began, time.process_time() - before
    unit = 1024 if sys.platform != "darwin" else 1024**2
    print(
        json.dumps(
            {
                "rows": count,
                "seconds": round(seconds, 3),
                "cpu_s": round(busy, 3),
                "rows_per_s": round(count / seconds),
                "rows_per_cpu_s": round(count / busy),
                "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit),
            }
        )
    )


def main() -> None:
    """Write the files, measure every reader on each, print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--folder", default=None, help="where to write the files (default: a temporary directory)")
    parser.add_argument("--measure", nargs=2, metavar=("READER", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(*options.measure)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for path in write_files(Path(folder), options.rows):
            print(f"{path.suffix[1:]}, {path.stat().st_size / 1e6:.0f} MB, {options.rows:,} rows")
            for reader in READERS:
                child = [sys.executable, __file__, "--measure", reader, str(path)]
                found = json.loads(subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True).stdout)
                assert found["rows"] == options.rows
                keep("reading", path, reader, found)


def keep(benchmark: str, path: Path, contender: str, found: dict) -> None:
    """Print a measurement and append it to the results, with what it was made on."""
    rates = f"{found['rows_per_s']:10,} rows/s {found['rows_per_cpu_s']:10,} rows/CPU s"
    print(f"  {contender:24}{rates} {found['peak_mib']:8,} MiB peak", flush=True)
    where = {"cpus": os.cpu_count(), "load": round(os.getloadavg()[0], 1), "python": platform.python_version()}
    what = {"benchmark": benchmark, "date": time.strftime("%Y-%m-%d"), "kind": path.suffix[1:], "contender": contender}
    versions = {name: version(name) for name in PACKAGES}
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as out:
        out.write(json.dumps({**what, **found, **where, **versions}) + "\n")


if __name__ == "__main__":
    main()
