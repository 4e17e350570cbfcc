"""Requirements on an answer's form that a program can check: the 25 kinds of IFEval (Zhou et al. 2023, arXiv 2311.07911).

Each check is ``(answer, arguments) -> bool``, under the name the data uses. Where the paper leaves a rule open, the
docstring says what is counted.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

from posttrain.errors import DataError
from posttrain.registry import Registry
from posttrain.types import Target

CONSTRAINTS = Registry("constraint")
"""Name to check; a constraint of one's own is registered here, or named ``package.module:function`` in the data."""

Arguments = Mapping[str, Any]


def followed(target: Target, answer: str) -> float | None:
    """1 if an answer keeps every constraint of its target, else 0 (IFEval's strict score of a prompt)."""
    kept = _kept(target, answer)
    return None if kept is None else float(all(kept))


def share_followed(target: Target, answer: str) -> float | None:
    """The share of the target's constraints that an answer keeps."""
    kept = _kept(target, answer)
    return None if kept is None else sum(kept) / len(kept)


def _kept(target: Target, answer: str) -> list[bool] | None:
    """What each constraint says; an empty answer keeps none, as in IFEval."""
    if target.kind != "constraints" or not target.constraints:
        return None
    checks = [(_known(name), arguments) for name, arguments in target.constraints]
    return [bool(answer.strip()) and bool(check(answer, arguments)) for check, arguments in checks]


def _known(name: str) -> Callable[[str, Arguments], bool]:
    """A registered check; names in data are never imported.

    Raises:
        DataError: no check of that name.
    """
    if name not in CONSTRAINTS:
        raise DataError(f"unknown constraint '{name}'; register it in posttrain.rewards.constraints.CONSTRAINTS")
    return CONSTRAINTS[name]


def _compared(count: int, relation: Any, wanted: Any) -> bool:
    """``less than`` is strict, ``at least`` is not, as in IFEval; nothing said means ``at least``."""
    if relation not in (None, "less than", "at least"):
        raise DataError(f"got the relation {relation!r} in a constraint; expected 'less than' or 'at least'")
    return count < int(wanted) if relation == "less than" else count >= int(wanted)


@CONSTRAINTS.register("length_constraints:number_words")
def number_words(answer: str, given: Arguments) -> bool:
    """Runs of letters, digits and underscores, against ``num_words``."""
    return _compared(len(re.findall(r"\w+", answer)), given.get("relation"), given["num_words"])


@CONSTRAINTS.register("length_constraints:number_sentences")
def number_sentences(answer: str, given: Arguments) -> bool:
    """Stretches that end in ``.``, ``!`` or ``?`` before a space or the end, titles such as "Dr." apart."""
    plain = re.sub(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|vs|etc|e\.g|i\.e)\.", " ", answer)
    ends = [part for part in re.split(r"[.!?]+[\"')\]]*(?=\s|$)", plain) if re.search(r"\w", part)]
    return _compared(len(ends), given.get("relation"), given["num_sentences"])


@CONSTRAINTS.register("length_constraints:number_paragraphs")
def number_paragraphs(answer: str, given: Arguments) -> bool:
    """Exactly ``num_paragraphs`` parted by ``***``; an empty one within fails."""
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", answer)]
    trimmed = parts[1 if not parts[0] else 0 : -1 if len(parts) > 1 and not parts[-1] else None]
    return all(trimmed) and len(trimmed) == int(given["num_paragraphs"])


@CONSTRAINTS.register("length_constraints:nth_paragraph_first_word")
def nth_paragraph_first_word(answer: str, given: Arguments) -> bool:
    """Exactly ``num_paragraphs`` parted by an empty line, the ``nth_paragraph`` beginning with ``first_word``."""
    parts = [part.strip() for part in answer.split("\n\n")]
    nth, full = int(given["nth_paragraph"]), [part for part in parts if part]
    if nth > len(parts) or not parts[nth - 1] or len(full) != int(given["num_paragraphs"]):
        return False
    first = re.match(r"[\"'\W]*(\w[\w'-]*)", parts[nth - 1])
    return first is not None and first[1].lower() == str(given["first_word"]).lower()


