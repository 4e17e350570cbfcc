"""Hacks: what a policy's answers got more of while it learnt, and pairs that tell a reward model not to pay for it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from posttrain.rewards.refine import Compare
from posttrain.types import Example, Message, Response

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?|[^\w\s]")


@dataclass(frozen=True)
class Risen:
    """A phrase (words and marks joined by spaces) and the shares of early and of late answers that contain it."""

    phrase: str
    early: float
    late: float


def words(text: str) -> list[str]:
    """A text's words and marks, in small letters."""
    return _WORD.findall(text.lower())


def phrases(text: str, longest: int) -> set[str]:
    """Every run of 1 to ``longest`` words and marks that the text contains and that begins and ends with a word."""
    found = words(text)
    runs = {tuple(found[i : i + n]) for n in range(1, longest + 1) for i in range(len(found) - n + 1)}
    return {" ".join(run) for run in runs if run[0][0].isalnum() and run[-1][0].isalnum()}


def risen(early: Sequence[str], late: Sequence[str], *, longest: int = 4, least: float = 0.1) -> list[Risen]:
    """Phrases that at least ``least`` more of the late answers contain than of the early ones, the most risen first.

    Of phrases that rose alike the longest stands first, and what is part of one before it and rose no more than that is
    left out.

    Args:
        early: answers of the policy before it learnt.
        late: its answers afterwards.
        longest: in words and marks.
        least: a difference of shares.
    """
    before, after = (Counter(p for text in texts for p in phrases(text, longest)) for texts in (early, late))
    rose = [Risen(p, before[p] / max(len(early), 1), n / max(len(late), 1)) for p, n in after.items()]
    rose = [r for r in rose if r.late - r.early >= least]
    ordered = sorted(rose, key=lambda r: (-round(r.late - r.early, 2), -len(r.phrase.split()), r.phrase))
    out: list[Risen] = []
    for item in ordered:
        if not any(f" {item.phrase} " in f" {kept.phrase} " for kept in out):
            out.append(item)
    return out


def contains(text: str, phrase: str) -> bool:
    """Whether a text has the phrase's words in a row."""
    return f" {phrase} " in f" {' '.join(words(text))} "


def without(text: str, phrase: str) -> str:
    """The text with every occurrence of the phrase cut out, and the gaps closed."""
    pattern = r"\s*".join(re.escape(w) for w in phrase.split())
    left = phrase[0].isalnum() * r"(?<!\w)"
    right = phrase[-1].isalnum() * r"(?!\w)"
    cut = re.sub(left + pattern + right, " ", text, flags=re.IGNORECASE)
    cut = re.sub(r"\s+", " ", cut)
    cut = re.sub(r"\s+([.,?!])", r"\1", cut)
    cut = re.sub(r"[.,]+([.,?!])", r"\1", cut)
    return re.sub(r"([?!])[.,]+", r"\1", cut).lstrip(" .,").strip()


def preference(examples: Sequence[Example], phrase: str, compare: Compare, *, most: int = 32) -> float | None:
    """The judge's mean probability that an answer is better without the phrase, over up to ``most`` answers; None: no such answer."""
    said = [compare(e.prompt[-1].content, clean, text) for e, clean, text in _both(examples, phrase)[:most]]
    return sum(said) / len(said) if said else None


def patch_pairs(
    late: Sequence[Example], early: Sequence[Example], phrase: str, compare: Compare, count: int
) -> list[Example]:
    """``count`` pairs of an answer without the phrase over the same one with it, where the judge does not prefer the phrase.

    First answers that had it, cut; then early answers that had it not, with it put at the end.
    """
    made = [(e, clean, text) for e, clean, text in _both(late, phrase)]
    for e in early:
        for r in e.responses:
            if r.text and not contains(r.text, phrase):
                made.append((e, r.text, f"{r.text} {phrase}" + "." * phrase[-1].isalnum()))
    found: dict[tuple[str, str, str], Example] = {}
    for e, clean, text in made:
        if len(found) == count:
            break
        if compare(e.prompt[-1].content, clean, text) > 0.5:
            found.setdefault((e.prompt_key, clean, text), _pair(e, clean, text))
    return list(found.values())


def _both(examples: Sequence[Example], phrase: str) -> list[tuple[Example, str, str]]:
    """Answers that have the phrase, each with what is left of it without."""
    having = [(e, r.text) for e in examples for r in e.responses if contains(r.text, phrase)]
    return [(e, clean, text) for e, text in having if (clean := without(text, phrase))]


def _pair(example: Example, better: str, worse: str) -> Example:
    ranked = [
        Response(messages=(Message(role="assistant", content=text),), rank=rank)
        for rank, text in enumerate((better, worse))
    ]
    return replace(example, responses=tuple(ranked), preferences=(), meta={**example.meta, "patch": True})
