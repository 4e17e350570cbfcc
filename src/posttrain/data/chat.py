"""Chat templates rendered straight to ids, with a span for each message and a mask for each token.

The template is rendered twice: with markers in place of the contents, which shows where each content lies,
and with the contents. The text is then cut at control tokens outside contents and where each sampled turn
starts, and the rest is encoded as plain text. So text can't forge a control token, and the ids of a prompt
followed by the ids of its answer are exactly the ids that are trained.
"""

from __future__ import annotations

import bisect
import operator
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from posttrain.data.control import Coded, Found, encode_controlled, find_controls
from posttrain.data.layout import Layout, cached_scaffold, coder_for, lay_out, roles_only, stop_ids, trains
from posttrain.data.template import Tools, template_key
from posttrain.errors import DataError, ModelError
from posttrain.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Rendered", "Span", "render", "render_branch", "render_prompt", "render_response", "stop_ids"]


class Span(NamedTuple):
    """The tokens ``start .. end`` of one message's content, and of the stop token that ends it, if one does.

    An assistant turn's span starts where sampling would start, and holds its tool calls.
    """

    message: int
    start: int
    end: int


class Rendered(NamedTuple):
    """A conversation as ids; ``mask[i]`` says whether a loss reads token i."""

    ids: list[int]
    spans: list[Span]
    mask: list[bool]


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    tools: Tools = (),
    generation_prompt: bool = False,
    rewritten: bool = False,
) -> Rendered:
    """Render a conversation to ids.

    Trained tokens are, by default, what the assistant would sample: content, tool calls and stop token.
    ``Message.train`` overrides that for its message.

    Args:
        tokenizer: with a chat template.
        messages: the conversation.
        tools: JSON schemas that it offers.
        generation_prompt: whether to end with what precedes the assistant's next turn.
        rewritten: whether assistant turns that aren't trained may read as the template rewrites them (thinking that
            it strips from earlier turns). Such a turn has a span only if it can be told from the rest.

    Raises:
        ModelError: no template, or one that alters contents, doesn't end a trained turn in a stop token,
            rewrites what stood before a trained turn, has no generation prompt, doubles BOS or doesn't write
            the conversation's tools and calls.
        DataError: an unknown role, text that isn't Unicode, or a character that only a control token can spell.
    """
    layout = lay_out(tokenizer, messages, tools, generation_prompt, rewritten)
    return _encode(tokenizer, messages, layout, 0, len(layout.text))


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, tools: Tools = (), rewritten: bool = False
) -> list[int]:
    """Return the ids after which the assistant's next turn is sampled; arguments and errors as `render`."""
    return render(tokenizer, silent(messages), tools=tools, generation_prompt=True, rewritten=rewritten).ids


def render_branch(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[Message],
    response: Sequence[Message],
    *,
    tools: Tools = (),
    rewritten: bool = False,
) -> Rendered:
    """Render only what follows ``render_prompt(prompt)``, up to and including the last turn's stop token.

    Spans count messages from the response's first and tokens from the branch's first.

    Raises:
        ModelError: as `render`; also where the prompt reads otherwise once an answer follows it.
        DataError: as `render`; a response that doesn't start and end with an assistant turn.
    """
    check_response(response)
    messages = [*silent(prompt), *response]
    layout = lay_out(tokenizer, messages, tools, False, rewritten)
    begin = layout.starts[len(prompt)]
    asked = lay_out(tokenizer, messages[: len(prompt)], tools, True, rewritten)
    if begin is None or layout.text[:begin] != asked.text:
        raise _rewrites(len(prompt))
    closing = _closing(tokenizer, layout, len(messages) - 1)
    end = closing.end if closing else len(layout.text)
    whole = _encode(tokenizer, messages, layout, begin, end)
    spans = [Span(s.message - len(prompt), s.start, s.end) for s in whole.spans if s.message >= len(prompt)]
    return Rendered(whole.ids, spans, whole.mask)


def render_response(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[Message],
    response: Sequence[Message],
    *,
    tools: Tools = (),
    rewritten: bool = False,
) -> list[int]:
    """Return the answer's ids with its stop token; ``render_prompt(prompt)`` and they are what is trained."""
    return render_branch(tokenizer, prompt, response, tools=tools, rewritten=rewritten).ids


def silent(messages: Sequence[Message]) -> list[Message]:
    """The same turns, none of them trained."""
    return [replace(m, train=False) if trains(m) else m for m in messages]


def check_response(response: Sequence[Message]) -> None:
    """Refuse a response that doesn't start and end with an assistant turn.

    Raises:
        DataError: naming the roles.
    """
    if not response or response[0].role != "assistant" or response[-1].role != "assistant":
        roles = ", ".join(m.role for m in response) or "none"
        raise DataError(f"the response has roles {roles}; expected it to start and end with an assistant turn")


