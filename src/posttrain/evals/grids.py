"""The closing numbers as plain grids of text, which a terminal and a page draw each in its own way."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MEASURES: dict[str, str] = {
    "kl": "KL (nats\na sequence)",
    "length": "length\n(tokens)",
    "truncated": "truncated\n(share)",
    "seconds": "seconds",
}
NOT_SHOWN = "not shown at this scale"
_DIRECTION_MARKS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table of text; columns numbered in ``left`` are left-aligned, the others right-aligned."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: tuple[int, ...] = (0,)
    notes: tuple[str, ...] = ()


def closing_grids(results: Mapping[str, Any]) -> list[Grid]:
    """Lay out every section of ``results.json`` that is a table, in reading order."""
    grids: list[Grid] = []
    if results.get("reward_accuracy"):
        grids += reward_grids(results["reward_accuracy"], results.get("reward_comparisons", []))
    if results.get("policies"):
        grids.append(policy_grid(results))
    if results.get("differences"):
        grids.append(difference_grid(results["differences"]))
    return grids


def reward_grids(section: Mapping[str, Any], comparisons: Sequence[Mapping[str, Any]]) -> list[Grid]:
    """Lay out accuracy by model, reward models against baselines, and accuracy by failure label."""
    notes = []
    if "direction" in section.get("length", {}):
        entry = section["length"]
        notes.append(
            f"length: {entry['direction']} is better, as on the training rankings; "
            f"the other way round it scores {entry['flipped']:.3f}"
        )
    accuracy = Grid(
        title="Reward models: share of held-out pairs in the right order",
        header=("scorer", "accuracy", "95 % interval", "pairs", "rankings"),
        rows=tuple(
            (name, f"{e['accuracy']:.3f}", bounds(e, 3), str(e["pairs"]), str(e["rankings"]))
            for name, e in section.items()
        ),
        notes=("0.5 is chance; intervals by bootstrap over rankings", *notes),
    )
    versus = Grid(
        title="Reward models against baselines: difference in accuracy",
        header=("difference", "mean", "95 % interval", "verdict"),
        rows=tuple((row["name"], signed(row["mean"]), bounds(row, 3), verdict(row)) for row in comparisons),
        left=(0, 3),
    )
    return [accuracy, *([versus] if comparisons else []), *_failure_grid(section)]


def policy_grid(results: Mapping[str, Any]) -> Grid:
    """Lay out the policies: each score and measure with its interval on a second line."""
    policies = results["policies"]
    keys = list(dict.fromkeys(str(key) for row in policies.values() for key in row))
    keys = [k for k in keys if k not in MEASURES] + [k for k in MEASURES if k in keys]
    prompts, samples = results["prompts"], results["samples_per_prompt"]
    return Grid(
        title=f"Policies on {prompts} held-out prompts, {samples} sample{'s' * (samples != 1)} each",
        header=("policy", *(MEASURES.get(key, key) for key in keys)),
        rows=tuple((name, *(_measure(row.get(key)) for key in keys)) for name, row in policies.items()),
        notes=("second line: 95 % interval by bootstrap over prompts",),
    )


def difference_grid(differences: Sequence[Mapping[str, Any]]) -> Grid:
    """Lay out the paired differences with a verdict each."""
    count = f"{len(differences)} comparison{'s' * (len(differences) != 1)}"
    notes = [f"{count}; intervals not corrected for their number"]
    if min(row["n"] for row in differences) < 6:
        notes.append("under 6 prompts nothing is called a difference: all of one sign is too likely by chance")
    return Grid(
        title="Differences between policies, paired by prompt",
        header=("difference", "scorer", "mean", "95 % interval", "verdict"),
        rows=tuple((d["name"], d["scorer"], signed(d["mean"]), bounds(d, 3), verdict(d)) for d in differences),
        left=(0, 1, 4),
        notes=tuple(notes),
    )


def stage_grid(stages: Sequence[tuple[str, str, float | None]], *, title: str = "Stages") -> Grid:
    """Lay out (stage, kind, seconds), seconds None = not finished."""
    total = sum(seconds for _, _, seconds in stages if seconds is not None)
    rows = [(name, kind, "not finished" if s is None else duration(s)) for name, kind, s in stages]
    header = ("stage", "kind", "time")
    return Grid(title=title, header=header, rows=(*rows, ("all", "", duration(total))), left=(0, 1))


def verdict(row: Mapping[str, Any]) -> str:
    """Say in words what an interval shows; one that contains 0 shows nothing."""
    if not row["excludes_zero"]:
        return NOT_SHOWN
    return "higher" if row["mean"] > 0 else "lower"


def bounds(entry: Mapping[str, Any], digits: int) -> str:
    """Write an interval's bounds, or that there are none."""
    if entry["low"] is None or entry["high"] is None:
        return "[none: 1 unit]"
    return f"[{_fixed(entry['low'], digits)}, {_fixed(entry['high'], digits)}]"


