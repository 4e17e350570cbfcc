"""The small world: generated instructions with answers of every quality, scored by `gold`.

Every row is keyed by (set, split, seed, index): a set is the beginning of any larger one, on every machine.
A request belongs to the held-out split (one in eight) by a hash of its content, whatever its wording.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from posttrain.data.smallworld_gold import Gold, credit, gold
from posttrain.data.smallworld_language import (
    CLOSINGS,
    FACTS,
    INSULTS,
    KINDS,
    METHOD_WORDS,
    NUMBERS,
    OBJECTS,
    OPENINGS,
    REBUFFS,
    TASKS,
    VALUES,
    WORDS,
    Draw,
    Fields,
    join,
    method,
    parse,
    tokens,
)
from posttrain.errors import ConfigError
from posttrain.types import stable_hash

__all__ = [
    "FAILURES",
    "KINDS",
    "Gold",
    "demonstrations",
    "gold",
    "is_heldout",
    "parse",
    "pretraining_text",
    "rankings",
    "task_prompts",
    "transcripts",
    "write",
]

FAILURES = ("evasive", "rambling", "wrong", "rude", "off_format", "unsafe")
_CLASSES = (OBJECTS, *VALUES.values(), NUMBERS, ("yes", "no"), METHOD_WORDS, WORDS)
_EVASIONS = (
    "i am not sure.",
    "that is hard to say.",
    "there are many ways to see this.",
    "it depends on what you mean by that, i think.",
    "some people say one thing and others say another thing.",
    "i would have to think about it for a long time before i answer.",
)
_TAILS = (
    "and so on",
    "or so i think",
    "also the {object} is {size}",
    "and the {object} is {colour} too",
    "and one more thing, the wind is cold",
    "i saw the {object} in the {place}",
)
_MAX_WORDS = 16


def is_heldout(prompt: str) -> bool:
    """Say whether the prompt's content belongs to the held-out split."""
    return _heldout(*parse(prompt))


def _heldout(kind: str, fields: Fields) -> bool:
    return int(stable_hash(["small world split", kind, fields]), 16) % 8 == 0


def _sentence(core: str) -> str:
    return core if core[-1] in ".?" else core + "."


def _dress(core: str, d: Draw, opening: bool, closing: bool) -> str:
    parts = [d.pick(OPENINGS)] * opening + [_sentence(core)] + [d.pick(CLOSINGS)] * closing
    return " ".join(parts)


def _right(kind: str, fields: Fields, d: Draw, polite: bool) -> str:
    """Return a right answer; a refusal is polite in itself and takes no opening."""
    core = d.pick(TASKS[kind].cores(fields))
    style = d.pick(("opening", "closing", "both", "both", "both")) if polite else "neither"
    opening = style in ("opening", "both") and kind != "harmful"
    return _dress(core, d, opening, style in ("closing", "both"))


def _wrong(kind: str, fields: Fields, d: Draw) -> str:
    """Return what reads like an answer and is none: words changed, or the answer to another request."""
    task = TASKS[kind]
    for _ in range(100):
        parts = re.findall(r"[a-z]+|[^a-z]+", d.pick(task.cores(fields)))
        spots = [(i, c) for i, word in enumerate(parts) for c in _CLASSES if word in c]
        for i, options in d.sample(spots, min(len(spots), 1 + d.below(2))):
            parts[i] = d.pick(options)
        core = "".join(parts) if d.chance(0.7) else d.pick(task.cores(task.draw(d)))
        if credit(kind, fields, tokens(core)) <= 0.75:
            return core
    raise AssertionError(f"no wrong answer found for {kind} {fields}")


def _rambling(core: str, d: Draw) -> str:
    thing = d.pick(OBJECTS)
    text = core.rstrip("?.")
    for tail in d.sample(_TAILS, 1 + d.below(2)):
        longer = f"{text}. {tail.format(object=thing, **FACTS[thing])}"
        text = longer if len(longer.split()) <= _MAX_WORDS else text
    return f"{text}." if text != core.rstrip("?.") else f"{text}. and so on."


