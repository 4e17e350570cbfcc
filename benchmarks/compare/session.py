"""A row's processes: what runs, in which order, and the file that they append to and go on from."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.compare.peers import ROOT, python_of

RESULTS = ROOT / "benchmarks" / "results"
Job = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One process: what it is for (``check``, ``memory`` or ``repeat 3``), and which side and column it is."""

    part: str
    column: str
    side: str
    job: Job


@dataclass
class Session:
    """A header and the results so far, kept as JSON lines; `header` says on what, with what and when."""

    file: Path
    header: dict[str, Any]
    results: list[dict[str, Any]]

    def run(self, tasks: list[Task], peer: str) -> None:
        """Run what has no result yet, one process after another."""
        done = {(r["part"], r["column"], r["side"]) for r in self.results}
        for task in tasks:
            if (task.part, task.column, task.side) in done:
                continue
            result = run_task(task, peer)
            record = {"part": task.part, "column": task.column, "side": task.side, **result}
            self.results.append(record)
            with self.file.open("a") as out:
                out.write(json.dumps(record) + "\n")
            seconds = ", ".join(f"{step['total']:.1f}" for step in result["steps"])
            name = task.column if task.side == "ours" else f"{task.side} {task.column}"
            print(f"{task.part}, {name}: {f'steps of {seconds} s' if seconds else 'done'}", flush=True)


def run_task(task: Task, peer: str) -> dict[str, Any]:
    """Start one side's process with the job in a file; its output is kept from ours and shown only if it fails.

    Raises:
        SystemExit: the process failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        file, result = Path(folder) / "job.json", Path(folder) / "result.json"
        file.write_text(json.dumps(task.job | {"column": task.column, "result": str(result)}))
        if task.side == "ours":
            call = [sys.executable, "-m", task.job.get("module", "benchmarks.compare.ours"), str(file)]
        else:
            call = [str(python_of(peer)), str(ROOT / "benchmarks" / "compare" / f"peer_{peer}.py"), str(file)]
        environment = os.environ | {
            "OMP_NUM_THREADS": str(task.job["threads"]),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": folder,
            "TOKENIZERS_PARALLELISM": "false",
        }
        done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode or not result.exists():
            tail = "\n".join((done.stdout + done.stderr).splitlines()[-25:])
            raise SystemExit(f"{task.side} {task.column} ({task.part}) failed with status {done.returncode}:\n{tail}")
        return json.loads(result.read_text())


def plan(jobs: dict[str, dict[str, Job]], repeats: int, peer: str) -> list[Task]:
    """The first batch on both sides, then repeats with the columns in turn forwards and backwards, then memory.

    ``jobs`` maps ``check``, ``repeat``, ``step`` (whole steps, where a repeat is of updates alone) and ``memory`` to jobs by
    column.
    """

    def tasks(part: str, kind: str, backwards: bool = False) -> list[Task]:
        columns = sorted(jobs.get(kind, {}).items(), key=lambda item: item[0] != "ours", reverse=backwards)
        return [Task(part, c, "ours" if c.startswith("ours") else peer, job) for c, job in columns]

    timed = [
        task
        for r in range(repeats)
        for kind in ("repeat", "step")
        for task in tasks(f"{kind} {r + 1}", kind, backwards=r % 2 == 1)
    ]
    return [*tasks("check", "check"), *timed, *tasks("memory", "memory")]


def open_session(name: str, about: dict[str, Any], jobs: Any, tasks: int, kind: str = "compare") -> Session:
    """Go on with the newest session of a file if it is of the same jobs and code and lacks results, else begin one."""
    file = RESULTS / f"{kind}-{name}.jsonl"
    RESULTS.mkdir(exist_ok=True)
    key = hashlib.sha256(json.dumps([about, jobs, _source()], sort_keys=True).encode()).hexdigest()[:16]
    sessions = read_sessions(file)
    if file.exists() and not file.read_text().endswith("\n"):  # a line that was cut off
        with file.open("a") as out:
            out.write("\n")
    if sessions and sessions[-1].header["key"] == key and len(sessions[-1].results) < tasks:
        print(f"going on after {len(sessions[-1].results)} of {tasks} processes", flush=True)
        return sessions[-1]
    header = {
        "key": key,
        "date": datetime.date.today().isoformat(),
        **about,
        "machine": machine(),
        "versions": versions(),
    }
    with file.open("a") as out:
        out.write(json.dumps({"header": header}) + "\n")
    return Session(file, header, [])


def read_sessions(file: Path) -> list[Session]:
    """All sessions of a file, oldest first; a line that was cut off is left out."""
    found: list[Session] = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if "header" in record:
            found.append(Session(file, record["header"], []))
        else:
            found[-1].results.append(record)
    return found


def machine() -> dict[str, Any]:
    """Processor and cores."""
    try:
        rows = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(row.partition(":")[2].strip() for row in rows if row.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor()
    return {"processor": name, "cores": os.cpu_count(), "system": platform.system()}


def versions() -> dict[str, str]:
    """Ours; a peer's stand in its results."""
    return {"python": platform.python_version()} | {p: version(p) for p in ("posttrain", "torch", "transformers")}


def _source() -> str:
    """A hash of our code and this package's, so that timings of different code are never one session."""
    digest = hashlib.sha256()
    for file in sorted([*(ROOT / "src").rglob("*.py"), *Path(__file__).parent.glob("*.py")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()
