"""Reward models of SmolLM2 on public data: ``POSTTRAIN_REAL_DATA=FOLDER python -m benchmarks.reward_real --out DIR``.

Three kinds are trained for an epoch, adapters of rank 16, by the command that users type, each in a process of its own whose time and
memory are kept:

- ``bradley_terry`` and ``pairwise`` on the same pairs: hh-rlhf's helpful-base and harmless-base and a slice of UltraFeedback;
- ``attributes`` on that slice's scores and on Prometheus' ratings, an attribute each, both brought to 0 to 4.

They score held-out pairs of all three, RM-Bench's chat and safety rows and Prometheus' ratings of other questions; ``Sizes`` says
how many rows, and only those that are short enough are taken. Beside them stand the length of an answer and a bag of words
fitted to the same pairs. A command that is finished is skipped, one that was cut off goes on. One line is added to
``benchmarks/results/reward_real.jsonl``, of which ``python -m benchmarks.reward_page`` makes ``docs/results/reward-models.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import kept

from posttrain.data.collate import response_rows
from posttrain.data.load import read
from posttrain.data.write import write_jsonl
from posttrain.evals.reward import PairOutcome, pair_outcomes, ranking_ranks
from posttrain.evals.reward_eval import complete, reward_results
from posttrain.evals.statistics import paired_bootstrap
from posttrain.models.load import find_model, load_tokenizer
from posttrain.rewards.panel import Scored
from posttrain.types import Example
from posttrain.work.reward_bench import baseline_rows, comparable, finite, known, log_odds, rating_results

HELPFUL, HARMLESS = "pairs__hh-helpful-base", "pairs__hh-harmless-base"
ULTRA, PROMETHEUS = "pairs__ultrafeedback-slice__train.jsonl.gz", "rated__prometheus-mtbench__eval.jsonl.gz"
RM_BENCH = {"rm-bench-chat": 24, "rm-bench-safety-refuse": 16, "rm-bench-safety-response": 16}
FILES = {name: f"kwise__{name}__eval.jsonl.gz" for name in RM_BENCH}
KINDS = ("bradley_terry", "pairwise", "attributes")


@dataclass(frozen=True)
class Sizes:
    """Rows of each source and the longest in tokens; ``compared`` are the test pairs of each source that the pairwise model reads."""

    hh_train: int = 112
    hh_test: int = 150
    ultra_train: int = 96
    ultra_test: int = 100
    prometheus_train: int = 64
    prometheus_test: int = 96
    rm_bench: float = 1.0
    compared: int = 100
    edited: int = 16
    longest: int = 400
    longest_rated: int = 700


SMALL = Sizes(4, 4, 4, 4, 2, 4, 0.1, 3, 2, 400, 700)
"""To see whether everything runs; nothing is kept."""


def main() -> None:
    """Make the files, run the commands that are not finished, measure, and keep the line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("reward-real"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--small", action="store_true", help="few rows; the line is printed and not kept")
    options = parser.parse_args()
    folder = Path(os.environ.get("POSTTRAIN_REAL_DATA", ""))
    if not (folder / ULTRA).exists():
        raise SystemExit("POSTTRAIN_REAL_DATA must name the folder that holds the public data")
    out, sizes = options.out.resolve(), SMALL if options.small else Sizes()
    if not (out / "data" / "counts.json").exists():
        print("choosing rows ...", flush=True)
        make_files(out / "data", folder.resolve(), sizes, options.model)
    for name, command in commands(out, sizes, options.model, options.seed).items():
        measured_command(name, command, out)
    record = {
        "seed": options.seed,
        "threads": kept.threads(),
        "label": find_model(options.model).label,
        "sizes": asdict(sizes),
        "counts": json.loads((out / "data" / "counts.json").read_text()),
        "commands": json.loads((out / "commands.json").read_text()),
        **finite(measure(out)),
    }
    if options.small:
        print(json.dumps(record, indent=1))
    else:
        kept.append("reward_real", record)
        print("kept; the page is made by: python -m benchmarks.reward_page")


# ---------------------------------------------------------------------------- rows


def make_files(place: Path, folder: Path, sizes: Sizes, model: str) -> None:
    """Write what is trained on and what is scored, and how many rows each source gave; ``counts.json`` comes last."""
    place.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(find_model(model).path)
    fit = lambda rows, count, longest=sizes.longest: fitting(tokenizer, rows, count, longest)  # noqa: E731
    hh = {n: fit(read(folder / f"{n}__train.jsonl.gz", skip_bad=100), sizes.hh_train) for n in (HELPFUL, HARMLESS)}
    untied = comparable(read(folder / ULTRA, skip_bad=100))[0]
    ultra = fit(untied, sizes.ultra_train + sizes.ultra_test)
    learnt, held = ultra[: sizes.ultra_train], ultra[sizes.ultra_train :]
    asked = read(
        folder / PROMETHEUS, skip_bad=100
    )  # four models answer each of 80 questions: whole questions are held out
    odd = [[e for e in asked if int(e.meta["idx"]) % 2 == k] for k in (0, 1)]
    rated = [
        fit(odd[0], sizes.prometheus_train, sizes.longest_rated),
        fit(odd[1], sizes.prometheus_test, sizes.longest_rated),
    ]
    tests = {n: fit(read(folder / f"{n}__test.jsonl.gz", skip_bad=100), sizes.hh_test) for n in (HELPFUL, HARMLESS)}
    tests["ultrafeedback"] = held
    for name, count in RM_BENCH.items():
        tests[name] = fit(
            read(folder / FILES[name], skip_bad=100), max(1, round(sizes.rm_bench * count)), sizes.longest_rated
        )
    named = {
        n.removeprefix("pairs__"): [replace(e, kind=n.removeprefix("pairs__")) for e in rows]
        for n, rows in tests.items()
    }
    pairs = {n: [bare(e) for e in rows[: sizes.compared]] for n, rows in named.items() if n not in RM_BENCH}
    ratings = [replace(e, kind="prometheus") for e in rated[1]]
    files = {
        "train-pairs": [bare(e) for e in [*hh[HELPFUL], *hh[HARMLESS], *learnt]],
        "train-attributes": [*rated_as("ultrafeedback", learnt, 0, 10), *rated_as("prometheus", rated[0], 1, 5)],
        "test-bradley_terry": [*(bare(e) for rows in named.values() for e in rows), *ratings],
        "test-pairwise": [e for rows in pairs.values() for e in rows],
        "test-attributes": [*map(bare, named["ultrafeedback"]), *ratings],
        "test-edits": [e for rows in pairs.values() for e in rows[: sizes.edited]],
    }
    counts = {
        "hh train": sum(map(len, hh.values())),
        "ultrafeedback train": len(learnt),
        "prometheus train": len(rated[0]),
    }
    counts |= {name: len(rows) for name, rows in named.items()} | {"prometheus": len(ratings)}
    for name, rows in files.items():
        write_jsonl(place / f"{name}.jsonl", rows)
    (place / "counts.json").write_text(json.dumps(counts, indent=1) + "\n")


def fitting(tokenizer: Any, examples: Sequence[Example], count: int, longest: int) -> list[Example]:
    """The first rows whose every answer fits, prompt included."""
    some = examples[: 6 * count + 24]
    _, report = response_rows(tokenizer, some, max_length=longest, overlong="drop")
    print(f"{some[0].file}: {report}", flush=True)
    return [some[i] for i in report.index][:count]


def bare(example: Example) -> Example:
    """The example with ranks alone, so that a kind can't learn from scores that others don't see."""
    return replace(example, responses=tuple(replace(r, score=None) for r in example.responses))


def rated_as(name: str, examples: Sequence[Example], low: float, high: float) -> list[Example]:
    """The examples with their scores as an attribute from 0 to 4."""
    to_four = lambda score: {name: 4 * (score - low) / (high - low)}  # noqa: E731
    responses = lambda e: tuple(replace(r, score=None, rank=None, attributes=to_four(r.score)) for r in e.responses)  # noqa: E731
    return [replace(e, responses=responses(e), preferences=()) for e in examples]


# ---------------------------------------------------------------------------- commands


def commands(out: Path, sizes: Sizes, model: str, seed: int) -> dict[str, list[str]]:
    """Everything that is run, in order, as typed after ``posttrain``."""
    data, found = out / "data", dict[str, list[str]]()
    for kind in KINDS:
        rows = data / ("train-attributes.jsonl" if kind == "attributes" else "train-pairs.jsonl")
        place = out / "runs" / kind / "reward"
        longest = str(3 * sizes.longest if kind == "pairwise" else sizes.longest_rated)
        found[f"train {kind}"] = [
            *("train", "reward", "--kind", kind, "--name", kind, "--data", str(rows), "--model", model, "--seed", str(seed)),
            *("--max-length", longest, "--max-tokens", "2048", "--overlong", "error", "--skip-bad", "0"),
        ]  # fmt: skip
        scored = str(out / "scored" / f"{kind}.jsonl")
        found[f"score {kind}"] = [
            "score",
            str(place),
            str(data / f"test-{kind}.jsonl"),
            "--out",
            scored,
            "--max-tokens",
            "2048",
        ]
    first = str(out / "runs" / KINDS[0] / "reward")
    found["eval reward"] = [
        *("eval", "reward", first, "--data", str(data / "test-edits.jsonl"), "--train", str(data / "train-pairs.jsonl")),
        *("--edits", str(3 * sizes.edited), "--out", str(out / "eval"), "--max-tokens", "2048"),
    ]  # fmt: skip
    return found


def measured_command(name: str, command: Sequence[str], out: Path) -> None:
    """Run a command in a process of its own unless it is finished, and add what it took to ``commands.json``.

    Of one that was cut off the times of its parts add up.
    """
    file = out / "commands.json"
    known: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    entry = known.get(name, {"finished": False, "seconds": 0.0, "cpu_seconds": 0.0, "peak_mb": 0.0})
    if entry["finished"]:
        print(f"{name}: finished before", flush=True)
        return
    print(f"{name}: posttrain {' '.join(command)}", flush=True)
    began = time.time()
    process = subprocess.Popen([sys.executable, "-m", "posttrain", *command], cwd=out)
    try:
        _, status, used = os.wait4(process.pid, 0)
    except KeyboardInterrupt:
        _, status, used = os.wait4(process.pid, 0)  # it heard of it too, and writes a checkpoint
    entry["seconds"] = round(entry["seconds"] + time.time() - began, 1)
    entry["cpu_seconds"] = round(entry["cpu_seconds"] + used.ru_utime + used.ru_stime, 1)
    entry["peak_mb"] = max(entry["peak_mb"], round(used.ru_maxrss / 1e3))
    entry["finished"] = status == 0
    part = file.with_suffix(".part")
    part.write_text(json.dumps(known | {name: entry}, indent=1) + "\n")
    part.replace(file)
    print(f"{name}: {entry}", flush=True)
    if status:
        raise SystemExit(f"{name} stopped; the same command goes on from here")


# ---------------------------------------------------------------------------- measures


def measure(out: Path) -> dict[str, Any]:
    """Accuracy, calibration, correlations, ratings and differences of all kinds and baselines, from the scores alone."""
    train = read(out / "data" / "train-pairs.jsonl")
    models: dict[str, Any] = {}
    outcomes: dict[str, dict[str, list[PairOutcome]]] = {}
    for kind in KINDS:
        tests, scored = (
            read(out / part / name) for part, name in (("data", f"test-{kind}.jsonl"), ("scored", f"{kind}.jsonl"))
        )
        rows = [[r.score for r in e.responses] for e in scored]
        rate = log_odds if kind == "pairwise" else list
        models[kind], outcomes[kind] = kind_results(tests, [rate(row) for row in rows])
    tests = read(out / "data" / f"test-{KINDS[0]}.jsonl")
    for name, scores in baseline_rows(tests, train).items():
        found, outcomes[name] = kind_results(tests, scores)
        models[name] = found | {"baseline": True}
    models[KINDS[0]] |= extras(json.loads((out / "eval" / "results.json").read_text()))
    return {"results": {"models": models, "notes": []}, "differences": differences(outcomes)}


def kind_results(
    tests: Sequence[Example], scores: Sequence[Sequence[float | None]]
) -> tuple[dict[str, Any], dict[str, list[PairOutcome]]]:
    """What `posttrain eval reward` measures of scores of rankings and of rated answers, and the outcomes of pairs by subset."""
    rated = [i for i, e in enumerate(tests) if len(e.responses) == 1]
    ranked = [i for i, e in enumerate(tests) if len(e.responses) > 1]
    examples = [tests[i] for i in ranked]
    _, lost = complete(examples, {"": [scores[i] for i in ranked]})
    if lost:
        raise SystemExit(f"{lost} rankings without a score; rows were chosen to fit")
    subsets, rows = [e.kind for e in examples], [known(scores[i]) for i in ranked]
    found = reward_results(examples, subsets, rows)
    if rated:
        ratings = [Scored(list(scores[i]), [], []) for i in rated]
        found["ratings"] = rating_results(ratings, [tests[i] for i in rated])
    pairs = pair_outcomes(rows, ranking_ranks(examples))
    by_subset = {name: [o for o in pairs if subsets[o.ranking] == name] for name in Counter(subsets)}
    return found, by_subset


def extras(results: Mapping[str, Any]) -> dict[str, Any]:
    """What `posttrain eval reward` found by changing answers."""
    (model,) = [m for m in results["models"].values() if not m.get("baseline")]
    return {name: model[name] for name in ("outliers", "edits")}


def differences(outcomes: Mapping[str, Mapping[str, list[PairOutcome]]]) -> list[dict[str, Any]]:
    """Bradley-Terry against the others, pair by pair of the rows that both read, with intervals over prompts."""
    rows = []
    first = outcomes[KINDS[0]]
    for name, others in outcomes.items():
        for subset, theirs in others.items():
            if name == KINDS[0]:
                continue
            rankings = {o.ranking - theirs[0].ranking for o in theirs}  # the first of each subset, in one order
            mine = [o for o in first[subset] if o.ranking - first[subset][0].ranking in rankings]
            found = paired_bootstrap([o.correct for o in mine], [o.correct for o in theirs], [o.ranking for o in mine])
            rows.append(
                {
                    "against": name,
                    "subset": subset,
                    "mean": found.mean,
                    "low": found.low,
                    "high": found.high,
                    "n": found.n,
                }
            )
    return rows


if __name__ == "__main__":
    main()
