"""Decode speed beside vLLM: ``python -m benchmarks.decode [--peer vllm|none] [--batches 1 32] [--dtype bf16|fp32]``.

First both sides take the likeliest tokens in fp32, which must be the same. Then each continues the same prompts by the
same numbers of tokens at temperature 1, whatever stop tokens are drawn, in a process of its own, in turn. What counts is the
time by which a call of many tokens takes longer than one of few: prompts and preparation are in both. Results are
appended to ``benchmarks/results``; a call that was cut off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.compare.counts import Shape, shape_of
from benchmarks.compare.peers import ROOT, python_of
from benchmarks.compare.report import drift_line, rate
from benchmarks.compare.session import RESULTS, Session, Task, open_session, read_sessions
from benchmarks.compare.workload import read_rows

from posttrain.machine import fast_bf16, keep_freed_memory, yield_between_kernels

FEW, MANY = 8, 72
"""Tokens a sequence of the two calls that are compared."""

LONGEST = 128
"""Tokens of the longest prompt."""


def main() -> None:
    """Run what is missing and print what was measured; with the name of a job's file, run that job as our side."""
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        work(json.loads(Path(sys.argv[1]).read_text()))
        return
    options = arguments()
    if options.peer != "none":
        python_of(options.peer)
    session, tasks = prepare(options)
    done = len(session.results)
    stop = None if options.processes is None else done + options.processes
    session.run(tasks[:stop], options.peer)
    if len(session.results) < len(tasks):
        print(f"{len(session.results)} of {len(tasks)} processes have run; the same command goes on")
        return
    print("\n".join(lines(session)))
    print(f"kept in {session.file.relative_to(ROOT)}")


def arguments() -> argparse.Namespace:
    """Options; bf16 is the default where the processor multiplies it by itself."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    parser.add_argument("--peer", choices=["vllm", "none"], default="vllm")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16" if fast_bf16() else "fp32")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3, help="timed calls of each length a repeat")
    parser.add_argument("--processes", type=int, help="stop after this many; a later call goes on")
    return parser.parse_args()


def prepare(options: argparse.Namespace) -> tuple[Session, list[Task]]:
    """The session and its processes, sides in turn forwards and backwards."""
    from posttrain.models.load import find_model

    found = find_model(options.model)
    data, items = read_rows(found.path, 1024)
    short = [item["prompt"] for item in items if len(item["prompt"]) <= LONGEST]
    prompts = random.Random(0).sample(short, max(options.batches))
    threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or len(os.sched_getaffinity(0))
    job = {
        "row": "decode", "module": "benchmarks.decode", "device": "cpu", "dtype": options.dtype, "threads": threads,
        "model": found.path, "batches": options.batches, "few": FEW, "many": MANY, "rounds": options.rounds,
        "prompts": prompts, "greedy": False,
    }  # fmt: skip
    check = job | {"dtype": "fp32", "greedy": True, "prompts": prompts[:4], "many": 24}
    sides = ["ours"] if options.peer == "none" else ["ours", options.peer]
    tasks = [Task("check", side, side, check) for side in sides if len(sides) == 2]
    for r in range(options.repeats):
        tasks += [Task(f"repeat {r + 1}", side, side, job) for side in (sides[::-1] if r % 2 else sides)]
    about = {key: job[key] for key in ("row", "device", "dtype", "threads", "batches", "few", "many", "rounds")}
    about |= {"shape": shape_of(found.path)._asdict(), "data": data, "prompt": [len(p) for p in prompts]}
    about |= {"repeats": options.repeats, "label": found.label, "peer": options.peer, "columns": sides}
    keyed = [[t.part, t.side] for t in tasks]
    return open_session(f"cpu-{options.dtype}", about, keyed, len(tasks), kind="decode"), tasks


def work(job: dict[str, Any]) -> None:
    """Our side of a job."""
    yield_between_kernels()  # as the command does, before torch is imported
    keep_freed_memory()
    sys.path.insert(0, str(ROOT / "benchmarks" / "compare"))  # as the peer's script finds them
    import measure
    from decoding import timings

    from posttrain.models.load import load_policy
    from posttrain.rollout.engine import Request, Sampling
    from posttrain.rollout.local import LocalEngine

    engine = LocalEngine(
        load_policy(job["model"], dtype=measure.DTYPES[job["dtype"]]), frozenset(), slots=max(job["batches"])
    )

    def generate(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        requests = [Request(tuple(ids), (1, k)) for k, ids in enumerate(prompts)]
        how = Sampling(max_new_tokens=tokens, temperature=0.0 if job["greedy"] else 1.0)
        return [list(rollout.ids) for rollout in engine.generate(requests, how)]

    measure.measured(job, lambda clock: timings(job, generate, clock))


def repeats(session: Session, column: str) -> list[dict[str, Any]]:
    """A column's results, in the order of repeats."""
    return [r for r in session.results if r["column"] == column and r["part"].startswith("repeat")]


