"""Many conversations rendered at once, with the ids, spans and masks that `chat.render` gives one by one.

Where a template is proved to copy contents (`copying`), what it writes depends on the roles only: a plan for each
sequence of roles holds the ids of all that stands between contents, and only text with contents in it is encoded,
that of all conversations in one call. Any other conversation goes through `chat.render`.
"""

from __future__ import annotations

import bisect
import operator
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenizers import Tokenizer

from posttrain.data.chat import Rendered, Span, check_bos, render, render_branch
from posttrain.data.control import Coder, Found, encode_text, find_controls
from posttrain.data.copying import copies_contents
from posttrain.data.formats import ROLES
from posttrain.data.layout import Scaffold, cached_scaffold, coder_for, roles_only, stop_ids, trains
from posttrain.data.template import Talk, Tools, markers, template_key, write
from posttrain.errors import ModelError
from posttrain.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Ask(NamedTuple):
    """One rendering: a whole conversation, or, with ``answer_from``, only what follows the prompt of so many turns."""

    messages: Sequence[Message]
    tools: Tools = ()
    generation_prompt: bool = False
    answer_from: int | None = None
    rewritten: bool = False


class _Fixed(NamedTuple):
    """Ids that don't depend on contents; ``turn`` is the assistant message they are sampled in, or -1."""

    ids: list[int]
    turn: int


class _Text(NamedTuple):
    """Text to encode: strings and, as numbers, messages whose contents come there; else as `_Fixed`."""

    parts: tuple[str | int, ...]
    turn: int
    prefix: bool
    lstrip: bool
    rstrip: bool


class _Plan(NamedTuple):
    """How conversations of one sequence of roles become ids.

    Attributes:
        items: in order; none straddles the start of a sampled turn.
        trimmed: for each message, whether the template trims its content on the left and on the right.
        first: for each assistant message, the item that starts its sampled turn.
        after: for each message, the item after the stop token that ends it; None if none follows its content.
        where: for each message, the item with its content.
    """

    items: tuple[_Fixed | _Text, ...]
    trimmed: tuple[tuple[bool, bool], ...]
    first: dict[int, int]
    after: dict[int, int]
    where: dict[int, int]


def render_many(tokenizer: PreTrainedTokenizerBase, asks: Sequence[Ask], *, spans: bool = True) -> list[Rendered]:
    """Render conversations; the same as `chat.render` (or `render_branch`) one by one.

    Args:
        tokenizer: with a chat template.
        asks: what to render.
        spans: False leaves spans empty, which is faster.

    Raises:
        ModelError: as `chat.render`; the message doesn't say which conversation it is.
        DataError: likewise.
    """
    template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    if not asks or not copies_contents(template):
        return [_slow(tokenizer, ask, spans) for ask in asks]
    key = template_key(tokenizer)
    texts = _Texts([], [])
    jobs = [_job(tokenizer, key, ask, texts) for ask in asks]
    offsets = spans or any(m.train for ask in asks for m in ask.messages if m.role != "assistant")
    coder = coder_for(tokenizer)
    coded = _Texts(
        *(
            _encode_batch(backend, some, offsets, coder)
            for backend, some in zip((coder.bare, coder.prefixed), texts, strict=True)
        )
    )
    out: list[Rendered] = []
    for ask, job in zip(asks, jobs, strict=True):
        made = None if job is None else _assemble(job, ask, coded, spans)
        if made is not None and ask.answer_from is None:
            check_bos(tokenizer, made.ids)
        out.append(_slow(tokenizer, ask, spans) if made is None else made)
    return out


class _Texts(NamedTuple):
    """Texts to encode, or what they became, without and with the tokenizer's start-of-text prefix."""

    bare: list[Any]
    prefixed: list[Any]


class _Job(NamedTuple):
    """A plan, the items of it that are asked for, and for each `_Text` of them its text's number."""

    plan: _Plan
    begin: int
    end: int
    numbers: list[int]


def _slow(tokenizer: PreTrainedTokenizerBase, ask: Ask, spans: bool) -> Rendered:
    messages, tools, rewritten = ask.messages, ask.tools, ask.rewritten
    if ask.answer_from is None:
        made = render(tokenizer, messages, tools=tools, generation_prompt=ask.generation_prompt, rewritten=rewritten)
    else:
        prompt, response = messages[: ask.answer_from], messages[ask.answer_from :]
        made = render_branch(tokenizer, prompt, response, tools=tools, rewritten=rewritten)
    return made if spans else made._replace(spans=[])


