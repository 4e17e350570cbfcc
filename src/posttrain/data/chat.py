"""Chat templates rendered straight to ids, with a span for each message and a mask for each token.

The template is rendered twice: with markers in place of the contents, which shows where each content lies,
and with the contents. The text is then cut at control tokens outside contents and where each sampled turn
starts, and the rest is encoded as plain text. So text can't forge a control token, and the ids of a prompt
followed by the ids of its answer are exactly the ids that are trained.
"""

from __future__ import annotations

import bisect
import datetime
import operator
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError

from posttrain.data.control import Coded, Coder, Found, encode_controlled, find_controls, make_coder
from posttrain.data.formats import ROLES
from posttrain.errors import DataError, ModelError, suggest
from posttrain.types import Message

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


class Span(NamedTuple):
    """The tokens ``start .. end`` of one message's content, and of the stop token that ends it, if one does.

    An assistant turn's span starts where sampling would start.
    """

    message: int
    start: int
    end: int


class Rendered(NamedTuple):
    """A conversation as ids; ``mask[i]`` says whether a loss reads token i."""

    ids: list[int]
    spans: list[Span]
    mask: list[bool]


class _Scaffold(NamedTuple):
    """What a template writes around contents.

    ``pieces[0]``, content ``order[0]``, ``pieces[1]`` ... ``back[m]`` is how many characters lie between the
    end of the generation prompt and assistant message m's content; None if the text before was another then.
    """

    pieces: tuple[str, ...]
    order: tuple[int, ...]
    back: tuple[int | None, ...]


class _Layout(NamedTuple):
    """Rendered text, each message's content in it, and where each assistant turn's sampling starts."""

    text: str
    contents: list[tuple[int, int]]
    starts: list[int | None]


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, generation_prompt: bool = False
) -> Rendered:
    """Render a conversation to ids.

    Trained tokens are, by default, what the assistant would sample: content and stop token. ``Message.train``
    overrides that for its message.

    Raises:
        ModelError: no template, or one that alters contents, doesn't end a trained turn in a stop token,
            rewrites what stood before a trained turn, has no generation prompt or doubles BOS.
        DataError: an unknown role, or a character that only a control token can spell.
    """
    layout = _layout(tokenizer, messages, generation_prompt)
    return _encode(tokenizer, messages, layout, 0, len(layout.text))


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Return the ids after which the assistant's next turn is sampled; raises as `render`."""
    silent = [Message(role=m.role, content=m.content, train=False) for m in messages]
    return render(tokenizer, silent, generation_prompt=True).ids


def render_branch(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], response: Sequence[Message]
) -> Rendered:
    """Render only what follows ``render_prompt(prompt)``, up to and including the last turn's stop token.

    Spans count messages from the response's first and tokens from the branch's first.

    Raises:
        ModelError: as `render`; also where the prompt reads otherwise once an answer follows it.
        DataError: a response that doesn't start and end with an assistant turn.
    """
    if not response or response[0].role != "assistant" or response[-1].role != "assistant":
        roles = ", ".join(m.role for m in response) or "none"
        raise DataError(f"the response has roles {roles}; expected it to start and end with an assistant turn")
    silent = [Message(role=m.role, content=m.content, train=False) for m in prompt]
    messages = [*silent, *response]
    layout = _layout(tokenizer, messages, False)
    begin = layout.starts[len(prompt)]
    if begin is None or layout.text[:begin] != _layout(tokenizer, silent, True).text:
        raise _rewrites(len(prompt))
    closing = _closing(_controls(tokenizer, layout), layout, len(messages) - 1)
    end = closing[1] if closing else len(layout.text)
    whole = _encode(tokenizer, messages, layout, begin, end)
    spans = [Span(s.message - len(prompt), s.start, s.end) for s in whole.spans if s.message >= len(prompt)]
    return Rendered(whole.ids, spans, whole.mask)


def render_response(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], response: Sequence[Message]
) -> list[int]:
    """Return the answer's ids with its stop token; ``render_prompt(prompt)`` and they are what is trained."""
    return render_branch(tokenizer, prompt, response).ids


def stop_ids(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None = None) -> frozenset[int]:
    """Return every id that ends an answer: the tokenizer's EOS, the generation config's, the template's.

    Raises:
        ModelError: none of the three names one.
    """
    configured = getattr(generation_config, "eos_token_id", None)
    found: set[Any] = set(configured) if isinstance(configured, (list, tuple)) else {configured}
    found.add(tokenizer.eos_token_id)
    if tokenizer.chat_template:
        found.add(_turn_end(tokenizer, _template_key(tokenizer)))
    found.discard(None)
    if not found:
        raise ModelError("the tokenizer names no stop token; set tokenizer.eos_token")
    return frozenset(found)