def speed(session: Session, result: dict[str, Any], batch: int) -> float:
    """Tokens a second of decoding, from the medians of the two calls' seconds."""
    few, many = (
        median(c["seconds"] for c in result["calls"] if (c["batch"], c["tokens"]) == (batch, session.header[key]))
        for key in ("few", "many")
    )
    return batch * (session.header["many"] - session.header["few"]) / (many - few)


def lines(session: Session) -> list[str]:
    """Ratios at each batch, largest first, then tokens a second and the share of the copy bandwidth."""
    h = session.header
    out: list[str] = []
    if h["peer"] != "none":
        same = {r["side"]: r["ids"] for r in session.results if r["part"] == "check"}
        if same["ours"] != same[h["peer"]]:
            raise SystemExit(f"in fp32 the sides do not take the same likeliest tokens: {same}")
        count = sum(map(len, same["ours"]))
        out.append(f"likeliest tokens in fp32: all {count} the same")
    for batch in sorted(h["batches"], reverse=True):
        speeds = {c: [speed(session, r, batch) for r in repeats(session, c)] for c in h["columns"]}
        if h["peer"] != "none":
            ratios = [a / b for a, b in zip(speeds["ours"], speeds[h["peer"]], strict=True)]
            out.append(
                f"decode batch {batch} vs {h['peer']}: {median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
            )
        out += [f"  {c}: {median(x):.1f} tokens/s ({min(x):.1f} to {max(x):.1f})" for c, x in speeds.items()]
        if batch == 1:
            out += [f"  {bandwidth_line(session, c)}" for c in h["columns"]]
    return [*out, drift_line(session)]


def bandwidth_line(session: Session, column: str) -> str:
    """Bytes of weights that one sequence's steps read a second, beside the copy bandwidth measured around them."""
    size = Shape(**session.header["shape"]).parameters * (2 if session.header["dtype"] == "bf16" else 4)
    read = [(size * speed(session, r, 1) / 1e9, rate(r, "gbs")) for r in repeats(session, column)]
    gbs, share = median(x for x, _ in read), median(x / copy for x, copy in read)
    return f"{column}: {gbs:.1f} GB/s of weights, {share:.0%} of the copy bandwidth"


def sections() -> list[str]:
    """The rows of the performance page: of each file the newest session with all repeats."""
    newest: dict[Path, Session] = {}
    for file in sorted(RESULTS.glob("decode-*.jsonl")):
        for session in read_sessions(file):
            if all(len(repeats(session, c)) == session.header["repeats"] for c in session.header["columns"]):
                newest[file] = session
    return [section(session) for session in newest.values()]


def section(session: Session) -> str:
    """A row: its command, conditions and figures."""
    h = session.header
    peer = next((f"; vLLM {r['vllm']} with torch {r['torch']}" for r in session.results if "vllm" in r), "")
    versions = ", ".join(f"{k} {v}" for k, v in h["versions"].items())
    head = [
        f"## decode, {h['dtype']}, {h['device']}\n",
        f"    python -m benchmarks.decode --dtype {h['dtype']} --peer {h['peer']}\n",
        f"{h['date']}, {h['machine']['processor']}, {h['threads']} threads; {h['label']}; {h['data']}, prompts of up to "
        f"{max(h['prompt'])} tokens; {h['repeats']} repeats; {versions}{peer}. Both sides draw {h['many']} tokens a "
        f"sequence at temperature 1, whatever stop tokens are among them; the time of {h['few']} is taken off, and with "
        "it that of prompts and preparation.\n",
    ]
    return "\n".join([*head, *(f"{'  ' * x.startswith(' ')}- {x.strip()}" for x in lines(session)), ""])


if __name__ == "__main__":
    main()
