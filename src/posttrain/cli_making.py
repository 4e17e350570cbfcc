"""Commands that make data to train on: ``generate``, ``label`` and ``select``, each a run of one stage."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.errors import ConfigError


def generate(
    *,
    name: str | None = None,
    seed: int = 0,
    out: str = "",
    tiny: bool = False,
    restart_changed: bool = False,
    **more: str | None,
) -> None:
    """Sample answers of a policy to prompts; cut off, the same command goes on.

    --model M           a name, or the directory of a trained model (default: smollm2)
    --data D            prompts (default: default); --part NAME reads another part, whose answers stay beside the samples
    --samples N         answers a prompt (default: 4); --temperature, --top-k, --top-p, --max-new-tokens
    --out FILE          copy the samples there, a .jsonl file
    --name NAME         name of the run, a directory under runs/ (default: generate)
    --seed N            seed of every random draw (default: 0)
    --tiny              at the size of the small world
    --restart-changed   begin anew where a run of that name had other settings
    --FIELD V           any other field of the stage Generate
    """
    run_stage("generate", {}, more, name=name, seed=seed, out=out, tiny=tiny, restart_changed=restart_changed)


def label(
    data: str,
    /,
    *,
    name: str | None = None,
    seed: int = 0,
    out: str = "",
    restart_changed: bool = False,
    **more: str | None,
) -> None:
    """Score every answer in a file or in what `posttrain generate` wrote; cut off, the same command goes on.

    --reward R          the directory of a reward stage, or module:function of (prompt, answer) -> score, or of
                        (prompt, a, b) -> probability that a is better
    --cut-score X       the score of samples that ended by length
    --out FILE          copy the scored answers there, a .jsonl file
    --name, --seed, --restart-changed   as for `posttrain generate`
    --FIELD V           any other field of the stage Label
    """
    run_stage("label", {"data": data}, more, name=name, seed=seed, out=out, restart_changed=restart_changed)


def select(
    data: str,
    /,
    *,
    name: str | None = None,
    seed: int = 0,
    out: str = "",
    restart_changed: bool = False,
    **more: str | None,
) -> None:
    """Make pairs, rankings or demonstrations of scored answers, by a builder (`posttrain list builders`).

    --builder NAME      such as rso, best_worst, tournament, spin, best; or module:function
    --options.OPTION V  an option of the builder, e.g. --options.beta 0.5
    --out FILE          copy what was made there, a .jsonl file
    --name, --seed, --restart-changed   as for `posttrain generate`
    --FIELD V           any other field of the stage Select
    """
    options = [f"{key.removeprefix('options.')},{value}" for key, value in more.items() if key.startswith("options.")]
    more = {key: value for key, value in more.items() if not key.startswith("options.")}
    more |= {"options": ",".join(options)} if options else {}
    run_stage("select", {"data": data}, more, name=name, seed=seed, out=out, restart_changed=restart_changed)


def run_stage(
    kind: str, given: Mapping[str, str], more: Mapping[str, str | None], *, name: str | None, out: str, **settings: Any
) -> None:
    """Run the recipe of one stage with fields given as text, and copy the data that it made."""
    from posttrain import cli

    if out and Path(out).suffix != ".jsonl":
        raise ConfigError(f"can't write '{out}'; expected a name ending in .jsonl")
    recipe = f"posttrain.recipes.making:{kind}"
    options = cli.recipe_options(recipe)
    fields = {key if key in options else f"{kind}.{key}": value for key, value in {**given, **more}.items()}
    cli.run(recipe, name=name, **settings, **fields)  # pyright: ignore[reportArgumentType]
    if out:
        made = cli.RUNS / (name or (f"{kind}-tiny" if settings.get("tiny") else kind)) / kind / "data"
        shutil.copyfile(next(made.glob("*.jsonl")), out)
