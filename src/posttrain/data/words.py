"""Ids of text by its words: one that was met before is looked up, so that only new ones go to the tokenizer.

Tokenizers that first cut text into words encode each word by itself. Those whose way to cut is known here always cut
before a space that follows anything but white space: nothing that they match goes on from another character to a space,
and none of it looks back. So the ids of a text are the ids of its parts between such places, one after the other. They
also always cut between a letter and what isn't one, so that a new word with its comma takes no more than its parts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

from tokenizers import Tokenizer

_CLEAN = re.compile(r"[!-~\w]\Z")  # ends in what is white space in no version of Unicode
_STEM = re.compile(r"[A-Za-z]+(?=[\x00-@\[-`{-\x7f])")
_STEM = re.compile(r"[A-Za-z]+(?=[\x00-@\[-`{-\x7f])")
_SPACE = re.compile(r"(?<=[!-~\w]) ")
_MOST = 100_000  # words kept of each kind
_LONGEST = 32  # characters of a word that is kept
_WORTH = 2  # uses of a word for each new one, on average: one by itself takes about twice as long as in a text
_AT_ONCE = 1 << 20  # characters cut into words at a time

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CUTS = frozenset(_LETTERS + digits + _OTHERS for digits in (r"\p{N}", r"\p{N}{1,3}"))


class Words(NamedTuple):
    """Ids of words met before: ``first`` of those that no space precedes, ``later`` of those after one, without it."""

    first: dict[str, list[int]]
    later: dict[str, list[int]]


def cuts_at_spaces(spec: Mapping[str, Any]) -> bool:
    """Whether a tokenizer, as its file has it, encodes what lies between spaces by itself; False where unproved.

    Tokens flagged special count as text.
    """
    looked_for = [token for token in spec["added_tokens"] if not token["special"]]
    if any(" " in t["content"] or t["lstrip"] or t["rstrip"] or t["single_word"] for t in looked_for):
        return False
    if any(t["content"][:1].isalpha() for t in looked_for):
        return False
    if any("A" <= t["content"][:1].upper() <= "Z" for t in looked_for):
        return False
    if (spec["normalizer"] or {"type": "NFC"})["type"] != "NFC" or spec["model"].get("dropout"):
        return False
    node = spec["pre_tokenizer"] or {}
    match node.get("pretokenizers", [node]):
        case [{"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}]:
            return True
        case [{"type": "Digits"}, {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}]:
            return True
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
        ]:
            return pattern in _CUTS
        case _:
            return False


def encode_words(backend: Tokenizer, words: Words, texts: Sequence[str]) -> Iterator[list[int]]:
    """Yield each text's ids, the same that ``backend`` gives for it as a whole.

    Args:
        backend: for which `cuts_at_spaces` holds.
        words: of this backend; grows.
        texts: what to encode.
    """
    start = size = 0
    for end, text in enumerate(texts, 1):
        size += len(text)
        if size >= _AT_ONCE or end == len(texts):
            yield from _encode(backend, words, texts[start:end])
            start, size = end, 0


def _encode(backend: Tokenizer, words: Words, texts: Sequence[str]) -> list[list[int]]:
    parts = _parts(words, texts)
    total = sum(map(len, parts))
    heads = [part.pop(0) for part in parts]
    # What is known is copied, as another thread may use the same tokenizer.
    spaced = set[str]().union(*parts)
    later = _known(words.later, spaced)
    cut = {word: found.end() for word in spaced - later.keys() if (found := _STEM.match(word))}
    stems = {word[:end] for word, end in cut.items()}
    alone = {*heads, *(word[end:] for word, end in cut.items())}
    first, later = _known(words.first, alone), later | _known(words.later, stems)
    new = [*(alone - first.keys())], [*((spaced | stems) - cut.keys() - later.keys())]
    if sum(map(len, new)) * _WORTH > total:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    spelled = [*new[0], *(" " + word for word in new[1])]
    made = (encoding.ids for encoding in backend.encode_batch_fast(spelled, add_special_tokens=False))
    first.update(zip(new[0], made, strict=False))
    later.update(zip(new[1], made, strict=True))
    later.update((word, later[word[:end]] + first[word[end:]]) for word, end in cut.items())
    for kept, found, added in zip(words, (first, later), (new[0], [*new[1], *cut]), strict=True):
        if len(kept) > _MOST:
            kept.clear()
        kept.update((word, found[word]) for word in added if len(word) <= _LONGEST and _CLEAN.search(word))
    return [
        [*first[head], *chain.from_iterable(map(later.__getitem__, part))]
        for head, part in zip(heads, parts, strict=True)
    ]


def _parts(words: Words, texts: Sequence[str]) -> list[list[str]]:
    """Cut texts before spaces that follow no white space; the spaces go."""
    parts = [text.split(" ") for text in texts]
    met = set[str]().union(*parts)  # all that is kept is clean
    odd = {word for word in met if word not in words.later and word not in words.first and not _CLEAN.search(word)}
    if odd:  # white space before a space, or at the end of a text
        return [p if odd.isdisjoint(p) else _SPACE.split(text) for p, text in zip(parts, texts, strict=True)]
    return parts


def _known(kept: Mapping[str, list[int]], wanted: set[str]) -> dict[str, list[int]]:
    return {word: ids for word in wanted if (ids := kept.get(word)) is not None}
