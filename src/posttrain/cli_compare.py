"""``posttrain compare``: several preference losses on the same rows with several seeds, one table and one picture."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.arguments import convert, flag
from posttrain.cli_runs import SEPARATOR, forecast_sweep
from posttrain.errors import ConfigError

if TYPE_CHECKING:
    from posttrain.stages import Recipe

FLAGS = ("--tiny", "--dry-run")
HELD_OUT = 0.2
"""The share of prompts that is kept from training where the data says nothing of held-out rankings."""


def compare(
    loss: str,
    /,
    *,
    data: str | None = None,
    test: str | None = None,
    model: str | None = None,
    seeds: int = 3,
    metric: str = "policies/trained/accuracy",
    name: str | None = None,
    tiny: bool = False,
    dry_run: bool = False,
    **more: str | None,
) -> int:
    """Train with each of several preference losses on the same rows, with several seeds, and compare what they did.

    A loss is a name with its options, dpo:beta=0.05,label_smoothing=0.1. A run is runs/COMPARE/LOSS-seedN. Repeated,
    the command skips what is finished. Exit status 1: a run failed.

    --data DATA         pairs or rankings (default: the default data). Without heldout_rankings in it, one prompt in five
                        is held out; losses of single answers get the best of a row as good and the worst as bad, those
                        of ratings with their scores, or 1 and 0 where there are none
    --test DATA         held-out pairs or rankings (default: the data's own)
    --model MODEL       what every run starts from (default: smollm2)
    --seeds N           seeds 0 to N-1 of every loss (default: 3)
    --metric NAME       the number whose differences from the first loss are tested (default: accuracy)
    --name NAME         a directory under runs/ (default: compare)
    --tiny              train at the size of the small world; values typed beside it stay
    --dry-run           print the runs with a forecast of time and memory; compute nothing
    --FIELD V           change a field of every run's training, e.g. --lr 1e-4 --epochs 1 --lora-rank 0
    """
    from rich.console import Console

    from posttrain import cli
    from posttrain.runner import run_directory, write_json
    from posttrain.sweep import Point, run_sweep

    names = loss.split(SEPARATOR)
    directory, console = run_directory(cli.RUNS, name or "compare" + ("-tiny" if tiny else "")), Console()
    model = model or ("small" if tiny else "smollm2")
    data = data or ("smallworld" if tiny else "default")
    shared = {"model": model, "data": data, "test": test or data}
    for text in names:  # a wrong name or option is told before anything is written
        recipe_of(text, shared, more)
    if not dry_run:
        shared |= prepared(data, test, model, names, directory)
    points = [Point(options={"loss": text}, recipe=recipe_of(text, shared, more)) for text in names]
    if dry_run:
        forecast_sweep(points, directory, seeds, None, console, tiny)
        return 0
    fixed = {"model": model, "data": data, "test": test or data} | {key: str(value) for key, value in more.items()}
    command = cli.command_line()
    found = run_sweep(
        points,
        directory=directory,
        seeds=seeds,
        metric=metric,
        fixed=fixed,
        console=console,
        tiny=tiny,
        command=command,
    )
    about = {p.name: target(p.recipe.stages["train"]) | {"seconds": spent(directory, found, p.name)} for p in points}
    found |= {"objectives": about}
    write_json(directory / "sweep.json", found)
    show_compare(found, directory)
    return 1 if any(point["failed"] for point in found["points"]) else 0


def gather_losses(args: list[str]) -> list[str]:
    """Join the losses, which stand anywhere among the options, into one argument."""
    losses: list[str] = []
    rest: list[str] = []
    waiting = list(args)
    while waiting:
        item = waiting.pop(0)
        if not item.startswith("--"):
            losses.append(item)
            continue
        rest.append(item)
        if "=" not in item and item not in FLAGS and waiting and not waiting[0].startswith("--"):
            rest.append(waiting.pop(0))
    return ([SEPARATOR.join(losses)] if losses else []) + rest


def read_loss(text: str) -> tuple[str, dict[str, float]]:
    """Split ``dpo:beta=0.05,label_smoothing=0.1`` into the loss (or ``module:function``) and its options.

    Raises:
        ConfigError: an option without a number.
    """
    name, colon, tail = text.rpartition(":")
    if not colon or "=" not in tail:
        return text, {}
    options: dict[str, float] = {}
    for part in tail.split(","):
        key, _, value = part.partition("=")
        options[key.strip()] = convert(value, float, f"{name}:{key.strip()}")
    return name, options


def recipe_of(text: str, shared: Mapping[str, str], more: Mapping[str, str | None]) -> Recipe:
    """The recipe of one loss: train with it, then measure; ``more`` changes fields of the training or ``STAGE.FIELD``."""
    from posttrain import cli
    from posttrain.graph import override
    from posttrain.losses import find_loss
    from posttrain.registry import METHODS, RECIPES
    from posttrain.stages import MeasurePreference, Recipe

    loss, options = read_loss(text)
    if loss not in METHODS:
        find_loss(loss)  # whose error names the losses that are near
    method = cli.method_recipe(loss)
    if wanted := [flag(key) for key, item in cli.recipe_options(method).items() if item.default is item.empty]:
        raise ConfigError(
            f"'{loss}' needs {', '.join(wanted)}; compare takes losses that learn from data that is there"
        )
    (train,) = RECIPES[method]().stages.values()
    if not hasattr(train, "loss"):
        raise ConfigError(f"'{loss}' is no preference loss; `posttrain list losses` has those that can be compared")
    train = dataclasses.replace(train, loss=loss, options=options, beta=None)
    stages = {"train": train, "measure": MeasurePreference(policy=train, overlong="drop")}
    recipe = Recipe("compare", stages, "preference losses on the same rows")
    changes: dict[str, dict[str, Any]] = {"train": {key: shared[key] for key in ("model", "data")}}
    changes["measure"] = {"reference": shared["model"], "data": shared["data"], "test": shared["test"]}
    for key, value in more.items():
        stage, _, field = key.rpartition(".")
        stage = stage or "train"
        if stage == "train" and field in ("loss", "options", "beta"):
            raise ConfigError(f"{flag(key)}: a loss is given its options by name, such as dpo:beta=0.05")
        changes.setdefault(stage, {})[field] = convert(value, cli.field_type(recipe, stage, field), key)
    return override(recipe, changes)


def prepared(data: str, test: str | None, model: str, names: Sequence[str], directory: Path) -> dict[str, str]:
    """Where the rows are: the data as it is, or a directory beside the runs, named by its contents, that has what it lacks.

    Held-out rankings are one prompt in five; labelled answers are the best and the worst of every row.

    Raises:
        ConfigError: the data has no rankings, or too few to hold some out.
    """
    from posttrain.data import read, split, write_jsonl
    from posttrain.data.views import best_and_worst
    from posttrain.graph import content_hash
    from posttrain.losses import find_loss, unpaired_losses, valued_losses
    from posttrain.work.inputs import data_files

    files = data_files(data, model)
    if "rankings" not in files:
        raise ConfigError(
            f"data '{data}' has no pairs or rankings, but {', '.join(files)}; losses are compared on pairs"
        )
    single = any(find_loss(read_loss(text)[0]) in (unpaired_losses, valued_losses) for text in names)
    holds, labels = test is None and "heldout_rankings" not in files, single and "labelled" not in files
    if not (holds or labels):
        return {}
    parts = {"rankings": read(files["rankings"])}
    if holds:
        parts = split(parts["rankings"], {"rankings": 1 - HELD_OUT, "heldout_rankings": HELD_OUT})
    elif "heldout_rankings" in files:
        parts["heldout_rankings"] = read(files["heldout_rankings"])
    if not all(parts.values()):
        raise ConfigError(f"data '{data}' is too small to hold one prompt in five out; give held-out pairs with --test")
    if labels:
        parts["labelled"] = best_and_worst(parts["rankings"])
    place = directory / f"data-{content_hash(files['rankings'])[:8]}"
    place.mkdir(parents=True, exist_ok=True)
    for part, examples in parts.items():
        write_jsonl(place / f"{part}.jsonl", examples)
    return {"data": str(place), **({} if test else {"test": str(place)})}


def target(stage: Any) -> dict[str, str]:
    """What a loss compares, in words, and the accuracy that `posttrain.work.measure` has of it.

    Of pairs that is log-ratios to the start or its own log-probabilities, of answers or a token.
    """
    from posttrain.losses import find_loss, listwise_losses, scored_losses, unpaired_losses, valued_losses

    kind = find_loss(stage.loss)
    facts = kind.facts(stage.loss)
    words = {id(unpaired_losses): "good up, bad down", id(valued_losses): "ratings"}
    words |= {id(listwise_losses): "scores of a list", id(scored_losses): "score gaps"}
    what, number = (
        ("log-ratio", "accuracy") if "reference" in facts.get("needs", ("reference",)) else ("log-prob", "accuracy_gap")
    )
    each, over = ("a token", "_token") if facts.get("per_token") else ("of answers", "")
    return {"targets": words.get(id(kind), f"{what} {each}"), "accuracy": number + over}


def spent(directory: Path, found: Mapping[str, Any], point: str) -> list[float | None]:
    """Seconds of training by seed; None where a run did not finish."""
    from posttrain.graph import read_json

    records = [read_json(directory / f"{point}-seed{seed}" / "train" / "done.json") for seed in found["seeds"]]
    return [None if record is None else record["seconds"] for record in records]


def show_compare(found: Mapping[str, Any], directory: Path) -> None:
    """Print the table and paths; write the picture and a page that has both."""
    from rich.console import Console

    from posttrain.evals.compare_view import compare_grid, compare_page, compare_png
    from posttrain.evals.tables import rich_grid
    from posttrain.runner import say

    console = Console()
    for file, content in (("compare.png", compare_png(found)), ("compare.html", compare_page(found).encode())):
        partial = directory / f"{file}.part"
        partial.write_bytes(content)
        os.replace(partial, directory / file)
    console.print()
    console.print(rich_grid(compare_grid(found)))
    lines = {"picture": "compare.png", "page": "compare.html", "numbers": "sweep.json", "runs": "LOSS-seedN"}
    say(console, "\n".join(f"{word:<9}{directory / file}" for word, file in lines.items()))