def _job(tokenizer: PreTrainedTokenizerBase, key: tuple[Any, ...], ask: Ask, texts: _Texts) -> _Job | None:
    """Put the conversation's texts into ``texts``; None if it has to be rendered by itself."""
    messages = ask.messages
    if ask.tools or not messages:
        return None
    for m in messages:
        if m.tool_calls or m.name or m.call_id or m.role not in ROLES or not m.content.strip():
            return None
    plan = _plan(tokenizer, key, tuple([m.role for m in messages]), ask.generation_prompt)
    if plan is None:
        return None
    begin, end, last = 0, len(plan.items), len(messages) - 1
    if ask.answer_from is not None:
        if ask.answer_from not in plan.first or last not in plan.first:
            return None
        begin, end = plan.first[ask.answer_from], plan.after[last]
    contents = [_trim(m.content, *sides) for m, sides in zip(messages, plan.trimmed, strict=True)]
    if not all(c.isascii() or _is_unicode(c) for c in contents):
        return None
    numbers: list[int] = []
    for item in plan.items[begin:end]:
        if isinstance(item, _Text):
            text = "".join([contents[p] if isinstance(p, int) else p for p in item.parts])
            text = _trim(text, item.lstrip, item.rstrip)
            pool = texts[item.prefix]
            numbers.append(len(pool))
            pool.append(text)
    return _Job(plan, begin, end, numbers)


def _trim(text: str, left: bool, right: bool) -> str:
    text = text.lstrip() if left else text
    return text.rstrip() if right else text


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _encode_batch(backend: Tokenizer, texts: list[str], offsets: bool, coder: Coder) -> list[Encoded | None]:
    """Each text's ids, and where they came from if asked; None where it gives a control token."""
    encode = backend.encode_batch if offsets else backend.encode_batch_fast
    made: list[Encoded | None] = []
    for encoding in encode(texts, add_special_tokens=False):
        ids = encoding.ids
        clean = coder.forbidden.isdisjoint(ids)
        made.append(Encoded(ids, encoding if offsets else None) if clean else None)
    return made


class Encoded(NamedTuple):
    """A text's ids, and the encoding, which knows where they came from."""

    ids: list[int]
    source: Any


def _assemble(job: _Job, ask: Ask, coded: _Texts, spans: bool) -> Rendered | None:
    plan, messages = job.plan, ask.messages
    skipped = ask.answer_from or 0
    flags = [k >= skipped and trains(m) for k, m in enumerate(messages)]
    ids: list[int] = []
    mask: list[bool] = []
    at = [0]  # the number of tokens before each item
    pieces: list[Encoded | None] = []
    numbers = iter(job.numbers)
    for item in plan.items[job.begin : job.end]:
        piece = None
        if isinstance(item, _Text):
            piece = coded[item.prefix][next(numbers)]
            if piece is None:
                return None
        new = item.ids if isinstance(item, _Fixed) else piece.ids  # pyright: ignore[reportOptionalMemberAccess]
        ids += new
        mask += [item.turn >= 0 and flags[item.turn]] * len(new)
        at.append(len(ids))
        pieces.append(piece)
    found: list[Span] = []
    for m, message in enumerate(messages):
        if m >= skipped and (spans or (flags[m] and message.role != "assistant")):
            low, high = _span(job, m, at, pieces, messages)
            found.append(Span(m - skipped, low, high))
            if flags[m]:
                mask[low:high] = [True] * (high - low)
    return Rendered(ids, found if spans else [], mask)


def _span(
    job: _Job, m: int, at: list[int], pieces: list[Encoded | None], messages: Sequence[Message]
) -> tuple[int, int]:
    """The tokens of message m."""
    plan = job.plan
    end = at[plan.after[m] - job.begin] if m in plan.after else None
    if m in plan.first:
        return at[plan.first[m] - job.begin], at[plan.after[m] - job.begin]
    number = plan.where[m] - job.begin
    item, piece = plan.items[plan.where[m]], pieces[number]
    assert isinstance(item, _Text) and piece is not None
    place = item.parts.index(m)
    contents = [_trim(x.content, *sides) for x, sides in zip(messages, plan.trimmed, strict=True)]
    texts = [contents[p] if isinstance(p, int) else p for p in item.parts]
    low = sum(map(len, texts[:place]))
    high = low + len(texts[place])
    if item.lstrip:
        joined = "".join(texts)
        cut = len(joined) - len(joined.lstrip())
        low, high = low - cut, high - cut
    chars = piece.source.offsets
    start_of = operator.itemgetter(0)
    first = bisect.bisect_left(chars, low, key=start_of)
    while first and chars[first - 1][1] > low:
        first -= 1
    last = at[number] + bisect.bisect_left(chars, high, key=start_of) if end is None else end
    return at[number] + first, max(at[number] + first, last)


