"""Where each message lies in a conversation's rendered text, whatever the messages say.

The template is rendered with markers in place of contents, which shows what it writes around them, and with the
contents. Turns that a template writes in its own way (tool calls, thinking that it moves or strips) are in both
renderings as they are; such a turn lies between where its sampling starts and the stop token that ends it.
"""

from __future__ import annotations

import bisect
import itertools
import json
import operator
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from posttrain.data.causal import MARK, NEAR, marked
from posttrain.data.control import Coder, Found, find_controls, make_coder
from posttrain.data.template import (
    Talk,
    Tools,
    check_tools,
    make_talk,
    marker_places,
    markers,
    template_key,
    tool_text,
    write,
    write_guarded,
)
from posttrain.errors import ModelError
from posttrain.types import Message

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


class Scaffold(NamedTuple):
    """What a template writes around contents.

    Attributes:
        pieces: ``pieces[0]``, content ``order[0]``, ``pieces[1]`` ...
        guarded: the same pieces with data in them replaced where it spells control tokens, see `write_guarded`.
        order: the messages with a marker, as they come.
        starts: for each assistant message, the piece and the offset from its end where sampling it starts; None if
            the text before was another then.
    """

    pieces: tuple[str, ...]
    guarded: tuple[str, ...]
    order: tuple[int, ...]
    starts: tuple[tuple[int, int] | None, ...]


class Layout(NamedTuple):
    """Rendered text, its control tokens, each message's content in it, and where each assistant turn's sampling starts.

    A turn that the template writes in its own way has all that is sampled as its content, up to its stop token; None
    if it can't be told from the rest. ``edges`` are the places where contents start, in order.
    """

    text: str
    coder: Coder
    controls: list[Found]
    contents: list[tuple[int, int] | None]
    starts: list[int | None]
    edges: list[int]


class _AlteredError(Exception):
    """A content isn't in the text as it is; carries the message's position."""

    def __init__(self, message: int) -> None:
        self.message = message


def lay_out(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Tools = (),
    generation_prompt: bool = False,
    rewritten: bool = False,
) -> Layout:
    """Render the text and find each turn in it.

    ``rewritten`` lets assistant turns that aren't trained read as the template rewrites them.

    Raises:
        ModelError: the template refuses the conversation, alters a content, or leaves out tools or calls.
        DataError: as `make_talk`.
    """
    calls = frozenset(m for m, message in enumerate(messages) if message.tool_calls)
    try:
        return _lay_out(tokenizer, messages, tools, generation_prompt, calls, rewritten)
    except _AlteredError as error:
        m = error.message
    said = frozenset(m for m, message in enumerate(messages) if message.role == "assistant")
    if said != calls:
        try:
            return _lay_out(tokenizer, messages, tools, generation_prompt, said, rewritten)
        except _AlteredError as error:
            m = error.message if rewritten else m
    raise ModelError(
        f"the chat template alters the content of message {m} ({messages[m].role}), or writes other text "
        "around it because of what it says (stripped thinking, quoting ...); use a template that copies "
        "contents as they are, or, where only earlier turns are altered, say history='last' or 'each'"
    )


def _lay_out(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Tools,
    generation_prompt: bool,
    own: frozenset[int],
    rewritten: bool,
) -> Layout:
    talk = make_talk(messages, tools, own)
    if talk.data:
        check_tools(tokenizer, talk, generation_prompt)
    # A conversation's own calls or contents are in its scaffold: nothing to keep for others.
    make = _scaffold if own or talk.data else cached_scaffold
    scaffold = make(tokenizer, template_key(tokenizer), talk, generation_prompt)
    text = write(tokenizer, talk, [m.content for m in messages], generation_prompt)
    contents, ends = _align(text, scaffold, messages)
    coder = coder_for(tokenizer, bool(talk.data))
    controls = _controls(coder, scaffold, ends)
    starts = [None if s is None else ends[s[0]] - s[1] for s in scaffold.starts]
    for m in sorted(own):
        contents[m] = _own_turn(tokenizer, text, controls, contents, starts, m)
        free = rewritten and not trains(messages[m])
        if not free and not _says(text, contents[m], messages[m]):
            raise _AlteredError(m)
    edges = sorted(content[0] for content in contents if content is not None)
    return Layout(text, coder, controls, contents, starts, edges)


def trains(message: Message) -> bool:
    """Whether a language-model loss reads this turn: what it says itself, else only an assistant's."""
    return message.role == "assistant" if message.train is None else message.train


