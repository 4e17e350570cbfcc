"""Several rewards as one, by prompt: written as a record that stages read where they read a reward model's."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from posttrain.rewards.base import Completion, Reward, Score
from posttrain.rewards.combine import asked
from posttrain.rewards.tagged import checkable
from posttrain.stages import Context
from posttrain.stages.checked import MixRewards
from posttrain.train.checkpoint import write_json
from posttrain.types import Example

MIX = "mix"
"""The form, in ``reward.json``, of a directory that names other rewards."""

_HOLDS: dict[str, Callable[[Example], bool]] = {
    "all": lambda example: True,
    "checked": checkable,
    "open": lambda example: not checkable(example),
}


def run(stage: MixRewards, ctx: Context) -> None:
    """Write down which rewards there are; directories relative to this one, so that a run can be moved."""
    places = [os.path.relpath(ctx.inputs[f"rewards.{k}"], ctx.dir) for k in range(len(stage.rewards))]
    names = [Path(place).name for place in places] + [name.rpartition(":")[2] for name in stage.named]
    where = stage.where or ("all",) * len(names)
    parts = [
        {"name": name, "reward": reward, "weight": weight, "where": place, "directory": k < len(places)}
        for k, (name, reward, weight, place) in enumerate(
            zip(names, [*places, *stage.named], stage.weights, where, strict=True)
        )
    ]
    write_json(ctx.dir / "reward.json", {"form": MIX, "sign": 1, "mean": 0.0, "parts": parts})
    for part in parts:
        ctx.console.print(f"{part['weight']:g} x {part['name']} on {part['where']} prompts", highlight=False)


def mixed(directory: Path, make: Callable[[str], Reward]) -> Reward:
    """The reward of a record; ``make`` gives each part's by its directory or its name."""
    found: list[dict[str, Any]] = json.loads((directory / "reward.json").read_text())["parts"]
    return by_prompt(
        [
            (
                p["name"],
                p["weight"],
                _HOLDS[p["where"]],
                make(str(directory / p["reward"]) if p["directory"] else p["reward"]),
            )
            for p in found
        ]
    )


def by_prompt(parts: Sequence[tuple[str, float, Callable[[Example], bool], Reward]]) -> Reward:
    """``sum of weight * reward`` over the parts (name, weight, which prompts, reward) that each prompt is for.

    A response has no score where such a part gives none, or where there is no such part.
    """

    def reward(completions: Sequence[Completion]) -> list[Score]:
        totals: list[float | None] = [None] * len(completions)
        logged: list[dict[str, float]] = [{} for _ in completions]
        silent: set[int] = set()
        for name, weight, holds, part in parts:
            places = [i for i, c in enumerate(completions) if holds(c.example)]
            for i, score in zip(places, asked(part, [completions[i] for i in places], f"reward '{name}'"), strict=True):
                if score.value is None:
                    silent.add(i)
                    continue
                totals[i] = (totals[i] or 0.0) + weight * score.value
                logged[i] |= {name: score.value} | {f"{name}/{k}": v for k, v in score.parts.items()}
        return [Score(None if i in silent else t, p) for i, (t, p) in enumerate(zip(totals, logged, strict=True))]

    return reward
