"""What a chat template is given and what it writes: turns, tools and calls, with text from data kept apart.

A template writes tool schemas and calls in its own way (as JSON, as XML, in pieces), so their text can't be found by
what it says. It is found by a second rendering in which whatever could be read as part of a control token is replaced,
character for character, by private characters: a control token of that rendering is the template's own.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError

from posttrain.data.control import Coder
from posttrain.data.formats import ROLES
from posttrain.errors import DataError, ModelError, suggest
from posttrain.types import Message, ToolCall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tools = Sequence[Mapping[str, Any]]
"""JSON schemas of the functions that a conversation offers, as a template takes them."""

_MARKER = re.compile(r"Zq(\d+)x7Content\1x7qZ")
_PRIVATE = 0x100000  # private plane: a character of the basic plane has its stand-in there


class Talk(NamedTuple):
    """What a template reads besides the contents that markers stand for; hashable.

    ``fixed[m]`` is the content of message m where the template has to see it, else None. ``data`` is JSON:
    tools, and by position calls, names and call ids; empty without any.
    """

    roles: tuple[str, ...]
    fixed: tuple[str | None, ...]
    data: str = ""

    def head(self, count: int) -> Talk:
        """The first messages, with the same tools."""
        return self._replace(roles=self.roles[:count], fixed=self.fixed[:count])


def make_talk(messages: Sequence[Message], tools: Tools, fixed: frozenset[int]) -> Talk:
    """Take a conversation apart; contents of the messages in ``fixed`` are part of the result.

    Raises:
        DataError: no messages, an unknown role, calls by another role, text that isn't Unicode.
    """
    if not messages:
        raise DataError("a conversation without messages; expected at least one")
    for m, message in enumerate(messages):
        if message.role not in ROLES:
            raise DataError(f"message {m} has the unknown role {message.role!r}; {suggest(message.role, ROLES)}")
        if message.tool_calls and message.role != "assistant":
            raise DataError(f"message {m} ({message.role}) has tool calls; only an assistant's turn can")
        check_unicode(message.content, f"message {m} ({message.role})")
    data = ""
    if tools or any(m.tool_calls or m.name or m.call_id for m in messages):
        data = json.dumps({"tools": [dict(t) for t in tools], "turns": _extras(messages)}, ensure_ascii=False)
        check_unicode(data, "the conversation's tools, tool calls or names")
    contents = tuple(m.content if i in fixed else None for i, m in enumerate(messages))
    return Talk(tuple(m.role for m in messages), contents, data)


def check_unicode(text: str, where: str) -> None:
    """Refuse half a surrogate pair, which no tokenizer takes.

    Raises:
        DataError: naming ``where``.
    """
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} has half of a surrogate pair at character {error.start}; remove the broken escape"
        ) from error


def _extras(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Keys of each turn besides role and content; a tool's turn carries the id of the call it answers."""
    extras: list[dict[str, Any]] = []
    open_calls: list[ToolCall] = []
    for message in messages:
        extra: dict[str, Any] = {}
        if message.name:
            extra["name"] = message.name
        if message.tool_calls:
            extra["tool_calls"] = [_call(c) for c in message.tool_calls]
            open_calls = list(message.tool_calls)
        elif message.call_id or (message.role == "tool" and open_calls):
            answered = next((c for c in open_calls if c.name == message.name), None) or next(iter(open_calls), None)
            answered = next((c for c in open_calls if c.id and c.id == message.call_id), answered)
            open_calls = [c for c in open_calls if c is not answered]
            if call_id := message.call_id or (answered.id if answered else ""):
                extra["tool_call_id"] = call_id
        extras.append(extra)
    return extras


def _call(call: ToolCall) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
    return {"id": call.id, **entry} if call.id else entry


