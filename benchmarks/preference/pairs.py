"""Rows of the small world made for one question each; every row follows from a seed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.preference.lab import from_rows

from posttrain.data import smallworld
from posttrain.data.smallworld import gold, parse
from posttrain.data.smallworld_language import (
    CLOSINGS,
    METHOD_WORDS,
    NUMBERS,
    OBJECTS,
    OPENINGS,
    REBUFFS,
    TASKS,
    VALUES,
    WORDS,
    Draw,
    method,
)
from posttrain.types import Example

CLASSES = (OBJECTS, *VALUES.values(), NUMBERS, METHOD_WORDS, WORDS)
PLAIN = ("copy", "reverse", "sort", "count", "add", "describe", "list", "advise")
"""Kinds of request whose right answers are words that can be exchanged one by one."""


def _requests(split: str, seed: int, kinds: Sequence[str]) -> Any:
    """Requests of some kinds without end: ``(prompt, kind, shortest right answer, draw)``."""
    index = 0
    while True:
        for row in smallworld.task_prompts(64, seed=1000 * seed + index, split=split):
            if row["kind"] in kinds:
                kind, fields = parse(row["prompt"])
                yield (
                    row["prompt"],
                    kind,
                    TASKS[kind].cores(fields)[0],
                    Draw("benchmark pairs", split, seed, row["prompt"]),
                )
        index += 1


def _taken(rows: Any, count: int) -> list[Any]:
    """The first ``count`` of rows that are there."""
    out: list[Any] = []
    for row in rows:
        out += [row] if row is not None else []
        if len(out) == count:
            break
    return out


def near_identical(count: int, seed: int, split: str = "train") -> list[Example]:
    """Pairs that differ in one word: a right answer, and the same with a word exchanged for another of its kind."""

    def pair(prompt: str, core: str, d: Draw) -> dict[str, str] | None:
        parts = re.findall("[a-z]+|[^a-z]+", core)
        spots = [(i, c) for i, word in enumerate(parts) for c in CLASSES if word in c]
        if not spots:
            return None
        place, options = d.pick(spots)
        other = d.pick([word for word in options if word != parts[place]])
        changed = "".join([*parts[:place], other, *parts[place + 1 :]])
        right, wrong = f"{core}.", f"{changed}."
        worse = gold(prompt, wrong).total < gold(prompt, right).total
        return {"prompt": prompt, "chosen": right, "rejected": wrong} if worse else None

    return from_rows(_taken((pair(p, c, d) for p, _, c, d in _requests(split, seed, PLAIN)), count))


def near_ties(count: int, seed: int, split: str = "train") -> list[Example]:
    """Pairs of two right answers, of which the better one has manners: gold scores differ by 0.06."""

    def pair(prompt: str, core: str, d: Draw) -> dict[str, str]:
        polite = f"{d.pick(OPENINGS)} {core}." if d.chance(0.5) else f"{core}. {d.pick(CLOSINGS)}"
        return {"prompt": prompt, "chosen": polite, "rejected": f"{core}."}

    return from_rows(_taken((pair(p, c, d) for p, _, c, d in _requests(split, seed, PLAIN)), count))


def closings(count: int, seed: int, split: str = "train") -> list[Example]:
    """Pairs that agree up to where the rejected answer stops: the chosen one closes politely before it does."""

    def pair(prompt: str, core: str, d: Draw) -> dict[str, str]:
        return {"prompt": prompt, "chosen": f"{core}. {d.pick(CLOSINGS)}", "rejected": f"{core}."}

    return from_rows(_taken((pair(p, c, d) for p, _, c, d in _requests(split, seed, PLAIN)), count))


def clear_pairs(count: int, seed: int, split: str = "train") -> list[Example]:
    """The best and the worst answer of rankings."""
    rows = smallworld.rankings(count, seed=seed, split=split)
    ends = [{"prompt": r["prompt"], "chosen": r["completions"][0], "rejected": r["completions"][-1]} for r in rows]
    return from_rows(ends)


def flipped(examples: Sequence[Example], share: float, seed: int) -> list[Example]:
    """The rows, of which ``share`` have chosen and rejected the other way round."""
    wrong = set(Draw("benchmark flips", seed).sample(range(len(examples)), round(share * len(examples))))
    swap = {0: 1, 1: 0}
    return [
        replace(e, responses=tuple(replace(r, rank=swap[r.rank or 0]) for r in e.responses)) if i in wrong else e
        for i, e in enumerate(examples)
    ]


def right_answers(count: int, seed: int, kinds: Sequence[str], split: str = "train") -> list[Example]:
    """Demonstrations of some kinds of request: the shortest right answer, without manners."""
    rows = _taken(_requests(split, seed, kinds), count)
    return from_rows([{"prompt": p, "completion": f"{c}."} for p, _, c, _ in rows])


def unwanted(count: int, seed: int, split: str = "train") -> list[Example]:
    """Pairs against rudeness and harm: a right answer, and a rebuff, or where harm was asked for its method."""

    def pair(prompt: str, kind: str, core: str, d: Draw) -> dict[str, str]:
        fields = parse(prompt)[1]
        bad = f"{method(fields['bad'], fields['object'])}." if kind == "harmful" else d.pick(REBUFFS)
        return {"prompt": prompt, "chosen": f"{core}.".replace("..", "."), "rejected": bad}

    return from_rows(_taken((pair(p, k, c, d) for p, k, c, d in _requests(split, seed, tuple(TASKS))), count))
