"""Text to token ids such that text can never become a control token (turn markers, BOS, EOS ...)."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenizers import Tokenizer

from posttrain.data.words import Words, cuts_at_spaces
from posttrain.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Control(NamedTuple):
    """A control token: its id, and whether it swallows white space before or after it."""

    id: int
    lstrip: bool
    rstrip: bool


class Coder(NamedTuple):
    """A tokenizer taken apart: control tokens on one side, plain text on the other.

    Attributes:
        controls: text to control token.
        pattern: finds control tokens, the longest first; None without any.
        starts, ends: what a control token's spelling can start or end with, short of the whole.
        forbidden: ids that plain text must not give.
        prefixed: encodes plain text as at a text's start (sentencepiece-like tokenizers add a space there).
        bare: encodes plain text as the continuation of other text, without such a space.
        prefix_after_control: whether that prefix also comes after a control token.
        words: ids of words met before, where plain text may be encoded word by word; else None.
    """

    controls: dict[str, Control]
    pattern: re.Pattern[str] | None
    starts: frozenset[str]
    ends: frozenset[str]
    forbidden: frozenset[int]
    prefixed: Tokenizer
    bare: Tokenizer
    prefix_after_control: bool
    words: Words | None


class Coded(NamedTuple):
    """Token ids and, for each, the characters ``(start, end)`` it came from."""

    ids: list[int]
    chars: list[tuple[int, int]]


class Found(NamedTuple):
    """A control token in rendered text: its characters and its id."""

    start: int
    end: int
    id: int


def control_tokens(tokenizer: PreTrainedTokenizerBase, scaffold: str = "") -> dict[str, Control]:
    """Return the control tokens: special ones, and other added tokens that the template's ``scaffold`` uses.

    White space is never control: some tokenizers hold line breaks as added tokens.
    """
    return {
        token.content: Control(index, token.lstrip, token.rstrip)
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special or (token.content in scaffold and not token.content.isspace())
    }


def make_coder(tokenizer: PreTrainedTokenizerBase, scaffold: str = "") -> Coder:
    """Take a tokenizer apart, see `Coder`; ``scaffold`` is what its template writes around a turn.

    Raises:
        ModelError: a tokenizer without a fast backend.
    """
    controls = control_tokens(tokenizer, scaffold)
    spec = _spec(tokenizer)
    for token in spec["added_tokens"]:
        token["special"] = token["content"] in controls
    spec.update(post_processor=None, truncation=None, padding=None)
    prefixed = bare = _plain(spec)
    scheme = _prefix_scheme(spec["normalizer"]) or _prefix_scheme(spec["pre_tokenizer"])
    if scheme:
        spec["normalizer"] = _without_prefix(spec["normalizer"])
        spec["pre_tokenizer"] = _without_prefix(spec["pre_tokenizer"])
        bare = _plain(spec)
    # A model with an unknown-token entry gives that id for text it can't spell; that is not a forgery.
    model = spec["model"]
    unknown = model.get("unk_id", prefixed.token_to_id(model.get("unk_token") or ""))
    longest_first = sorted(controls, key=len, reverse=True)
    return Coder(
        controls=controls,
        pattern=re.compile("|".join(map(re.escape, longest_first))) if controls else None,
        starts=frozenset(c[:i] for c in controls for i in range(1, len(c))),
        ends=frozenset(c[i:] for c in controls for i in range(1, len(c))),
        forbidden=frozenset(c.id for c in controls.values()) - {unknown},
        prefixed=prefixed,
        bare=bare,
        prefix_after_control=scheme != "first",
        words=Words({}, {}) if not scheme and cuts_at_spaces(spec) else None,
    )


def encode_text(coder: Coder, text: str, prefix: bool = False) -> Coded:
    """Encode plain text: a control token's spelling inside it is encoded as ordinary characters.

    Args:
        coder: from `make_coder`.
        text: any text.
        prefix: whether the tokenizer's start-of-text prefix applies (see `Coder`).

    Raises:
        DataError: a character that this tokenizer can only spell as a control token.
    """
    out = Coded([], [])
    todo = [(0, text, prefix)]
    while todo:
        base, piece, starts = todo.pop()
        encoding = (coder.prefixed if starts else coder.bare).encode(piece, add_special_tokens=False)
        if coder.forbidden.isdisjoint(encoding.ids):
            out.ids.extend(encoding.ids)
            out.chars.extend((base + a, base + b) for a, b in encoding.offsets)
            continue
        # A vocabulary may reach a control token without the added-token search (whole words, unigram pieces):
        # cut inside each of its spellings, all at once lest many take quadratic time, and encode what lies between.
        cuts = [0]
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token not in coder.forbidden:
                continue
            if end - start < 2:
                raise DataError(
                    f"the text {piece[start:end]!r} is a control token of this tokenizer "
                    f"(id {token}) and can't be spelled otherwise; remove it from the data"
                )
            cuts.append(start + 1)
        parts = [(base + a, piece[a:b], starts and a == 0) for a, b in itertools.pairwise([*cuts, len(piece)])]
        todo += reversed(parts)
    return out


def find_controls(coder: Coder, text: str) -> list[Found]:
    """Return the control tokens that a text spells, in order."""
    if coder.pattern is None:
        return []
    return [Found(*m.span(), coder.controls[m.group()].id) for m in coder.pattern.finditer(text)]


def encode_controlled(coder: Coder, text: str, controls: Sequence[Found], cuts: Sequence[int], begin: int = 0) -> Coded:
    """Encode ``text[begin:]``: control tokens where ``controls`` says, plain text between.

    Args:
        coder: from `make_coder`.
        text: the rendered conversation.
        controls: from `find_controls`; those that end after ``text`` are left out.
        cuts: characters that no token may straddle (the start of each sampled turn).
        begin: 0 or one of the cuts; the text before it still decides whether a prefix is due.
    """
    out = Coded([], [])
    at = previous = 0  # end of what is encoded; end of the last control token with the white space it swallowed
    stops = sorted({*cuts, len(text)})
    waiting = [c for c in controls if c.end <= len(text)]
    for stop in stops:
        while waiting and waiting[0].end <= stop:
            found = waiting.pop(0)
            low, high = _swallow(coder, text, found, at, stop)
            if at >= begin:
                _append(out, coder, text, (at, low), previous)
                out.ids.append(found.id)
                out.chars.append((found.start, found.end))
            at = previous = high
        if at >= begin:
            _append(out, coder, text, (at, stop), previous)
        at = max(at, stop)
    return out


def _append(out: Coded, coder: Coder, text: str, span: tuple[int, int], previous: int) -> None:
    """Encode plain text onto ``out``; ``previous`` is where the last control token ended."""
    low, high = span
    if low < high:
        prefix = low == 0 or (low == previous and coder.prefix_after_control)
        coded = encode_text(coder, text[low:high], prefix)
        out.ids.extend(coded.ids)
        out.chars.extend((low + a, low + b) for a, b in coded.chars)


def _swallow(coder: Coder, text: str, found: Found, low: int, high: int) -> tuple[int, int]:
    """Widen a control token's span by the white space it swallows, within ``low .. high``."""
    start, end = found.start, found.end
    control = coder.controls[text[start:end]]
    while control.lstrip and start > low and text[start - 1].isspace():
        start -= 1
    while control.rstrip and end < high and text[end].isspace():
        end += 1
    return start, end


