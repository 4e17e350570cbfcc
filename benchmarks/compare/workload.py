"""Rows for a comparison: token ids of real pairs where they are at hand, else of the default set; the same for both sides."""

from __future__ import annotations

import math
import os
import random
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

REAL = "pairs__hh-helpful-base__train.jsonl.gz"
"""Pairs that are read from the folder named by POSTTRAIN_REAL_DATA."""

Ids = list[int]
Item = dict[str, Any]
"""A prompt's ids and its responses', best first."""


def read_rows(model: str, max_length: int) -> tuple[str, list[Item]]:
    """The data's name, and its rankings as token ids of at most ``max_length`` a response with its prompt."""
    from posttrain.data import read, resolve_data
    from posttrain.data.collate import ranking_rows
    from posttrain.models.load import load_tokenizer

    folder = os.environ.get("POSTTRAIN_REAL_DATA")
    file = Path(folder) / REAL if folder else resolve_data("default")["rankings"]
    examples = read(file, skip_bad=100)  # pairs with an empty answer
    rows, report = ranking_rows(load_tokenizer(model), examples, max_length=max_length, overlong="drop")
    items = [
        {"prompt": list(row.prompt), "branches": [list(b.ids) for _, b in ranked]}
        for row, i in zip(rows, report.index, strict=True)
        if (ranked := sorted(zip([r.rank or 0 for r in examples[i].responses], row.branches, strict=True), key=_rank))
    ]
    return REAL if folder else "default rankings", items


def _rank(ranked: tuple[int, Any]) -> int:
    return ranked[0]


def with_responses(items: list[Item], count: int, seed: int = 0) -> list[Item]:
    """Rows of ``count`` responses: each row's own, then those of other rows where it has fewer."""
    draw = random.Random(seed)
    return [
        {
            "prompt": item["prompt"],
            "branches": (item["branches"] + [draw.choice(draw.choice(items)["branches"]) for _ in range(count)])[
                :count
            ],
        }
        for item in items
    ]


def length(item: Item) -> int:
    """Tokens of the longest sequence of a row."""
    return len(item["prompt"]) + max(map(len, item["branches"]))


def lengths(items: list[Item]) -> list[Item]:
    """Rows without their tokens, as results keep them."""
    return [
        {"prompt": len(i["prompt"]), "branches": i.get("lengths") or [len(b) for b in i["branches"]]} for i in items
    ]


def choose(items: list[Item], per_step: int, steps: int, seed: int = 0) -> tuple[list[Item], list[Item]]:
    """A warm-up batch and ``steps`` batches, in two orders: dealt at random, and sorted by length.

    Rows are taken around ``steps`` quantiles of length, ``per_step`` neighbours at each. Sorted, a batch holds
    neighbours, as in a large data set that was sorted by length; dealt, it holds any of them, as in one that was not.
    """
    ranked = sorted(items, key=length)
    need = per_step * (steps + 1)
    if len(ranked) < need:
        raise SystemExit(f"{len(ranked)} rows at hand, {need} wanted: take fewer rows or steps")
    taken: set[int] = set()

    def around(share: float) -> list[Item]:
        near = sorted(range(len(ranked)), key=lambda i: abs(i - share * len(ranked)))
        found = [i for i in near if i not in taken][:per_step]
        taken.update(found)
        return [ranked[i] for i in sorted(found)]

    clusters = [around((k + 0.5) / steps) for k in range(steps)]
    warm = around(0.5)
    by_length = [item for cluster in clusters for item in cluster]
    dealt = random.Random(seed).sample(by_length, len(by_length))
    return warm + dealt, warm + by_length


def near_ratio(items: list[Item], ratio: float, need: int) -> list[Item]:
    """Rows whose prompt is nearest to ``ratio`` times as long as their mean response, in the order given; at least ``need``.

    Where it is more than a tenth off the prompt is made to be so long (`fitted`).
    """

    def wanted(item: Item) -> float:
        return ratio * fmean(map(len, item["branches"]))

    off = [abs(math.log(len(item["prompt"]) / wanted(item))) for item in items]
    count = max(need, min(8 * need, len(items) // 8))
    kept = set(sorted(range(len(items)), key=off.__getitem__)[:count])
    return [item | {"prompt": fitted(item["prompt"], wanted(item), items)} for i, item in enumerate(items) if i in kept]


def fitted(prompt: Ids, wanted: float, items: list[Item]) -> Ids:
    """A prompt at most a tenth off a length: its end, or all of it after the text of other rows, where it is further off."""
    size = max(1, round(wanted))
    if abs(len(prompt) - size) <= size / 10:
        return prompt
    if len(prompt) > size:
        return prompt[-size:]
    before = [i for item in items[: 1 + size] for i in [*item["prompt"], *item["branches"][0]]]
    return [*before[: size - len(prompt)], *prompt]


MEAN = 0.35
"""Mean of forced lengths over the longest."""


def rollouts(
    items: list[Item],
    per_step: int,
    steps: int,
    samples: int,
    longest: int,
    ratio: float | None = None,
    seed: int = 0,
) -> list[Item]:
    """Different prompts with ``samples`` forced lengths each: skewed, the mean 0.35 of the longest, which each batch has.

    With ``ratio`` the prompts are those whose length is nearest to so many times the mean of the forced lengths, made to
    fit where none is near.
    """
    draw, need = random.Random(seed), per_step * (steps + 1)
    prompts = _different([item["prompt"] for item in items])
    if ratio is not None:
        wanted = ratio * MEAN * longest
        nearest = sorted(prompts, key=lambda p: abs(len(p) - wanted))
        prompts = _different([fitted(p, wanted, items) for p in nearest])[:need]
    if len(prompts) < need:
        raise SystemExit(f"{len(prompts)} different prompts at hand, {need} wanted: take fewer rows or steps")
    rows: list[Item] = []
    for prompt in draw.sample(prompts, need):
        lengths = [max(1, round(longest * draw.betavariate(1, 1 / MEAN - 1))) for _ in range(samples)]
        rows.append({"prompt": prompt, "lengths": lengths})
    for row in rows[::per_step]:
        row["lengths"][0] = longest
    return rows


def _different(prompts: list[Ids]) -> list[Ids]:
    return list({tuple(p): p for p in prompts}.values())


def completed(rows: list[Item], items: list[Item], stop: int, seed: int = 0) -> list[Item]:
    """The rows with completions of their lengths, cut from other rows' responses and ended, and advantages by length."""
    draw, text = random.Random(seed), [i for item in items[:1000] for b in item["branches"] for i in b if i != stop]
    out: list[Item] = []
    for row in rows:
        lengths = row["lengths"]
        starts = [draw.randrange(len(text) - n) for n in lengths]
        spread = pstdev(lengths)
        out.append(
            row
            | {
                "branches": [[*text[s : s + n - 1], stop] for s, n in zip(starts, lengths, strict=True)],
                "advantage": [(n - fmean(lengths)) / spread if spread else 0.0 for n in lengths],
            }
        )
    return out


def long_pair(items: list[Item], total: int) -> list[Item]:
    """Two equal batches of one pair, each response with its prompt ``total`` tokens long, half of it prompt."""
    ids = [i for item in items for i in [*item["prompt"], *item["branches"][0], *item["branches"][-1]]]
    half = total // 2
    row = {"prompt": ids[:half], "branches": [ids[half:total], ids[total : total + total - half]]}
    return [row, row]