def _own_turn(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    controls: Sequence[Found],
    contents: Sequence[tuple[int, int] | None],
    starts: Sequence[int | None],
    m: int,
) -> tuple[int, int] | None:
    """What is sampled in assistant message m, without its stop token."""
    start = starts[m]
    if start is None:
        return None
    others = [c[0] for c in contents if c is not None and c[0] > start]
    limit = min([*others, *(s for s in starts if s is not None and s > start)], default=len(text))
    stops = stop_ids(tokenizer)
    return start, next((c.start for c in controls if start <= c.start < limit and c.id in stops), limit)


def _says(text: str, span: tuple[int, int] | None, message: Message) -> bool:
    """Whether a turn holds its content, whole or trimmed; without calls nothing may follow it."""
    if span is None:
        return not message.content.strip()
    body = text[span[0] : span[1]]
    return message.content.strip() in body if message.tool_calls else body.rstrip().endswith(message.content.strip())


def _controls(coder: Coder, scaffold: Scaffold, ends: Sequence[int]) -> list[Found]:
    """The control tokens that the template writes, in order."""
    found: list[Found] = []
    for piece, end in zip(scaffold.guarded, ends, strict=True):
        shift = end - len(piece)
        found += [Found(c.start + shift, c.end + shift, c.id) for c in find_controls(coder, piece)]
    return found


def _align(
    text: str, scaffold: Scaffold, messages: Sequence[Message]
) -> tuple[list[tuple[int, int] | None], list[int]]:
    """Return where each content lies, and each piece's end.

    A template may trim white space off contents and escape one that it puts in quotes as JSON does, nothing else.
    """
    spans: list[tuple[int, int] | None] = [None] * len(messages)
    first = scaffold.pieces[0]
    ends = [len(first)]
    if not text.startswith(first):
        raise _AlteredError(scaffold.order[0] if scaffold.order else 0)
    at = len(first)
    before = first
    for m, piece in zip(scaffold.order, scaffold.pieces[1:], strict=True):
        raw = messages[m].content
        forms = [raw, raw.strip(), raw.lstrip(), raw.rstrip()]
        if before.endswith('"') and piece.startswith('"'):
            forms += [json.dumps(raw, ensure_ascii=a)[1:-1] for a in (False, True)]
        kept = next((f for f in forms if text.startswith(f, at) and text.startswith(piece, at + len(f))), None)
        if kept is None:
            raise _AlteredError(m)
        spans[m] = (at, at + len(kept))
        at += len(kept) + len(piece)
        ends.append(at)
        before = piece
    if at != len(text):
        raise _AlteredError(scaffold.order[-1] if scaffold.order else 0)
    return spans, ends


def _scaffold(tokenizer: PreTrainedTokenizerBase, key: object, talk: Talk, generation_prompt: bool) -> Scaffold:
    """Render with markers for contents."""
    marks = markers(talk)
    text = write(tokenizer, talk, marks, generation_prompt)
    shown = [m for m, own in enumerate(talk.fixed) if own is None]
    places = marker_places(text)
    for m in shown:
        if (count := len(places.get(m, ()))) != 1:
            raise ModelError(
                f"the chat template writes the content of message {m} ({talk.roles[m]}) {count} times, expected "
                "once; use a template that keeps every message, or leave that turn out"
            )
    order = tuple(sorted(shown, key=lambda m: places[m]))
    hidden = text
    if talk.data or len(shown) < len(talk.fixed):
        hidden = write_guarded(tokenizer, talk, text, generation_prompt, coder_for(tokenizer, bool(talk.data)))
    bounds = [(0, 0), *((places[m][0], places[m][0] + len(marks[m])) for m in order)]
    bounds.append((len(text), len(text)))
    edges = [(a[1], b[0]) for a, b in itertools.pairwise(bounds)]
    starts: list[tuple[int, int] | None] = []
    known = _known_starts(tokenizer, talk, marks, text, generation_prompt)
    for m in range(len(talk.roles)):
        at = known[m] if m in known else _start(tokenizer, talk, marks, text, m)
        if at is not None and talk.fixed[m] is None and at > places[m][0]:
            at = None
        place = -1 if at is None else bisect.bisect_right(edges, at, key=operator.itemgetter(0)) - 1
        starts.append(None if at is None else (place, edges[place][1] - at))
    return Scaffold(tuple(text[a:b] for a, b in edges), tuple(hidden[a:b] for a, b in edges), order, tuple(starts))