def _encode(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], layout: _Layout, begin: int, end: int
) -> Rendered:
    """Encode ``layout.text[begin:end]`` and mark each message's tokens."""
    controls = _controls(tokenizer, layout)
    stops = stop_ids(tokenizer)
    cuts = [start for start in layout.starts if start is not None]
    coded = encode_controlled(_coder(tokenizer), layout.text[:end], controls, cuts, begin)
    if begin == 0 and tokenizer.bos_token_id is not None and coded.ids[:2] == [tokenizer.bos_token_id] * 2:
        raise ModelError(f"the chat template starts with {tokenizer.bos_token!r} twice; remove one from it")
    spans: list[Span] = []
    mask = [False] * len(coded.ids)
    for m, message in enumerate(messages):
        low, high = _turn(tokenizer, layout, controls, stops, m, message)
        if high <= begin:
            continue
        first, last = _overlapping(coded, low, high)
        spans.append(Span(m, first, last))
        if _trains(message):
            mask[first:last] = [True] * (last - first)
    return Rendered(coded.ids, spans, mask)


def _overlapping(coded: Coded, low: int, high: int) -> tuple[int, int]:
    """The tokens that come from characters ``low .. high``, whole or in part."""
    start_of = operator.itemgetter(0)
    first = bisect.bisect_left(coded.chars, low, key=start_of)
    while first and coded.chars[first - 1][1] > low:
        first -= 1
    return first, max(first, bisect.bisect_left(coded.chars, high, key=start_of))


def _trains(message: Message) -> bool:
    return message.role == "assistant" if message.train is None else message.train


def _turn(
    tokenizer: PreTrainedTokenizerBase,
    layout: _Layout,
    controls: Sequence[Found],
    stops: frozenset[int],
    m: int,
    message: Message,
) -> tuple[int, int]:
    """The characters of message m's span; refuses an assistant turn that can't be trained."""
    low, high = layout.contents[m]
    closing = _closing(controls, layout, m)
    end = closing[1] if closing and closing[2] in stops else None
    if message.role != "assistant":
        return low, end if end and closing and closing[0] == high else high
    start = layout.starts[m]
    if _trains(message):
        if start is None:
            raise _rewrites(m)
        if any(start <= c[0] < low for c in controls):
            raise ModelError(
                f"the chat template has no generation prompt: it writes {layout.text[start:low]!r} between a "
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


def _closing(controls: Sequence[Found], layout: _Layout, m: int) -> Found | None:
    """The first control token after message m's content and before the next content."""
    high = layout.contents[m][1]
    others = (low for k, (low, _) in enumerate(layout.contents) if k != m and low >= high)
    limit = min(others, default=len(layout.text))
    return next((c for c in controls if high <= c[0] < limit), None)


def _rewrites(m: int) -> ModelError:
    return ModelError(
        f"the chat template rewrites the turns before assistant message {m}: they don't read as they did "
        "when that turn was sampled; set train=false on earlier turns, make one example a turn, or use a "
        "template that keeps history"
    )


def _layout(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], generation_prompt: bool) -> _Layout:
    """Render the text and find each content in it, whatever the contents say."""
    for m, message in enumerate(messages):
        if message.role not in ROLES:
            raise DataError(f"message {m} has the unknown role {message.role!r}; {suggest(message.role, ROLES)}")
    roles = tuple(m.role for m in messages)
    scaffold = _scaffold(tokenizer, _template_key(tokenizer), roles, generation_prompt)
    text = _apply(tokenizer, roles, [m.content for m in messages], generation_prompt)
    contents = _align(text, scaffold, messages)
    starts = [None if back is None else low - back for (low, _), back in zip(contents, scaffold.back, strict=True)]
    return _Layout(text, contents, starts)


def _align(text: str, scaffold: _Scaffold, messages: Sequence[Message]) -> list[tuple[int, int]]:
    """Return where each content lies; a template may trim white space off its ends, nothing else."""
    spans = [(0, 0)] * len(messages)
    at = len(scaffold.pieces[0])
    altered = not text.startswith(scaffold.pieces[0])
    m = scaffold.order[0] if scaffold.order else 0
    for m, piece in zip(scaffold.order, scaffold.pieces[1:], strict=True):
        raw = messages[m].content
        options = [kept for kept in (raw, raw.strip(), raw.lstrip(), raw.rstrip()) if text.startswith(kept + piece, at)]
        if not options or altered:
            altered = True
            break
        spans[m] = (at, at + len(options[0]))
        at += len(options[0]) + len(piece)
    if altered or at != len(text):
        raise ModelError(
            f"the chat template alters the content of message {m} ({messages[m].role}), or writes other text "
            "around it because of what it says (stripped thinking, quoting ...); use a template that copies "
            "contents as they are"
        )
    return spans