def write(
    tokenizer: PreTrainedTokenizerBase,
    talk: Talk,
    contents: Sequence[str],
    generation_prompt: bool,
    template: str | None = None,
) -> str:
    """Render a conversation as text, by another template if given; ``contents`` stand where ``talk.fixed`` is None.

    Raises:
        ModelError: no template, or one that refuses the conversation.
    """
    if not tokenizer.chat_template:
        raise ModelError(
            "the tokenizer has no chat template, so there is no saying where a turn ends; load an instruct "
            "model's tokenizer or set tokenizer.chat_template"
        )
    data = json.loads(talk.data) if talk.data else {"tools": [], "turns": []}
    turns: list[dict[str, Any]] = [
        {"role": role, "content": content if own is None else own}
        for role, content, own in zip(talk.roles, contents, talk.fixed, strict=True)
    ]
    for turn, extra in zip(turns, data["turns"], strict=False):
        turn.update(extra)
    try:
        return _apply(tokenizer, turns, data["tools"], generation_prompt, template)
    except TypeError as error:
        # Some templates join the arguments to text, as they come from an API: a string of JSON.
        calls = [call["function"] for turn in turns for call in turn.get("tool_calls", ())]
        if not calls:
            raise _refusal(talk, error) from error
        for call in calls:
            call["arguments"] = json.dumps(call["arguments"], ensure_ascii=False)
    except TemplateError as error:
        raise _refusal(talk, error) from error
    try:
        return _apply(tokenizer, turns, data["tools"], generation_prompt, template)
    except (TemplateError, TypeError) as error:
        raise _refusal(talk, error) from error


def _apply(
    tokenizer: PreTrainedTokenizerBase,
    turns: list[dict[str, Any]],
    tools: list[Any],
    generation_prompt: bool,
    template: str | None,
) -> str:
    return str(
        tokenizer.apply_chat_template(
            turns,  # pyright: ignore[reportArgumentType]
            tools=tools or None,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=generation_prompt,
        )
    )


def _refusal(talk: Talk, error: Exception) -> ModelError:
    return ModelError(
        f"the chat template refuses the roles {', '.join(talk.roles)} ({error}); reorder or merge the turns, "
        "or use another template"
    )


def template_key(tokenizer: PreTrainedTokenizerBase) -> tuple[Any, ...]:
    """What a rendering depends on besides the conversation; the date is in it, as some templates write today's."""
    template = tokenizer.chat_template
    named = tuple(sorted(template.items())) if isinstance(template, dict) else template
    special = tuple((k, str(v)) for k, v in tokenizer.special_tokens_map.items())
    return named, special, len(tokenizer), datetime.date.today()


def markers(talk: Talk) -> list[str]:
    """A text for each content that no template writes by itself."""
    return [f"Zq{m}x7Content{m}x7qZ" for m in range(len(talk.roles))]


def marker_places(text: str) -> dict[int, list[int]]:
    """Return where each message's marker stands in a text, by message."""
    found: dict[int, list[int]] = {}
    for mark in _MARKER.finditer(text):
        found.setdefault(int(mark[1]), []).append(mark.start())
    return found


def write_guarded(
    tokenizer: PreTrainedTokenizerBase, talk: Talk, text: str, generation_prompt: bool, coder: Coder
) -> str:
    """Render ``talk`` again with markers, such that every control token in the result is the template's own.

    Returns a text as long as ``text`` (the plain rendering) and equal to it but for replaced characters of data.

    Raises:
        ModelError: the template writes something else when control tokens' spellings are hidden from it.
    """
    for inner in (True, False):  # words inside a control token too, unless the template acts on one of them
        replaced: dict[str, str] = {}
        hidden = _guarded_talk(talk, coder, inner, replaced)
        if hidden == talk:
            return text
        guarded = write(tokenizer, hidden, markers(talk), generation_prompt)
        if guarded.translate(str.maketrans(replaced)) == text:
            return guarded
    raise ModelError(
        "the chat template reads or rewrites a control token's spelling inside a message, a tool or a tool call; "
        "remove that text, or use a template that copies it"
    )


def _guarded_talk(talk: Talk, coder: Coder, inner: bool, replaced: dict[str, str]) -> Talk:
    fixed = tuple(None if own is None else _hide(own, coder, inner, replaced) for own in talk.fixed)
    data = talk.data
    if data:
        data = json.dumps(_map_text(json.loads(data), lambda s: _hide(s, coder, inner, replaced)), ensure_ascii=False)
    return talk._replace(fixed=fixed, data=data)


