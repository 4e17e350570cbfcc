"""Commands around reward models: ``score`` a file, ``serve`` over HTTP, ``eval reward`` beside others."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from posttrain.errors import ConfigError, suggest

if TYPE_CHECKING:
    from posttrain.rewards.panel import Panel
    from posttrain.types import Example

Dtype = Literal["auto", "float32", "bfloat16"]
SEPARATOR = "\x1f"
"""Stands between models, and between files, on their way through the parser, which knows one value a name."""


def score(
    model: str,
    file: str,
    /,
    *,
    out: str = "",
    rule: str = "",
    penalty: float | None = None,
    limit: int | None = None,
    format: str | None = None,
    skip_bad: int = 0,
    max_length: int = 2048,
    max_tokens: int = 1024,
    dtype: Dtype = "auto",
) -> None:
    """Score every response of a file with a reward model, in the file's order; cut off, the same command goes on.

    MODEL is the directory of a reward stage or an ensemble's, or several separated by commas. FILE is any data the library
    reads. Written are its examples with the scores in place of their own, which stay as the attribute given_score.

    --out FILE          where they go (default: FILE's name with .scored.jsonl)
    --rule NAME         how an ensemble's scores are joined: mean, minimum, variance or deviation
                        (default: the ensemble's own, else variance)
    --penalty X         what the rule's penalty counts (default: 0.5 of the variance, 1 of the deviation)
    --limit N           the first N examples only
    --format NAME       how to read the rows, if their columns don't tell
    --skip-bad N        leave out up to N faulty rows, counted (default: 0)
    --max-length N      responses of more tokens, prompt included, get no score and are counted (default: 2048)
    --max-tokens N      packed tokens of one forward pass; can't change a score (default: 1024)
    --dtype NAME        auto, float32 or bfloat16 (default: auto)
    """
    place = _scored_name(file, out)
    panel = _panel(model, rule, penalty, max_length, max_tokens, dtype)
    settings = {
        "rule": rule,
        "penalty": penalty,
        "max_length": max_length,
        "dtype": str(panel.members[0].model.net.dtype),
    }
    reading: dict[str, Any] = {"format": format, "limit": limit, "skip_bad": skip_bad}
    _score_into(panel, model, file, place, settings, reading)


def _scored_name(file: str, out: str) -> Path:
    """Where the scores go."""
    place = Path(out or f"{Path(file).name.partition('.')[0]}.scored.jsonl")
    if place.suffix != ".jsonl":
        raise ConfigError(f"can't write '{place}'; expected a name ending in .jsonl")
    if not out and not Path(file).exists():
        raise ConfigError(f"no file '{file}' (for a data set by name, give --out too)")
    return place


def _score_into(
    panel: Panel, model: str, file: str, place: Path, settings: dict[str, Any], reading: dict[str, Any]
) -> None:
    """Score a file with a bar, and say what became of it."""
    from rich.console import Console

    from posttrain.rewards.panel import panel_files
    from posttrain.train.progress import progress
    from posttrain.work.scoring import identity_of, score_file

    with progress(Console(stderr=True), "score", reading["limit"] or 0) as update:
        found = score_file(
            panel,
            file,
            place,
            identity=identity_of(model, panel_files(model), settings),
            on_done=lambda examples, answers: update(examples, f"{answers} answers"),
            **reading,
        )
    resumed = f", {found.resumed} of them before" if found.resumed else ""
    long = f"; {found.too_long} answers of more than {panel.max_length} tokens have no score" if found.too_long else ""
    print(f"{place}: {found.examples} examples{resumed}, {found.scored} answers scored{long}")
    if found.report.useless or found.report.bad:
        print(f"{file}: {found.report}", file=sys.stderr)


def serve(
    model: str,
    /,
    *,
    port: int = 8765,
    token: str = "",
    rule: str = "",
    penalty: float | None = None,
    max_length: int = 2048,
    max_tokens: int = 1024,
    dtype: Dtype = "auto",
) -> None:
    """Serve a reward model over HTTP on this machine; requests that come together are scored together.

    POST /score with {"examples": [{"prompt": ..., "responses": [...]}]} and Authorization: Bearer TOKEN; GET /schema says
    more. `posttrain.rewards.remote.remote_reward` is the client. Ctrl-C or SIGTERM answers what was taken, then stops.

    --port N            of 127.0.0.1; 0 = any that is free (default: 8765)
    --token TEXT        what requests have to bring, at least 16 characters (default: made and printed)
    --rule, --penalty, --max-length, --max-tokens, --dtype   as for `posttrain score`
    """
    import secrets

    from posttrain.rewards.serve import Server

    panel = _panel(model, rule, penalty, max_length, max_tokens, dtype)

    def scores(examples: Any, truncated: Any) -> list[list[float | None]]:
        return [found.scores for found in panel.score(examples, truncated=truncated)]

    given = token or secrets.token_urlsafe(24)
    server = Server(scores, token=given, label=panel.label, port=port)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: server.stop())
    print(f"{panel.label} at {server.url}" + ("" if token else f", token {given}"), flush=True)
    server.run()
    print("stopped; every request that was taken is answered", flush=True)


def _panel(model: str, rule: str, penalty: float | None, max_length: int, max_tokens: int, dtype: str) -> Panel:
    """Load what the commands score with."""
    from posttrain.rewards.ensemble import rule as ensemble_rule
    from posttrain.rewards.panel import load_panel, panel_base
    from posttrain.work.inputs import choose_dtype

    own = not rule and penalty is None
    combine = None if own else ensemble_rule(rule or "variance", penalty)
    precision = choose_dtype(dtype, panel_base(model))
    return load_panel(model, dtype=precision, combine=combine, max_length=max_length, max_tokens=max_tokens)


def evaluate_models(
    what: str,
    model: str,
    /,
    *,
    data: str = "",
    train: str = "",
    best_of: str = "",
    edits: int = 0,
    calibrate: bool = False,
    out: str = "reward-eval",
    limit: int | None = None,
    skip_bad: int = 0,
    rule: str = "",
    penalty: float | None = None,
    max_length: int = 2048,
    max_tokens: int = 1024,
    dtype: Dtype = "auto",
) -> None:
    """Measure reward models side by side: `posttrain eval reward MODEL... --data FILE...`.

    A MODEL is the directory of a reward stage or an ensemble's, or several with commas. Printed and written as a page with
    pictures: accuracy by subset with intervals, RewardBench's sections and RM-Bench's matrix where the data has them,
    calibration before and after a temperature, correlations with length and style, an ensemble's disagreement, distance
    from what is familiar, beside the length of an answer and, with --train, a bag of words.

    --data FILE...      rankings, pairs, or answers with a score; each file is a subset, or each kind its rows name
    --train FILE        rankings the models have seen: for the bag of words, and as what is familiar to them
    --best-of FILE      prompts with many answers each whose score is gold, or "smallworld": best-of-n curves and their law
    --edits N           edit the best answers of N rankings in ways that change nothing asked for (English; default: 0)
    --calibrate         write each model's temperature into its reward.json; its scores are divided by it from then on
    --out DIRECTORY     where results.json and report.html go (default: reward-eval)
    --limit N           the first N rows of each file only
    --skip-bad N        leave out up to N faulty rows a file, counted (default: 0)
    --rule, --penalty, --max-length, --max-tokens, --dtype   as for `posttrain score`
    """
    if what != "reward":
        raise ConfigError(f"unknown evaluation '{what}'; {suggest(what, ['reward'])}")
    from posttrain.rewards.panel import panel_paths

    files, names = [name for name in data.split(SEPARATOR) if name], model.split(SEPARATOR)
    if not files:
        raise ConfigError("`posttrain eval reward` needs test data: posttrain eval reward MODEL... --data FILE...")
    for name in names:
        panel_paths(name)  # before anything is loaded
    reading = {"limit": limit, "skip_bad": skip_bad}
    load = partial(_panel, rule=rule, penalty=penalty, max_length=max_length, max_tokens=max_tokens, dtype=dtype)
    if calibrate and any("," in name for name in names):
        raise ConfigError("members named one by one have no directory for a temperature; give an ensemble's directory")
    results = _measure(names, files, reading, load, train, best_of, edits, Path(out))
    if calibrate:
        from posttrain.work.calibrate import save_temperatures

        for line in save_temperatures(names, files, results):
            print(line)


def _measure(
    names: list[str],
    files: list[str],
    reading: dict[str, Any],
    load: Callable[[str], Panel],
    train: str,
    best_of: str,
    edits: int,
    out: Path,
) -> dict[str, Any]:
    """Read, load, measure with a bar, and print what was measured."""
    from rich.console import Console

    from posttrain.data.load import read
    from posttrain.evals.reward_page import reward_model_grids
    from posttrain.evals.tables import rich_grid
    from posttrain.train.progress import progress
    from posttrain.work.reward_bench import comparable, evaluate, read_tests

    tests = read_tests(files, **reading)
    known = comparable(read(train, skip_bad=reading["skip_bad"]))[0] if train else []
    golden = gold_answers(best_of) if best_of else []
    panels = [load(name) for name in names]
    total = (len(tests.examples) + len(tests.rated) + len(golden)) * len(panels)
    with progress(Console(stderr=True), "eval reward", total) as update:
        done: dict[str, int] = {}

        def say(label: str, count: int, of: int) -> None:
            done[label] = count
            update(sum(done.values()), label)

        results = evaluate(panels, tests, out, train=known, best_of=golden, edits=edits, say=say)
    console = Console()
    for grid in reward_model_grids(results):
        console.print(rich_grid(grid))
    for note in results["notes"]:
        console.print(note, style="dim", markup=False, highlight=False)
    print(f"page: {out / 'report.html'}")
    return results


def gold_answers(name: str) -> list[Example]:
    """Prompts with many answers each, from a file, or samples of the small base model with their gold scores."""
    from posttrain.data.load import read

    if name != "smallworld":
        return read(name)
    from posttrain.models.load import cache_dir
    from posttrain.work.gold_samples import sampled, write_jsonl

    file = cache_dir() / "smallworld-best-of-1.jsonl.gz"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(file, sampled(32, 128, seed=0))
    return read(file)


def gather_models(args: list[str]) -> list[str]:
    """Join the models, and the files that follow ``--data``, into one argument each."""
    what, rest = args[:1], args[1:]
    found: list[str] = []
    names: list[str] = []
    while rest and not rest[0].startswith("-"):
        names.append(rest.pop(0))
    while rest:
        item = rest.pop(0)
        if item != "--data":
            found.append(item)
            continue
        files = []
        while rest and not rest[0].startswith("--"):
            files.append(rest.pop(0))
        found.append(f"--data={SEPARATOR.join(files)}" if files else item)
    return [*what, *([SEPARATOR.join(names)] if names else []), *found]
