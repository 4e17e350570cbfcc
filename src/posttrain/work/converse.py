"""Conversations out of single turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from posttrain.errors import DataError
from posttrain.rewards.builders import permutation
from posttrain.stages import Context
from posttrain.stages.refining import Converse
from posttrain.types import Example, Message
from posttrain.work.generate import write_part
from posttrain.work.inputs import data_files, read_part


def run(stage: Converse, ctx: Context) -> None:
    """Write every part of the data with earlier exchanges before each row."""
    files = data_files(stage.data, None)
    earlier = read_part(files["demonstrations"], ctx, None, stage.skip_bad)
    for part in stage.DATA:
        if part in files:
            rows = read_part(files[part], ctx, None, stage.skip_bad)
            write_part(
                ctx, part, [continued(e, earlier, stage.turns - 1, (ctx.seed, part, i)) for i, e in enumerate(rows)]
            )


def continued(example: Example, earlier: Sequence[Example], turns: int, key: tuple[int | str, ...]) -> Example:
    """The example after ``turns`` exchanges of other rows, drawn by the key; a system turn of its own stays first.

    Raises:
        DataError: fewer other rows than that.
    """
    others = [e for e in earlier if e.prompt_key != example.prompt_key and e.prompt[0].role == "user"]
    if len(others) < turns:
        raise DataError(
            f"a conversation takes {turns} earlier exchanges, the data has {len(others)} other demonstrations"
        )
    before: list[Message] = []
    for place in permutation(len(others), *key)[:turns]:
        said = (*others[place].prompt, *others[place].responses[0].messages)
        before += [replace(m, train=False) if m.role == "assistant" else m for m in said]
    own = example.prompt[0].role == "system"
    return replace(example, prompt=(*example.prompt[:own], *before, *example.prompt[own:]))
