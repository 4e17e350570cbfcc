"""Merging models into one plain model directory, checked on 16 prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.data import read, resolve_data
from posttrain.data.collate import prompt_ids
from posttrain.models.load import find_model, load_tokenizer
from posttrain.models.merge import merges
from posttrain.models.merge_files import PROMPTS, merge_models
from posttrain.models.stored import Stored, open_model
from posttrain.stages import Context, Merge, Stage


def run(stage: Merge, ctx: Context) -> None:
    """Merge the policies into the stage's directory; an adapter is added to the base at full precision."""
    base = str(ctx.inputs["base"]) if isinstance(stage.base, Stage) else find_model(stage.base).path
    places = [ctx.inputs["policy"], *(ctx.inputs[f"others.{k}"] for k in range(len(stage.others)))]
    (ctx.dir / "config.json").unlink(missing_ok=True)  # of an attempt that was cut off
    record = merge_named(
        stage.method,
        [str(trained(place)) for place in places],
        ctx.dir,
        base=base if "base" in merges.facts(stage.method).get("needs", ()) else None,
        weights=stage.weights or None,
        options=stage.options,
        adapters_on=base,
    )
    worst = record["parity"]["largest"]
    ctx.console.print(
        f"merged {len(places)} by {stage.method}: parity on {PROMPTS} prompts {worst:.0e}", highlight=False
    )


def trained(place: Path) -> Path:
    """Where a stage left its policy: in ``policy`` below its directory, or there."""
    return place / "policy" if (place / "policy").is_dir() else place


def merge_named(
    method: str,
    models: Sequence[str],
    out: Path,
    *,
    base: str | None = None,
    weights: Sequence[float] | None = None,
    options: Mapping[str, float] | None = None,
    adapters_on: str | None = None,
) -> dict[str, Any]:
    """Merge models by name or directory; returns what ``merge.json`` says.

    ``adapters_on`` stands in for the bases that adapters name. Errors are those of
    `posttrain.models.merge_files.merge_models`.
    """
    parts = [open_model(name, adapters_on) for name in models]
    start = None if base is None else open_model(base)
    prompts = parity_prompts(parts[0])
    return merge_models(method, parts, out, prompts=prompts, base=start, weights=weights, options=options)


def parity_prompts(model: Stored) -> list[list[int]]:
    """The first prompts of the default data as the model reads them: by its chat template, or as they are."""
    examples = list(read(resolve_data("default")["prompts"], limit=PROMPTS))
    tokenizer = load_tokenizer(str(model.tokenizer()))
    if tokenizer.chat_template is None:
        return [tokenizer(example.prompt[-1].content)["input_ids"] for example in examples]
    return prompt_ids(tokenizer, examples, max_length=1 << 20)[0]
