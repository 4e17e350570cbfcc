"""Making data to train on out of scored answers, by a named builder."""

from __future__ import annotations

from posttrain.errors import DataError
from posttrain.rewards.builders import build, builders, chunks
from posttrain.stages import Context, Select
from posttrain.work.generate import write_part
from posttrain.work.inputs import load_any


def run(stage: Select, ctx: Context) -> None:
    """Build and write; that prompts gave nothing is said.

    Raises:
        DataError: nothing was made at all.
    """
    examples = load_any(stage, ctx)
    if stage.chunk is not None:
        examples = chunks(examples, stage.chunk[1])[stage.chunk[0]]
    built = build(stage.builder, examples, seed=ctx.seed, options=stage.options)
    ctx.console.print(f"{stage.builder}: {len(examples)} prompts, {built}", highlight=False)
    if not built.examples:
        raise DataError(
            f"builder '{stage.builder}' made nothing of {len(examples)} prompts; expected different answers of which one is better"
        )
    write_part(ctx, builders.facts(stage.builder).get("makes", "rankings"), built.examples)