@CONSTRAINTS.register("keywords:existence")
def keywords(answer: str, given: Arguments) -> bool:
    """Every one of ``keywords`` stands somewhere, in any case."""
    return all(str(word).lower() in answer.lower() for word in given["keywords"])


@CONSTRAINTS.register("keywords:forbidden_words")
def forbidden_words(answer: str, given: Arguments) -> bool:
    """None of ``forbidden_words`` stands as a word of its own."""
    return not any(re.search(rf"\b{re.escape(str(w))}\b", answer, re.IGNORECASE) for w in given["forbidden_words"])


@CONSTRAINTS.register("keywords:frequency")
def keyword_frequency(answer: str, given: Arguments) -> bool:
    """How often ``keyword`` stands, within words too."""
    count = answer.lower().count(str(given["keyword"]).lower())
    return _compared(count, given.get("relation"), given["frequency"])


@CONSTRAINTS.register("keywords:letter_frequency")
def letter_frequency(answer: str, given: Arguments) -> bool:
    """How often ``letter`` stands, in either case."""
    count = answer.lower().count(str(given["letter"]).lower())
    return _compared(count, given.get("let_relation"), given["let_frequency"])


@CONSTRAINTS.register("change_case:capital_word_frequency")
def capital_words(answer: str, given: Arguments) -> bool:
    """Words without a small letter and with a capital."""
    count = sum(word.isupper() for word in re.findall(r"[\w'-]+", answer))
    return _compared(count, given.get("capital_relation"), given["capital_frequency"])


@CONSTRAINTS.register("change_case:english_capital")
def all_capitals(answer: str, given: Arguments) -> bool:
    """English without a small letter."""
    return answer.isupper() and speaks(answer.lower(), "en") is not False


@CONSTRAINTS.register("change_case:english_lowercase")
def all_small(answer: str, given: Arguments) -> bool:
    """English without a capital letter."""
    return answer.islower() and speaks(answer, "en") is not False


@CONSTRAINTS.register("language:response_language")
def language(answer: str, given: Arguments) -> bool:
    """The answer is in ``language``, an ISO 639 code; one that can't be told passes, as in IFEval."""
    return speaks(answer, str(given["language"])) is not False


@CONSTRAINTS.register("detectable_content:number_placeholders")
def placeholders(answer: str, given: Arguments) -> bool:
    """At least ``num_placeholders`` in square brackets."""
    return len(re.findall(r"\[[^\]\n]*\]", answer)) >= int(given["num_placeholders"])


@CONSTRAINTS.register("detectable_content:postscript")
def postscript(answer: str, given: Arguments) -> bool:
    """A postscript that begins with ``postscript_marker``, "P.S." or "P.P.S"; points may be followed by a space."""
    letters = [c for c in str(given["postscript_marker"]) if c.isalnum()]
    return re.search(r"\.?\s?".join(map(re.escape, letters)) + r"\b", answer, re.IGNORECASE) is not None


@CONSTRAINTS.register("detectable_format:number_bullet_lists")
def bullets(answer: str, given: Arguments) -> bool:
    """Exactly ``num_bullets`` lines that begin with ``* `` or ``- ``."""
    return len(re.findall(r"(?m)^[ \t]*(?:\*[^*\n]|-)", answer)) == int(given["num_bullets"])


@CONSTRAINTS.register("detectable_format:constrained_response")
def constrained(answer: str, given: Arguments) -> bool:
    """One of the three sentences IFEval allows."""
    return any(f"My answer is {word}." in answer for word in ("yes", "no", "maybe"))


@CONSTRAINTS.register("detectable_format:number_highlighted_sections")
def highlights(answer: str, given: Arguments) -> bool:
    """At least ``num_highlights`` of ``*text*`` or ``**text**``, within a line."""
    found = re.findall(r"\*\*([^\n*]+)\*\*|\*([^\n*]+)\*", answer)
    return sum(bool((a or b).strip()) for a, b in found) >= int(given["num_highlights"])


@CONSTRAINTS.register("detectable_format:multiple_sections")
def sections(answer: str, given: Arguments) -> bool:
    """At least ``num_sections`` headed by ``section_spliter`` and a number."""
    heads = re.findall(rf"{re.escape(str(given['section_spliter']).strip())}\s?\d+", answer)
    return len(heads) >= int(given["num_sections"])