def _map_text(value: Any, change: Callable[[str], str], top: bool = True) -> Any:
    """Apply ``change`` to every string of a JSON value, keys included, but for the keys that templates look up."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_map_text(item, change, top) for item in value]
    if isinstance(value, dict):
        return {(k if k in _KEYS else change(k)): _map_text(item, change, False) for k, item in value.items()}
    return value


_KEYS = frozenset(
    {"tools", "turns", "role", "name", "tool_calls", "tool_call_id", "type", "id", "function", "arguments"}
)
_KEYS |= {"parameters", "properties", "description", "required", "enum", "items", "default"}


def _hide(text: str, coder: Coder, inner: bool, replaced: dict[str, str]) -> str:
    """Replace characters so that no control token can be made of this text, alone or with what stands around it."""
    if coder.pattern is None or not text:
        return text
    places: set[int] = set()
    found = coder.pattern.search(text)
    while found:  # overlapping spellings too
        places.add(found.start())
        found = coder.pattern.search(text, found.start() + 1)
    longest = max(map(len, coder.controls))
    for k in range(1, min(longest, len(text) + 1)):
        if text[-k:] in coder.starts:
            places.add(len(text) - k)
        if text[:k] in coder.ends:
            places.add(k - 1)
    if inner and len(text) < longest - 1 and any(text in spelled[1:-1] for spelled in coder.controls):
        places.add(0)
    chars = list(text)
    for place in places:
        stand_in = chr(_PRIVATE + ord(chars[place]) % 0x10000)
        replaced[stand_in] = chars[place]
        chars[place] = stand_in
    return "".join(chars)


def check_tools(tokenizer: PreTrainedTokenizerBase, talk: Talk, generation_prompt: bool) -> None:
    """Check that the template writes every tool, tool call and argument of conversations of this shape.

    Raises:
        ModelError: it leaves some out.
    """
    data = json.loads(talk.data)
    calls = tuple(len(turn.get("tool_calls", ())) for turn in data["turns"])
    forms = tuple("function" in tool for tool in data["tools"])
    names = tuple("name" in turn for turn in data["turns"])
    shape = (talk.roles, calls[: len(talk.roles)], forms, names[: len(talk.roles)])
    _check_shape(tokenizer, template_key(tokenizer), *shape, generation_prompt)


@lru_cache(maxsize=1024)
def _check_shape(
    tokenizer: PreTrainedTokenizerBase,
    key: object,
    roles: tuple[str, ...],
    calls: tuple[int, ...],
    forms: tuple[bool, ...],
    names: tuple[bool, ...],
    generation_prompt: bool,
) -> str:
    wanted: dict[str, str] = {}

    def mark(what: str) -> str:
        found = f"Zq{len(wanted)}x7Tool{len(wanted)}x7qZ"
        wanted[found] = what
        return found

    tools = [_probe_tool(mark, t, wrapped) for t, wrapped in enumerate(forms)]
    turns: list[dict[str, Any]] = []
    for m, count in enumerate(calls):
        made = [
            {"name": mark(f"call {c} of message {m}"), "arguments": {mark("an argument's name"): mark("an argument")}}
            for c in range(count)
        ]
        extra: dict[str, Any] = {"name": "tool"} if names[m] else {}
        if roles[m] == "tool":
            extra["tool_call_id"] = "call00xyz"
        ids = [f"call{m % 10}{c % 10}xyz" for c in range(count)]
        if made:
            extra["tool_calls"] = [{"id": i, "type": "function", "function": f} for i, f in zip(ids, made, strict=True)]
        turns.append(extra)
    talk = Talk(roles, (None,) * len(roles), json.dumps({"tools": tools, "turns": turns}))
    text = write(tokenizer, talk, markers(talk), generation_prompt)
    missing = next((what for marker, what in wanted.items() if marker not in text), None)
    if missing is not None:
        what = "tool calls" if tools == [] or "call" in missing or "argument" in missing else "tools"
        raise ModelError(
            f"the chat template doesn't support {what}: it leaves out {missing}; use a template that writes them, "
            "or remove them from the data"
        )
    return text


def tool_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template writes for a tool, a call and its answer; empty if it supports none."""
    roles, calls, names = ("user", "assistant", "tool"), (0, 1, 0), (False, False, False)
    try:
        return _check_shape(tokenizer, template_key(tokenizer), roles, calls, (True,), names, False)
    except ModelError:
        return ""


def _probe_tool(mark: Callable[[str], str], t: int, wrapped: bool) -> dict[str, Any]:
    function: dict[str, Any] = {
        "name": mark(f"the name of tool {t}"),
        "description": mark(f"the description of tool {t}"),
    }
    parameter = mark(f"a parameter of tool {t}")
    properties = {parameter: {"type": "string", "description": mark(f"a parameter's description of tool {t}")}}
    function["parameters"] = {"type": "object", "properties": properties, "required": [parameter]}
    return {"type": "function", "function": function} if wrapped else function