cached_scaffold = lru_cache(maxsize=1024)(_scaffold)
"""`_scaffold` for conversations of which only the roles matter."""


def _start(tokenizer: PreTrainedTokenizerBase, talk: Talk, marks: list[str], text: str, m: int) -> int | None:
    """The end of the generation prompt before message m, by rendering what stands before it; see `Scaffold`."""
    if talk.roles[m] != "assistant" or m == 0:
        return None
    try:
        before = write(tokenizer, talk.head(m), marks[:m], True)
    except ModelError:
        return None
    return len(before) if text.startswith(before) else None


def _known_starts(
    tokenizer: PreTrainedTokenizerBase, talk: Talk, marks: list[str], text: str, generation_prompt: bool
) -> dict[int, int | None]:
    """What `_start` returns for messages from `NEAR` on, from two renderings where the template is proved `causal`."""
    template = tokenizer.chat_template
    ways = marked(template) if isinstance(template, str) and len(talk.roles) > NEAR else ()
    for way in ways:
        parts = write(tokenizer, talk, marks, generation_prompt, way).split(MARK)
        turns = len(parts) - 1
        if "".join(parts) != text or turns < len(talk.roles) - NEAR + 1:
            continue
        other = write(tokenizer, talk, marks, not generation_prompt)
        prompt = max(text, other, key=len).removeprefix(min(text, other, key=len))
        ends = list(itertools.accumulate(map(len, parts)))[:turns][-(len(talk.roles) - NEAR) :]
        return {
            m: end + len(prompt) if role == "assistant" and text.startswith(prompt, end) else None
            for m, role, end in zip(range(NEAR, len(talk.roles)), talk.roles[NEAR:], ends, strict=True)
        }
    return {}


def roles_only(*roles: str) -> Talk:
    """A conversation of these roles, with a marker for each content."""
    return Talk(roles, (None,) * len(roles))


def coder_for(tokenizer: PreTrainedTokenizerBase, tools: bool = False) -> Coder:
    """The tokenizer taken apart; with ``tools``, markers that the template writes around calls are control too."""
    return _cached_coder(tokenizer, template_key(tokenizer)[:-1], tools)


@lru_cache(maxsize=8)
def _cached_coder(tokenizer: PreTrainedTokenizerBase, key: object, tools: bool) -> Coder:
    # Turn markers of some tokenizers are added tokens that aren't flagged special: those the template writes
    # before an answer are control tokens too.
    full = template_key(tokenizer)
    opening = "".join(cached_scaffold(tokenizer, full, roles_only("user"), True).pieces)
    if not tools:
        return make_coder(tokenizer, opening)
    # Around calls: what the template writes with them and not without, so that thinking marks stay text.
    answered = "".join(cached_scaffold(tokenizer, full, roles_only("user", "assistant"), False).pieces)
    called = tool_text(tokenizer)
    marks = [t.content for t in tokenizer.added_tokens_decoder.values() if t.content in called]
    return make_coder(tokenizer, "\0".join([opening, *(t for t in marks if t not in answered)]))


def stop_ids(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None = None) -> frozenset[int]:
    """Return every id that ends an answer: the tokenizer's EOS, the generation config's, the template's.

    Raises:
        ModelError: none of the three names one.
    """
    configured = getattr(generation_config, "eos_token_id", None)
    found: set[Any] = set(configured) if isinstance(configured, (list, tuple)) else {configured}
    found.add(tokenizer.eos_token_id)
    if tokenizer.chat_template:
        found.add(_turn_end(tokenizer, template_key(tokenizer)))
    found.discard(None)
    if not found:
        raise ModelError("the tokenizer names no stop token; set tokenizer.eos_token")
    return frozenset(found)


@lru_cache(maxsize=64)
def _turn_end(tokenizer: PreTrainedTokenizerBase, key: object) -> int | None:
    """The id that ends an assistant turn at a conversation's end, None if the template writes none."""
    coder = coder_for(tokenizer)
    closed = cached_scaffold(tokenizer, key, roles_only("user", "assistant"), False)
    tail = find_controls(coder, closed.pieces[-1])
    opening = find_controls(coder, cached_scaffold(tokenizer, key, roles_only("user"), True).pieces[-1])
    # A template that goes straight on to open the next turn hasn't ended this one.
    return tail[0].id if tail and tail[0].id != (opening[-1].id if opening else None) else None