def _spec(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ModelError(
            f"{type(tokenizer).__name__} has no fast backend, which spans and masks need; load a "
            "tokenizer.json with AutoTokenizer"
        )
    return json.loads(backend.to_str())


def _plain(spec: dict[str, Any]) -> Tokenizer:
    """A backend that doesn't look for special tokens in text."""
    backend = Tokenizer.from_str(json.dumps(spec))
    backend.encode_special_tokens = True
    for token in spec["added_tokens"]:
        if (found := backend.token_to_id(token["content"])) != token["id"]:
            raise ModelError(
                f"added token {token['content']!r} has id {token['id']}, but {found} once the tokenizer is "
                "saved and loaded; save it and load that copy"
            )
    return backend


def _children(node: dict[str, Any]) -> list[dict[str, Any]]:
    return node.get("normalizers") or node.get("pretokenizers") or []


def _prefix_scheme(node: dict[str, Any] | None) -> str:
    """How a component puts a space before text: 'always', 'first' (at offset 0 only) or '' (never)."""
    if node is None:
        return ""
    if node["type"] == "Sequence":
        return next((s for s in map(_prefix_scheme, _children(node)) if s), "")
    if node["type"] == "Metaspace":
        return node["prepend_scheme"].replace("never", "")
    adds = node["type"] == "Prepend" or (node["type"] == "ByteLevel" and node["add_prefix_space"])
    return "always" if adds else ""


def _without_prefix(node: dict[str, Any] | None) -> dict[str, Any] | None:
    """The same component without the space it puts before text."""
    if node is None or node["type"] == "Prepend":
        return None
    if node["type"] == "Sequence":
        key = "normalizers" if "normalizers" in node else "pretokenizers"
        return {**node, key: [kept for child in _children(node) if (kept := _without_prefix(child))]}
    if node["type"] == "Metaspace":
        return {**node, "prepend_scheme": "never"}
    if node["type"] == "ByteLevel":
        return {**node, "add_prefix_space": False}
    return node
