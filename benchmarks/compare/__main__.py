"""Compare with a peer, row by row: ``python -m benchmarks.compare dpo|sft|reward|grpo|ppo|generate ...``.

Each call runs one row in one dtype: first the same batch on both sides, which must give the same numbers; then repeats
of one warm-up and ``--steps`` timed steps, each side in a process of its own, in turn; then peak memory where the row
has it. Results are appended to ``benchmarks/results``; a call that was cut off goes on where it stopped. Both sides
train all weights with AdamW on the same token ids, and clip.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.compare import report
from benchmarks.compare.counts import shape_of
from benchmarks.compare.peers import ROOT, python_of
from benchmarks.compare.session import open_session, plan
from benchmarks.compare.workload import (
    choose,
    completed,
    lengths,
    long_pair,
    near_ratio,
    read_rows,
    rollouts,
    with_responses,
)

from posttrain.data import stop_ids
from posttrain.machine import fast_bf16
from posttrain.models.load import find_model, load_generation_config, load_tokenizer

ROWS = {"dpo": (3, 2), "sft": (8, 1), "reward": (2, 4), "grpo": (2, 8), "ppo": (16, 1), "generate": (2, 8)}
"""Prompts a step, and responses each."""

SAMPLED = ("grpo", "ppo", "generate")
"""Rows in which responses are sampled, to forced lengths."""

RATIO = {"grpo": 4.0, "ppo": 4.0}
"""Prompt tokens over tokens of a response, where none is asked for; other rows take rows as they come."""

VARIANTS = ("steps", "batch", "responses", "ratio", "longest", "max_length")
"""Options that make another comparison of a row."""

LONG = 2048
"""Tokens of a response with its prompt where memory is measured."""


def main() -> None:
    """Run one row and print what it measured."""
    options = arguments()
    row, peer = options.row, options.peer
    found = find_model(options.model)
    if peer != "none":
        python_of(peer)
    with tempfile.TemporaryDirectory() as folder:
        make = {"generate": rollout_jobs, "grpo": reinforce_jobs, "ppo": reinforce_jobs}.get(row, training_jobs)
        about, jobs = make(options, found.path, Path(folder))
        tasks = plan(jobs, options.repeats, peer)
        about |= {"repeats": options.repeats, "label": found.label, "peer": peer}
        keyed = [[t.part, t.column, t.side] for t in tasks]
        session = open_session(f"{row}-{options.device}-{options.dtype}", about, keyed, len(tasks))
        print(f"{row}, {options.dtype}, {options.device}, {about['threads']} threads, {found.label}, {about['data']}")
        checks = [t for t in tasks if t.part == "check"]
        session.run(checks, peer)
        if checks:
            print("\n".join(report.check_lines(row, session, peer)), flush=True)
        session.run(tasks, peer)
    if peer != "none":
        print("\n".join(report.ratio_lines(session, peer)))
    lines = [*report.rate_lines(session), *report.sync_lines(session), *report.table_lines(session)]
    print("\n".join([*lines, report.drift_line(session), *report.memory_lines(session)]))
    print(f"kept in {session.file.relative_to(ROOT)}")


def arguments() -> argparse.Namespace:
    """Options; bf16 is the default where the processor multiplies it by itself."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("row", choices=list(ROWS))
    parser.add_argument(
        "--peer", choices=["trl", "hf", "none"], help="trl; hf for generate; none for ppo, which TRL has not"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["bf16", "fp32"])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="timed steps a repeat")
    parser.add_argument("--batch", type=int, help="prompts a step")
    parser.add_argument("--responses", type=int, help="responses a prompt (reward, grpo, ppo, generate)")
    parser.add_argument(
        "--ratio",
        type=float,
        help="prompt tokens over tokens of a response, 0.5 to 4 (dpo, sft, grpo, ppo); prompts are made to fit where none is near",
    )
    parser.add_argument("--longest", type=int, default=96, help="tokens of the longest response (grpo, ppo, generate)")
    parser.add_argument("--max-length", type=int, default=1024, help="longer rows are left out")
    options = parser.parse_args()
    peers = {"generate": "hf", "ppo": "none"}
    options.peer = options.peer or peers.get(options.row, "trl")
    if options.peer not in (peers.get(options.row, "trl"), "none"):
        parser.error(f"{options.row} has no column of {options.peer}")
    if options.ratio is not None and (options.row in ("reward", "generate") or not 0.5 <= options.ratio <= 4):
        parser.error("--ratio is from 0.5 to 4, and for dpo, sft, grpo and ppo")
    changed = [name for name in VARIANTS if getattr(options, name) != parser.get_default(name)]
    options.variant = " ".join(f"--{name.replace('_', '-')} {getattr(options, name)}" for name in changed)
    options.dtype = options.dtype or ("bf16" if options.device == "cuda" or fast_bf16() else "fp32")
    options.batch = options.batch or ROWS[options.row][0]
    own = options.row == "reward" or options.row in SAMPLED
    options.responses = options.responses if own and options.responses else ROWS[options.row][1]
    return options