@lru_cache(maxsize=1024)
def _scaffold(
    tokenizer: PreTrainedTokenizerBase, key: object, roles: tuple[str, ...], generation_prompt: bool
) -> _Scaffold:
    """Render with markers for contents; depends on the roles only."""
    markers = [f"Zq{m}x7Content{m}x7qZ" for m in range(len(roles))]
    text = _apply(tokenizer, roles, markers, generation_prompt)
    for m, marker in enumerate(markers):
        if (count := text.count(marker)) != 1:
            raise ModelError(
                f"the chat template writes the content of message {m} ({roles[m]}) {count} times, expected "
                "once; use a template that keeps every message, or leave that turn out"
            )
    order = tuple(sorted(range(len(roles)), key=lambda m: text.index(markers[m])))
    pieces, at = [], 0
    for m in order:
        pieces.append(text[at : text.index(markers[m])])
        at = text.index(markers[m]) + len(markers[m])
    back = tuple(_back(tokenizer, text, roles, markers, m) for m in range(len(roles)))
    return _Scaffold((*pieces, text[at:]), order, back)


def _back(
    tokenizer: PreTrainedTokenizerBase, text: str, roles: tuple[str, ...], markers: list[str], m: int
) -> int | None:
    """See `_Scaffold`."""
    if roles[m] != "assistant" or m == 0:
        return None
    try:
        before = _apply(tokenizer, roles[:m], markers[:m], True)
    except ModelError:
        return None
    gap = text.index(markers[m]) - len(before)
    return gap if gap >= 0 and text.startswith(before) else None


def _apply(
    tokenizer: PreTrainedTokenizerBase, roles: Sequence[str], contents: Iterable[str], generation_prompt: bool
) -> str:
    if not tokenizer.chat_template:
        raise ModelError(
            "the tokenizer has no chat template, so there is no saying where a turn ends; load an instruct "
            "model's tokenizer or set tokenizer.chat_template"
        )
    if not roles:
        raise DataError("a conversation without messages; expected at least one")
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation_prompt)
    except TemplateError as error:
        raise ModelError(
            f"the chat template refuses the roles {', '.join(roles)} ({error}); reorder or merge the turns, "
            "or use another template"
        ) from error
    return str(text)


def _template_key(tokenizer: PreTrainedTokenizerBase) -> tuple[Any, ...]:
    """What a scaffold depends on besides roles; the date is in it because some templates write today's."""
    template = tokenizer.chat_template
    named = tuple(sorted(template.items())) if isinstance(template, dict) else template
    special = tuple((k, str(v)) for k, v in tokenizer.special_tokens_map.items())
    return named, special, len(tokenizer), datetime.date.today()


def _controls(tokenizer: PreTrainedTokenizerBase, layout: _Layout) -> list[Found]:
    return find_controls(_coder(tokenizer), layout.text, layout.contents)


def _coder(tokenizer: PreTrainedTokenizerBase) -> Coder:
    return _cached_coder(tokenizer, _template_key(tokenizer)[:-1])


@lru_cache(maxsize=4)
def _cached_coder(tokenizer: PreTrainedTokenizerBase, key: object) -> Coder:
    # Turn markers of some tokenizers are added tokens that aren't flagged special: those the template writes
    # before an answer are control tokens too.
    pieces = _scaffold(tokenizer, _template_key(tokenizer), ("user",), True).pieces
    return make_coder(tokenizer, "".join(pieces))


@lru_cache(maxsize=64)
def _turn_end(tokenizer: PreTrainedTokenizerBase, key: object) -> int | None:
    """The id that ends an assistant turn at a conversation's end, None if the template writes none."""
    coder = _coder(tokenizer)
    tail = find_controls(coder, _scaffold(tokenizer, key, ("user", "assistant"), False).pieces[-1], [])
    opening = find_controls(coder, _scaffold(tokenizer, key, ("user",), True).pieces[-1], [])
    # A template that goes straight on to open the next turn hasn't ended this one.
    return tail[0].id if tail and tail[0].id != (opening[-1].id if opening else None) else None