def check_bos(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> None:
    """Refuse ids that start with BOS twice.

    Raises:
        ModelError: naming the token.
    """
    if tokenizer.bos_token_id is not None and list(ids[:2]) == [tokenizer.bos_token_id] * 2:
        raise ModelError(f"the chat template starts with {tokenizer.bos_token!r} twice; remove one from it")


def _encode(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], layout: Layout, begin: int, end: int
) -> Rendered:
    """Encode ``layout.text[begin:end]`` and mark each message's tokens."""
    cuts = [start for start in layout.starts if start is not None]
    coded = encode_controlled(layout.coder, layout.text[:end], layout.controls, cuts, begin)
    if begin == 0:
        check_bos(tokenizer, coded.ids)
    spans: list[Span] = []
    mask = [False] * len(coded.ids)
    for m, message in enumerate(messages):
        turn = _turn(tokenizer, layout, m, message)
        if turn is None or turn[1] <= begin:
            continue
        first, last = _overlapping(coded, *turn)
        spans.append(Span(m, first, last))
        if trains(message):
            mask[first:last] = [True] * (last - first)
    return Rendered(coded.ids, spans, mask)


def _overlapping(coded: Coded, low: int, high: int) -> tuple[int, int]:
    """The tokens that come from characters ``low .. high``, whole or in part."""
    start_of = operator.itemgetter(0)
    first = bisect.bisect_left(coded.chars, low, key=start_of)
    while first and coded.chars[first - 1][1] > low:
        first -= 1
    return first, max(first, bisect.bisect_left(coded.chars, high, key=start_of))


def _turn(tokenizer: PreTrainedTokenizerBase, layout: Layout, m: int, message: Message) -> tuple[int, int] | None:
    """The characters of message m's span; refuses an assistant turn that can't be trained."""
    content, start = layout.contents[m], layout.starts[m]
    if content is None:
        if trains(message):
            raise _rewrites(m)
        return None
    low, high = content
    stops = stop_ids(tokenizer)
    closing = _closing(tokenizer, layout, m)
    end = closing.end if closing and closing.id in stops else None
    if message.role != "assistant":
        return low, end if end and closing and closing.start == high else high
    if trains(message):
        if start is None:
            raise _rewrites(m)
        opening = layout.text[start:low] if _first_control(layout, start, low) else ""
        if opening := opening or (_unprompted(tokenizer, template_key(tokenizer)) if low == start else ""):
            raise ModelError(
                f"the chat template has no generation prompt: it writes {opening!r} between a "
                "prompt and its answer; make it heed add_generation_prompt"
            )
        if end is None:
            names = ", ".join(repr(t) for t in tokenizer.convert_ids_to_tokens(sorted(stops)))
            raise ModelError(
                f"the chat template ends the assistant turn of message {m} with {layout.text[high:][:40]!r}, "
                f"expected a stop token ({names}); a model trained so would never stop. Change the template "
                "or tokenizer.eos_token"
            )
    return low if start is None else start, high if end is None else end


@lru_cache(maxsize=64)
def _unprompted(tokenizer: PreTrainedTokenizerBase, key: object) -> str:
    """What the template writes between a prompt and its answer, if control tokens are in it."""
    scaffold = cached_scaffold(tokenizer, key, roles_only("user", "assistant"), False)
    start = scaffold.starts[1]
    gap = scaffold.pieces[start[0]][-start[1] :] if start and start[1] else ""
    return gap if find_controls(coder_for(tokenizer), gap) else ""


def _closing(tokenizer: PreTrainedTokenizerBase, layout: Layout, m: int) -> Found | None:
    """The first control token after message m's content and before the next content."""
    content = layout.contents[m]
    if content is None:
        return None
    low, high = content
    following = bisect.bisect_left(layout.edges, high) + (low == high)  # an empty content starts there itself
    limit = layout.edges[following] if following < len(layout.edges) else len(layout.text)
    return _first_control(layout, high, limit)


def _first_control(layout: Layout, low: int, high: int) -> Found | None:
    """The first control token that starts in ``low .. high``, both in characters."""
    place = bisect.bisect_left(layout.controls, low, key=operator.attrgetter("start"))
    return layout.controls[place] if place < len(layout.controls) and layout.controls[place].start < high else None


def _rewrites(m: int) -> ModelError:
    return ModelError(
        f"the chat template rewrites the turns before assistant message {m}: they don't read as they did "
        "when that turn was sampled; set train=false on earlier turns, make one example a turn, or use a "
        "template that keeps history"
    )
