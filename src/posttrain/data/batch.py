"""Many conversations rendered at once, with the ids, spans and masks that `chat.render` gives one by one.

Where a template is proved to copy contents (`copying`), what it writes depends on the roles only: a plan for each
sequence of roles holds the ids of all that stands between contents, and only text with contents in it is encoded,
that of all conversations in one call. Any other conversation goes through `chat.render`.
"""

from __future__ import annotations

import bisect
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenizers import Tokenizer

from posttrain.data.chat import Rendered, Span, check_bos, render, render_branch
from posttrain.data.control import Coder
from posttrain.data.copying import copies_contents
from posttrain.data.formats import ROLES
from posttrain.data.layout import coder_for, trains
from posttrain.data.plan import Plan, Text, plan_of, trim
from posttrain.data.template import Tools, template_key
from posttrain.data.words import encode_words
from posttrain.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_TRUE, _FALSE = [True], [False]
_KEPT = (False, False)  # a content that the template trims on neither side


class Ask(NamedTuple):
    """One rendering: a whole conversation, or, with ``answer_from``, only what follows the prompt of so many turns."""

    messages: Sequence[Message]
    tools: Tools = ()
    generation_prompt: bool = False
    answer_from: int | None = None
    rewritten: bool = False


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
    plans: dict[Any, Plan | None] = {}
    jobs = [_job(tokenizer, key, ask, texts, plans) for ask in asks]
    offsets = spans or any(m.train and m.role != "assistant" for ask in asks for m in ask.messages)
    coder = coder_for(tokenizer)
    coded = _Texts(
        *(
            _encode_batch(backend, some, offsets, coder)
            for backend, some in zip((coder.bare, coder.prefixed), texts, strict=True)
        )
    )
    out: list[Rendered] = []
    bos = tokenizer.bos_token_id
    for ask, job in zip(asks, jobs, strict=True):
        made = None if job is None else _assemble(job, ask, coded, spans, offsets)
        if made is not None and ask.answer_from is None and made.ids[:2] == [bos, bos]:
            check_bos(tokenizer, made.ids)
        out.append(_slow(tokenizer, ask, spans) if made is None else made)
    return out


class _Texts(NamedTuple):
    """Texts to encode, or what they became, without and with the tokenizer's start-of-text prefix."""

    bare: list[Any]
    prefixed: list[Any]


class _Job(NamedTuple):
    """A plan, the items of it that are asked for, and for each `Text` of them its text's number."""

    plan: Plan
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


def _job(
    tokenizer: PreTrainedTokenizerBase,
    key: tuple[Any, ...],
    ask: Ask,
    texts: _Texts,
    plans: dict[Any, Plan | None],
) -> _Job | None:
    """Put the conversation's texts into ``texts``; None if it has to be rendered by itself.

    ``plans`` keeps those of this call, by roles: the lasting cache compares the whole tokenizer's settings.
    """
    messages = ask.messages
    if ask.tools or not messages:
        return None
    for m in messages:
        if m.tool_calls or m.name or m.call_id or m.role not in ROLES or not m.content or m.content.isspace():
            return None
    pattern = (tuple([m.role for m in messages]), ask.generation_prompt)
    if pattern not in plans:
        plans[pattern] = plan_of(tokenizer, key, *pattern)
    plan = plans[pattern]
    if plan is None:
        return None
    begin, end, last = 0, len(plan.items), len(messages) - 1
    if ask.answer_from is not None:
        if ask.answer_from not in plan.first or last not in plan.first:
            return None
        begin, end = plan.first[ask.answer_from], plan.after[last]
    contents = [
        m.content if sides == _KEPT else trim(m.content, *sides)
        for m, sides in zip(messages, plan.trimmed, strict=True)
    ]
    if not all(c.isascii() or _is_unicode(c) for c in contents):
        return None
    numbers: list[int] = []
    for item in plan.items[begin:end]:
        if isinstance(item, Text):
            text = "".join([contents[p] if isinstance(p, int) else p for p in item.parts])
            if item.lstrip or item.rstrip:
                text = trim(text, item.lstrip, item.rstrip)
            pool = texts[item.prefix]
            numbers.append(len(pool))
            pool.append(text)
    return _Job(plan, begin, end, numbers)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _encode_batch(backend: Tokenizer, texts: list[str], offsets: bool, coder: Coder) -> list[Encoded | None]:
    """Each text's ids, and where they came from if asked; None where it gives a control token."""
    if offsets:
        found = ((e.ids, e) for e in backend.encode_batch(texts, add_special_tokens=False))
    elif coder.words is not None:
        found = ((ids, None) for ids in encode_words(backend, coder.words, texts))
    else:
        found = ((e.ids, None) for e in backend.encode_batch_fast(texts, add_special_tokens=False))
    return [Encoded(ids, source) if coder.forbidden.isdisjoint(ids) else None for ids, source in found]


class Encoded(NamedTuple):
    """A text's ids, and the encoding, which knows where they came from."""

    ids: list[int]
    source: Any


def _assemble(job: _Job, ask: Ask, coded: _Texts, spans: bool, offsets: bool) -> Rendered | None:
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
        if isinstance(item, Text):
            piece = coded[item.prefix][next(numbers)]
            if piece is None:
                return None
            new = piece.ids
        else:
            new = item.ids
        ids += new
        mask += (_TRUE if item.turn >= 0 and flags[item.turn] else _FALSE) * len(new)
        if offsets:
            at.append(len(ids))
            pieces.append(piece)
    found: list[Span] = []
    for m, message in enumerate(messages if offsets else ()):
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
    assert isinstance(item, Text) and piece is not None
    place = item.parts.index(m)
    contents = [trim(x.content, *sides) for x, sides in zip(messages, plan.trimmed, strict=True)]
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