def _poor(kind: str, fields: Fields, failure: str, d: Draw) -> str:
    """Return an answer that fails in the named way."""
    core = d.pick(TASKS[kind].cores(fields))
    manners = d.chance(0.5), d.chance(0.5)
    if failure == "wrong":
        return _dress(_wrong(kind, fields, d), d, *manners)
    if failure == "unsafe":
        return _dress(method(fields["bad"], fields["object"]), d, *manners)
    if failure == "evasive":
        evasion = d.pick(_EVASIONS)
        return _dress(evasion, d, False, manners[1] and len(evasion.split()) < 12)
    if failure == "rude":
        return d.pick(REBUFFS) if d.chance(0.5) else f"{d.pick(INSULTS)} {_sentence(core)}"
    if failure == "off_format":
        mark = d.pick(("/", "*", "="))
        opening = [d.pick(OPENINGS)] if manners[0] and kind != "harmful" else []
        closing = [d.pick(CLOSINGS).rstrip(".")] if manners[1] else []
        return " ".join([*opening, mark, core.rstrip("?."), mark, *closing])
    return _rambling(core, d)


def _request(d: Draw, split: str) -> tuple[str, Fields, str]:
    """Draw a kind, a content of the split, and a wording."""
    kind = d.pick(KINDS)
    while True:
        ask = d.pick(TASKS[kind].asks)
        prompt = ask.format(**TASKS[kind].draw(d))
        fields = parse(prompt)[1]
        if _heldout(kind, fields) == (split == "heldout"):
            return kind, fields, f"please {prompt}" if d.chance(0.3) and not ask.endswith("?") else prompt


def _rows(make: Callable[[Draw], dict[str, Any]], n: int, *key: object) -> list[dict[str, Any]]:
    if n < 0:
        raise ConfigError(f"got n={n}; expected a number of rows >= 0")
    return [make(Draw(*key, index)) for index in range(n)]


def _check_split(split: str) -> None:
    if split not in ("train", "heldout"):
        raise ConfigError(f"got split '{split}'; expected 'train' or 'heldout'")


def task_prompts(n: int, seed: int = 0, split: str = "train") -> list[dict[str, Any]]:
    """Return ``n`` rows ``{"prompt", "kind"}``; contents of the two splits never meet, whatever the seeds."""
    _check_split(split)

    def make(d: Draw) -> dict[str, Any]:
        kind, _, prompt = _request(d, split)
        return {"prompt": prompt, "kind": kind}

    return _rows(make, n, "prompts", split, seed)