@lru_cache(maxsize=1024)
def _plan(
    tokenizer: PreTrainedTokenizerBase, key: tuple[Any, ...], roles: tuple[str, ...], generation_prompt: bool
) -> _Plan | None:
    """None where conversations of these roles have to be rendered one by one, if only for their error's sake."""
    try:
        talk = roles_only(*roles)
        scaffold = cached_scaffold(tokenizer, key, talk, generation_prompt)
        trimmed = _trimming(tokenizer, talk, scaffold, generation_prompt)
        coder, stops = coder_for(tokenizer), stop_ids(tokenizer)
    except ModelError:
        return None
    spoken = [m for m, role in enumerate(roles) if role == "assistant"]
    if trimmed is None or any(scaffold.starts[m] is None for m in spoken):
        return None
    builder = _Builder(coder)
    opening: int | None = None  # the assistant message whose sampling has started and whose content hasn't come
    for i, piece in enumerate(scaffold.pieces):
        controls = find_controls(coder, piece)
        cuts = {len(piece) - s[1]: m for m, s in enumerate(scaffold.starts) if s is not None and s[0] == i}
        spoken_before = scaffold.order[i - 1] if i else None
        closing = controls[0] if i and controls and controls[0].id in stops else None
        if spoken_before is not None and roles[spoken_before] != "assistant" and (closing is None or closing.start):
            closing = None  # another's turn ends with its content unless a stop token follows at once
        if spoken_before in spoken and closing is None:
            return None
        at = 0
        for where, what in sorted([*((c.start, 1) for c in controls), *((c, 0) for c in cuts)]):
            if where < at:
                return None
            builder.add(piece[at:where])
            at = where
            if what == 0:
                builder.cut(cuts[where])
                opening = cuts[where]
                continue
            if opening is not None:
                return None  # no generation prompt
            control = next(c for c in controls if c.start == where)
            builder.control(control, piece)
            at = control.end
            if control is closing:
                builder.after[spoken_before] = builder.close_turn()  # pyright: ignore[reportArgumentType]
        builder.add(piece[at:])
        if i < len(scaffold.order):
            if opening not in (None, scaffold.order[i]):
                return None
            builder.add(scaffold.order[i])
            opening = None
    builder.flush(False)
    if set(builder.first) != set(spoken):
        return None
    return _Plan(tuple(builder.items), trimmed, builder.first, builder.after, builder.where)


class _Builder:
    """Gathers a plan's items from left to right, with the rules of `encode_controlled`."""

    def __init__(self, coder: Coder) -> None:
        self.coder = coder
        self.items: list[_Fixed | _Text] = []
        self.first: dict[int, int] = {}
        self.after: dict[int, int] = {}
        self.where: dict[int, int] = {}
        self._parts: list[str | int] = []
        self._turn = -1
        self._swallows = False
        self._prefix = True  # nothing but a text's start, or a control token, has come since the last text

    def add(self, part: str | int) -> None:
        """Put text, or a message's content, at the end."""
        if part != "":
            self._parts.append(part)

    def flush(self, rstrip: bool) -> None:
        """Close the text in hand."""
        parts, lstrip = self._parts, self._swallows
        self._parts, self._swallows = [], False
        if all(isinstance(p, str) for p in parts):
            text = _trim("".join(map(str, parts)), lstrip, rstrip)
            if not text:
                return
            self.items.append(_Fixed(encode_text(self.coder, text, self._prefix).ids, self._turn))
        else:
            self.where.update({p: len(self.items) for p in parts if isinstance(p, int)})
            self.items.append(_Text(tuple(parts), self._turn, self._prefix, lstrip, rstrip))
        self._prefix = False

    def cut(self, m: int) -> None:
        """Message m's sampling starts here."""
        self.flush(False)
        self._turn = m
        self.first[m] = len(self.items)

    def control(self, found: Found, piece: str) -> None:
        """Put a control token at the end."""
        token = self.coder.controls[piece[found.start : found.end]]
        self.flush(token.lstrip)
        self.items.append(_Fixed([token.id], self._turn))
        self._swallows = token.rstrip
        self._prefix = self.coder.prefix_after_control

    def close_turn(self) -> int:
        """The sampled turn ends here; return how many items there are."""
        self._turn = -1
        return len(self.items)


def _trimming(
    tokenizer: PreTrainedTokenizerBase, talk: Talk, scaffold: Scaffold, generation_prompt: bool
) -> tuple[tuple[bool, bool], ...] | None:
    """Which sides of each content the template trims, seen from markers with white space around them."""
    marks = markers(talk)
    text = write(tokenizer, talk, [f" \n{mark}\n " for mark in marks], generation_prompt)
    trimmed = [(False, False)] * len(marks)
    at = len(scaffold.pieces[0])
    if not text.startswith(scaffold.pieces[0]):
        return None
    for m, piece in zip(scaffold.order, scaffold.pieces[1:], strict=True):
        sides = [(left, right) for left in (False, True) for right in (False, True)]
        shown = {s: ("" if s[0] else " \n") + marks[m] + ("" if s[1] else "\n ") + piece for s in sides}
        fits = [s for s in sides if text.startswith(shown[s], at)]
        if len(fits) != 1:
            return None
        trimmed[m] = fits[0]
        at += len(shown[fits[0]])
    return tuple(trimmed) if at == len(text) else None