@CONSTRAINTS.register("detectable_format:json_format")
def as_json(answer: str, given: Arguments) -> bool:
    """The whole answer is JSON, in a code fence or not."""
    plain = re.sub(r"\A\s*```(?:json|JSON|Json)?|```\s*\Z", "", answer).strip()
    try:
        json.loads(plain)
    except (ValueError, RecursionError):
        return False
    return True


@CONSTRAINTS.register("detectable_format:title")
def title(answer: str, given: Arguments) -> bool:
    """A title in double angular brackets."""
    return any(inside.strip("< >") for inside in re.findall(r"<<([^\n]+?)>>", answer))


@CONSTRAINTS.register("combination:two_responses")
def two_responses(answer: str, given: Arguments) -> bool:
    """Two different answers parted by six asterisks."""
    parts = [part.strip() for part in answer.split("******")]
    full = [part for part in parts if part]
    return len(full) == 2 and full[0] != full[1] and all(parts[1:-1])


@CONSTRAINTS.register("combination:repeat_prompt")
def repeats_prompt(answer: str, given: Arguments) -> bool:
    """The answer begins with ``prompt_to_repeat``."""
    return answer.strip().lower().startswith(str(given["prompt_to_repeat"]).strip().lower())


@CONSTRAINTS.register("startend:end_checker")
def ends_with(answer: str, given: Arguments) -> bool:
    """The answer ends in ``end_phrase``, a quotation mark after it apart."""
    return answer.strip().strip('"').lower().endswith(str(given["end_phrase"]).strip().lower())


@CONSTRAINTS.register("punctuation:no_comma")
def no_comma(answer: str, given: Arguments) -> bool:
    """No comma at all."""
    return "," not in answer


@CONSTRAINTS.register("startend:quotation")
def quoted(answer: str, given: Arguments) -> bool:
    """The whole answer stands in double quotation marks."""
    plain = answer.strip()
    return len(plain) > 1 and plain[0] == plain[-1] == '"'


_SCRIPTS = {
    "ar": "ARABIC", "fa": "ARABIC", "ur": "ARABIC", "bg": "CYRILLIC", "ru": "CYRILLIC", "uk": "CYRILLIC",
    "bn": "BENGALI", "el": "GREEK", "gu": "GUJARATI", "he": "HEBREW", "hi": "DEVANAGARI", "mr": "DEVANAGARI",
    "ne": "DEVANAGARI", "ja": "HIRAGANA KATAKANA CJK", "kn": "KANNADA", "ko": "HANGUL", "pa": "GURMUKHI",
    "ta": "TAMIL", "te": "TELUGU", "th": "THAI", "zh": "CJK",
}  # fmt: skip
_COMMON = {
    "de": "der die und das ist nicht ein eine mit ich zu den sie von auf für",
    "en": "the and of to is in that it for you with are this be on have not",
    "es": "el la los de que y en un una es por con para no las se",
    "fi": "ja on ei se että hän oli mutta ovat kun niin myös tai",
    "fr": "le la les et des est une un que pour dans pas ce qui vous avec",
    "it": "il la che di e un una per non è con sono del della gli",
    "pt": "o a os que de e um uma não para com é do da em se",
    "sw": "na ya wa kwa ni katika za la kuwa hii ili lakini",
    "vi": "và là của có không được cho một những người trong với",
}  # fmt: skip


def speaks(text: str, code: str) -> bool | None:
    """Whether a text is in a language: by the script of most letters, and among Latin ones by their commonest words.

    Languages of one script are not told apart outside Latin. None where neither says anything: another language, no
    letters, no common word.
    """
    letters = [unicodedata.name(c, "").partition(" ")[0] for c in text[:20_000] if c.isalpha()]
    if not letters:
        return None
    if code in _SCRIPTS:
        return sum(name in _SCRIPTS[code].split() for name in letters) > len(letters) / 2
    words = re.findall(r"\w+", text[:20_000].lower())
    if sum(name == "LATIN" for name in letters) <= len(letters) / 2:
        return False
    counts = {name: sum(w in common.split() for w in words) for name, common in _COMMON.items()}
    return counts[code] == max(counts.values()) if code in counts and any(counts.values()) else None