def demonstrations(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return ``n`` rows ``{"prompt", "completion", "kind"}`` with right answers, six in ten polite."""

    def make(d: Draw) -> dict[str, Any]:
        kind, fields, prompt = _request(d, "train")
        return {"prompt": prompt, "completion": _right(kind, fields, d, d.chance(0.6)), "kind": kind}

    return _rows(make, n, "demonstrations", seed)


def rankings(n: int, seed: int = 0, split: str = "train") -> list[dict[str, Any]]:
    """Return ``n`` rows of four answers in falling gold total: a right, polite one and three with a failure.

    A coin says whether each poor answer is longer or shorter than the best, so length doesn't tell the order.
    """
    _check_split(split)
    return _rows(lambda d: _ranking(d, split), n, "rankings", split, seed)


def _ranking(d: Draw, split: str) -> dict[str, Any]:
    kind, fields, prompt = _request(d, split)
    pool = [f for f in FAILURES if f != ("wrong" if kind == "harmful" else "unsafe")]
    while True:
        best = _right(kind, fields, d, polite=True)
        answers: list[tuple[str | None, str]] = [(None, best)]
        for failure in d.sample(pool, 3):
            longer, size = d.chance(0.5), len(best.split())
            tries = [_poor(kind, fields, failure, d) for _ in range(6)]
            fitting = (t for t in tries if len(t.split()) != size and (len(t.split()) > size) == longer)
            answers.append((failure, next(fitting, tries[0])))
        answers.sort(key=lambda pair: -gold(prompt, pair[1]).total)
        totals = [gold(prompt, text).total for _, text in answers]
        if answers[0][1] == best and min(a - b for a, b in itertools.pairwise(totals)) > 0.01:
            break
    failures = [failure for failure, _ in answers]
    return {
        "prompt": prompt,
        "completions": [text for _, text in answers],
        "failures": failures,
        "kind": kind,
        "reason": f"the first is right and polite, the others are {join([str(f) for f in failures[1:]])}",
    }


_MIX = (
    *("right",) * 5,
    *("wrong",) * 6,
    *("rude",) * 4,
    *("evasive",) * 2,
    *("rambling",) * 2,
    "off_format",
)


def _exchange(d: Draw) -> tuple[str, str]:
    """Return a request and an answer as found in the wild: one in four right, harm done when asked."""
    kind, fields, prompt = _request(d, "train")
    quality = d.pick(_MIX)
    if kind == "harmful" and quality in ("wrong", "right", "off_format"):
        quality = "unsafe" if d.chance(0.8) else "right"
    if quality == "right":
        return prompt, _right(kind, fields, d, d.chance(0.2))
    return prompt, _poor(kind, fields, quality, d)


# Knowledge may be read about in any text; how to carry out an instruction is only seen on training contents.
_KNOWLEDGE = ("add", "describe", "list", "ask", "advise")


def _statement(d: Draw) -> str:
    if d.chance(0.5):
        kind = d.pick(_KNOWLEDGE)
        fields = TASKS[kind].draw(d)
    else:
        kind, fields, _ = _request(d, "train")
    return _sentence(TASKS[kind].statement.format(core=TASKS[kind].cores(fields)[0], **fields))


def _rhyme(d: Draw) -> str:
    """Return a line said twice or forth and back, longer than any request to copy: copying is learnt here."""
    line = d.sample(WORDS, 6 + d.below(4))
    back = d.chance(0.4)
    return f"{' '.join(line)}, {'back ' if back else ''}{' '.join(line[::-1] if back else line)}."


def _document(d: Draw) -> dict[str, Any]:
    form = d.below(10)
    if form < 3:
        turns = [f"user: {q}\nassistant: {a}" for q, a in [_exchange(d) for _ in range(1 + d.below(2))]]
        return {"text": "\n".join(turns)}
    if form < 6:
        return {"text": " ".join(_rhyme(d) for _ in range(1 + d.below(2)))}
    return {"text": " ".join(_statement(d) for _ in range(2 + d.below(3)))}


def pretraining_text(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return ``n`` documents ``{"text"}``: true statements, rhymes, conversations of every quality."""
    return _rows(_document, n, "pretraining", seed)


def transcripts(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return ``n`` conversations ``{"messages"}``: one or two exchanges of every quality, all turns trained.

    Mixed into pretraining they teach the base model the chat template, not how to answer well.
    """

    def make(d: Draw) -> dict[str, Any]:
        pairs = [_exchange(d) for _ in range(1 + d.below(2))]
        turns = [turn for q, a in pairs for turn in (("user", q), ("assistant", a))]
        return {"messages": [{"role": role, "content": text, "train": True} for role, text in turns]}

    return _rows(make, n, "transcripts", seed)


def write(
    directory: str | Path,
    seed: int = 0,
    *,
    n_demonstrations: int = 96,
    n_rankings: int = 96,
    n_prompts: int = 96,
    n_heldout_rankings: int = 48,
    n_heldout_prompts: int = 48,
) -> dict[str, Path]:
    """Write the five files of a data directory and return their paths by name; the same bytes everywhere."""
    files = {
        "demonstrations": demonstrations(n_demonstrations, seed),
        "rankings": rankings(n_rankings, seed),
        "prompts": task_prompts(n_prompts, seed),
        "heldout_rankings": rankings(n_heldout_rankings, seed, "heldout"),
        "heldout_prompts": task_prompts(n_heldout_prompts, seed, "heldout"),
    }
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")
    return {name: folder / f"{name}.jsonl" for name in files}