def signed(value: float) -> str:
    """Write a difference with its sign."""
    return f"{value:+z.3f}"


def number(value: float) -> str:
    """Write a score or measure with about three significant digits."""
    return _fixed(value, _digits(value))


def duration(seconds: float) -> str:
    """Write seconds as ``12.3 s``, ``4 min 05 s`` or ``2 h 03 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def clean_text(text: str) -> str:
    r"""Make a model's text safe to show: control characters, surrogates, direction marks become ``\x1b``.

    A completion may hold terminal escape sequences or marks that reorder the text around them; line ends
    and tabs stay.
    """
    text = text.replace("\r\n", "\n")
    return "".join(c if c in "\n\t" or not _hidden(c) else _escape(c) for c in text)


def clip_text(text: str, limit: int) -> str:
    """Return at most ``limit`` characters, saying how many more there are."""
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit} more characters)"


def score_line(answer: Mapping[str, Any]) -> str:
    """Write an answer's scores on one line, and that it was cut."""
    parts = [f"{name} {number(value)}" for name, value in answer["scores"].items()]
    return ", ".join([*parts, *(["cut at the length limit"] if answer.get("truncated") else [])])


SAMPLES_NOTE = "the first answer of each policy, on prompts evenly spaced through the set"
WORST_NOTE = "the prompts with the largest fall of the mean score; shown is the answer whose own score fell most"


def row_heading(row: Mapping[str, Any]) -> str:
    """Write what a row of ``worst`` lost; empty for a row of ``samples``."""
    if "drop" not in row:
        return ""
    return f"mean {row['scorer']} fell by {number(row['drop'])} from {row['before']} to {row['after']}"


def _failure_grid(section: Mapping[str, Any]) -> list[Grid]:
    """Lay out accuracy by label of the worse answer; nothing if no answer is labelled."""
    labels = list(dict.fromkeys(label for entry in section.values() for label in entry["by_failure"]))
    if len(labels) < 2:
        return []
    entries = {label: [entry["by_failure"][label] for entry in section.values()] for label in labels}
    return [
        Grid(
            title="Accuracy by how the worse answer fails",
            header=("failure", "pairs", *(name.replace("_", "\n", 1) for name in section)),
            rows=tuple((label, str(row[0]["pairs"]), *map(_accuracy_cell, row)) for label, row in entries.items()),
            notes=("second line: 95 % interval by bootstrap over rankings",),
        )
    ]


def _accuracy_cell(entry: Mapping[str, Any]) -> str:
    return f"{entry['accuracy']:.2f}\n{bounds(entry, 2)}"


def _measure(entry: Any) -> str:
    """Write a mean with its interval below it, a bare number, or a dash for nothing."""
    if entry is None:
        return "–"
    if not isinstance(entry, Mapping):
        return number(entry)
    known = [abs(v) for v in (entry["mean"], entry["low"], entry["high"]) if v is not None]
    digits = _digits(max(known))
    return f"{_fixed(entry['mean'], digits)}\n{bounds(entry, digits)}"


def _fixed(value: float, digits: int) -> str:
    """Write a number with so many decimals, and 0 without a sign."""
    return f"{value:z.{digits}f}"


def _digits(value: float) -> int:
    """Return how many decimals leave about three significant digits."""
    return 2 if abs(value) < 100 else 1 if abs(value) < 1000 else 0


def _hidden(character: str) -> bool:
    return character in _DIRECTION_MARKS or unicodedata.category(character) in ("Cc", "Cs")


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
