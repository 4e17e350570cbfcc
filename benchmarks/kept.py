"""Results kept as JSON lines, each with the machine, the versions and the date that it was measured with."""

from __future__ import annotations

import datetime
import json
import os
from typing import Any

from benchmarks.compare.session import RESULTS, machine, versions

Record = dict[str, Any]


def threads() -> int:
    """Threads that a process may use."""
    return int(os.environ.get("OMP_NUM_THREADS", 0)) or len(os.sched_getaffinity(0))


def append(name: str, record: Record) -> Record:
    """Add a record to ``benchmarks/results/NAME.jsonl``; returns it with where and when."""
    record = {"date": datetime.date.today().isoformat(), **record, "machine": machine(), "versions": versions()}
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a") as out:
        out.write(json.dumps(record) + "\n")
    return record


def read(name: str) -> list[Record]:
    """All records of a file, oldest first; none if there is no file."""
    file = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def origin(record: Record) -> str:
    """Where and when a record was made, in a line."""
    versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items())
    return f"{record['date']}, {record['machine']['processor']}, {record['threads']} threads; {record['label']}; {versions}"