def base_of(
    options: argparse.Namespace, model: str, data: str, rows: list[Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What every job of a session has, and what its header says; rows there without their tokens."""
    threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or len(os.sched_getaffinity(0))
    base = {"row": options.row, "device": options.device, "dtype": options.dtype, "threads": threads, "lr": 1e-5}
    timed, ids = lengths(rows[options.batch :]), hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
    about = {"shape": shape_of(model)._asdict(), "data": data, "batch": options.batch, "items": timed, "ids": ids}
    about["variant"] = options.variant
    return base | {"model": model, "per_step": options.batch}, base | about


def training_jobs(options: argparse.Namespace, model: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a session is about, and the job of each column of its parts."""
    row, peer, batch = options.row, options.peer, options.batch
    data, items = read_rows(model, options.max_length)
    items = with_responses(items, options.responses)
    if options.ratio is not None:
        items = near_ratio(items, options.ratio, batch * (options.steps + 1))
    dealt, ranked = choose(items, batch, options.steps)
    ours, about = base_of(options, model, data, dealt)
    about["long"] = LONG
    theirs = ours | {"model": reward_start(model, folder) if row == "reward" and peer != "none" else model}

    def columns(**changes: Any) -> dict[str, Any]:
        mine = {"ours": ours | changes}
        peers = {"defaults": theirs | changes, "tuned": theirs | changes} if peer != "none" else {}
        return mine | peers

    jobs = {"repeat": columns(rows=dealt)}
    if peer != "none":
        jobs["repeat"]["tuned"] = theirs | {"rows": ranked}
        once = {"dtype": "fp32", "rows": dealt[:batch] * 2}
        jobs["check"] = {"ours": ours | once, "check": theirs | once}
    if row == "dpo":
        long = {"rows": long_pair(items, LONG), "per_step": 1}
        jobs["memory"] = columns(**long) | {"ours checkpointed": ours | long | {"checkpointing": True}}
    return about, jobs


def rollout_jobs(options: argparse.Namespace, model: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same for sampling: the check takes the likeliest tokens, of short responses."""
    data, items = read_rows(model, options.max_length)
    rows = rollouts(items, options.batch, options.steps, options.responses, options.longest)
    ours, about = base_of(options, model, data, rows)
    about["longest"] = options.longest * options.steps
    ours["stops"] = sorted(stop_ids(load_tokenizer(model), load_generation_config(model)))
    columns = ["ours"] if options.peer == "none" else ["ours", "defaults", "tuned"]
    jobs = {"repeat": {c: ours | {"rows": rows} for c in columns}}
    if options.peer != "none":
        short = [row | {"lengths": [min(n, 12) for n in row["lengths"]]} for row in rows[: options.batch]]
        once = ours | {"dtype": "fp32", "rows": short, "greedy": True}
        jobs["check"] = {"ours": once, "check": once}
    return about, jobs


def reinforce_jobs(options: argparse.Namespace, model: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same for policy gradients: updates on given completions, and whole steps that sample them."""
    data, items = read_rows(model, options.max_length)
    ratio = options.ratio or RATIO[options.row]
    rows = rollouts(items, options.batch, options.steps, options.responses, options.longest, ratio)
    stops = sorted(stop_ids(load_tokenizer(model), load_generation_config(model)))
    ours, about = base_of(options, model, data, rows)
    about["longest"] = options.longest * options.steps
    ours |= {"stops": stops, "longest": options.longest}
    if options.row == "ppo":
        return about, {"repeat": {"ours": ours | {"rows": rows}}}
    rows = old_logp(completed(rows, items, min(stops)), model, folder)
    columns = ["ours"] if options.peer == "none" else ["ours", "defaults", "tuned"]
    jobs = {part: {c: ours | {"rows": rows, "kind": kind} for c in columns} for part, kind in KINDS.items()}
    if options.peer != "none":
        once = ours | {"dtype": "fp32", "rows": rows[: options.batch] * 2, "kind": "update"}
        jobs["check"] = {"ours": once, "check": once}
    return about, jobs


KINDS = {"repeat": "update", "step": "step"}
"""Parts of the row ``grpo``, and what its processes time in each."""


def old_logp(rows: list[dict[str, Any]], model: str, folder: Path) -> list[dict[str, Any]]:
    """The rows with log-probabilities of their completions, which both sides are given."""
    file = folder / "rows.json"
    file.write_text(json.dumps(rows))
    call = [sys.executable, "-m", "benchmarks.compare.ours", "old-logp", model, str(file)]
    subprocess.run(call, cwd=ROOT, check=True, capture_output=True)
    return json.loads(file.read_text())


def reward_start(model: str, folder: Path) -> str:
    """A classifier with our starting head, for the peer."""
    start = folder / "reward-start"
    start.mkdir()
    call = [sys.executable, "-m", "benchmarks.compare.ours", "reward-start", model, str(start)]
    subprocess.run(call, cwd=ROOT, check=True, capture_output=True)
    return str(start)


if __name__ == "__main__":
    main()
