"""Whether an answer is right, for targets that can be checked: numbers, mathematics, short texts, choices.

Each check is ``(target, answer text) -> 1.0, 0.0, or None`` where the target is not of its kind: it abstains.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction

from posttrain.errors import ConfigError
from posttrain.types import Target

Check = Callable[[Target, str], float | None]

_NUMBER = re.compile(r"(?<![\w.])[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:/\d+)?(?=\D|$)")
_MARKED = (  # what says where the answer stands, the surest first
    re.compile(r"####\s*([^\n]{1,200})"),
    re.compile(r"(?i)\b(?:final )?answer(?: is|:)\s*\**\s*([^\n]{1,200})"),
)
_BOX = "\\boxed{"


def number(target: Target, answer: str) -> float | None:
    r"""Whether the number an answer ends in is the target's, as exact fractions.

    The answer is what stands after the last ``####``, in the last ``\boxed{}``, after the last "answer is", or else the
    last number of the text. Thousands' commas, currency and percent signs are passed over.
    """
    wanted = as_number(target.answer)
    if target.kind != "number" or wanted is None:
        return None
    return float(as_number(final_answer(answer)) == wanted)


def mathematics(target: Target, answer: str) -> float | None:
    """Whether an expression equals the target's: as numbers first, else by math-verify (the extra ``verify``).

    Its own time limits need signals, which only a main thread has, so they are off: run it under a deadline
    (`posttrain.rewards.workers.killable`).

    Raises:
        ConfigError: math-verify is not installed and the answers differ as numbers.
    """
    if target.kind not in ("number", "text") or not target.answer:
        return None
    texts = [text.replace("$", "").strip().rstrip("%.") for text in (final_answer(answer), target.answer)]
    if all(_NUMBER.fullmatch(text) for text in texts):
        said, wanted = map(as_number, texts)
        return float(said is not None and said == wanted)
    try:
        from math_verify import parse, verify  # pyright: ignore[reportMissingImports, reportMissingTypeStubs]
    except ImportError as error:
        raise ConfigError(
            "checking expressions needs math-verify; install it: pip install 'posttrain[verify]'"
        ) from error
    gold = parse(f"${target.answer}$", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    found = parse(answer, parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    return float(bool(gold) and verify(gold, found, timeout_seconds=None))  # pyright: ignore[reportArgumentType]


def exact(target: Target, answer: str) -> float | None:
    """Whether a short answer is the target's text: case, articles, punctuation and spaces apart (SQuAD's rule)."""
    if target.kind != "text" or not target.answer:
        return None
    return float(normal(marked_answer(answer) or answer) == normal(target.answer))


def choice(target: Target, answer: str) -> float | None:
    r"""Whether the one letter, or the one choice's whole text, that an answer names is among the correct ones.

    Read in this order: a letter after "answer is" or in ``\boxed{}``; an answer that is a letter, as ``(B)``, ``B.`` or
    ``B) text``; the text of exactly one choice. Whoever names two has named none.
    """
    if target.kind != "choice" or not target.choices:
        return None
    picked = picked_choice(target.choices, answer)
    return float(picked is not None and picked in target.correct)


def verified(target: Target, answer: str) -> float | None:
    """The check that a target's kind names; code has none here: it runs in a sandbox (`posttrain.rewards.code`)."""
    from posttrain.rewards.constraints import followed

    checks: dict[str, Check] = {"number": number, "text": exact, "choice": choice, "constraints": followed}
    return checks[target.kind](target, answer) if target.kind in checks else None


def final_answer(text: str) -> str:
    """What an answer gives as its result: the marked part, else the last number, else the whole."""
    if (marked := marked_answer(text)) is not None:
        return marked
    numbers = [m.group() for m in _NUMBER.finditer(text) if any(c.isdigit() for c in m.group())]
    return numbers[-1] if numbers else text.strip()


def marked_answer(text: str) -> str | None:
    """The part of an answer that is marked as its result, None if nothing is."""
    if (found := _MARKED[0].findall(text)) or (found := boxed(text)) or (found := _MARKED[1].findall(text)):
        return found[-1].strip().strip("*.").strip()
    return None


def boxed(text: str) -> list[str]:
    r"""The contents of every ``\boxed{}``, braces within counted."""
    found: list[str] = []
    start = text.find(_BOX)
    while start >= 0:
        depth, at = 1, start + len(_BOX)
        while at < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 1
        if depth:
            break
        found.append(text[start + len(_BOX) : at - 1])
        start = text.find(_BOX, at)
    return found


def as_number(text: str) -> Fraction | None:
    """The number a short text is or, with words around it, begins with; None if there is none."""
    found = next(
        (m.group() for m in _NUMBER.finditer(text.replace("$", "")) if any(c.isdigit() for c in m.group())), None
    )
    if found is None or len(found) > 400:
        return None
    try:
        return Fraction(found.replace(",", "").replace("−", "-").replace("+", ""))
    except (ValueError, ZeroDivisionError):
        return None


def normal(text: str) -> str:
    """A text without case, accents' composition, articles, punctuation and extra spaces."""
    lowered = unicodedata.normalize("NFKC", text).casefold()
    plain = "".join(c for c in lowered if not unicodedata.category(c).startswith("P"))
    return " ".join(w for w in plain.split() if w not in ("a", "an", "the"))


def picked_choice(choices: tuple[str, ...], answer: str) -> int | None:
    """The position of the one choice that an answer names, None if it names none or several."""
    marked = marked_answer(answer)
    for text in [answer] if marked is None else [marked, answer]:
        letter = re.match(r"\s*\(?([A-Za-z])(?:[).:]|\s*$)", text)
        if letter and (place := ord(letter[1].upper()) - ord("A")) < len(choices):
            return place
        said = normal(text)
        named = [i for i, c in enumerate(choices) if (n := normal(c)) and re.search(rf"\b{re.escape(n)}\b", said)]
        longest = [i for i in named if not any(i != j and normal(choices[i]) in normal(choices[j]) for j in named)]
        if len(longest) == 1:
            return longest[0]
    return None
