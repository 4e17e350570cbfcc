"""Turns of a conversation: messages with content parts and tool calls, ShareGPT's turns, transcripts, answers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from posttrain.data.formats.fields import Place, entries, fields_of, kind_of, shown, text
from posttrain.data.strict import MAX_DEPTH, STRICT, Refused, half_pair, too_deep
from posttrain.errors import suggest
from posttrain.types import Message, Response, ToolCall

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles a message may have. A fixed list, because templates write the role next to their control tokens."""

Turns = tuple[Message, ...]

_KEYS = frozenset({"role", "content", "train", "weight", "tool_calls", "name", "tool_call_id"})
_CALL = ("name", "arguments")
_TURN = re.compile(r"\n\n(Human|Assistant):")
_TURN_ROLES = {"Human": "user", "Assistant": "assistant"}
_SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


def user(content: str) -> Message:
    """Return a user turn."""
    return Message(role="user", content=content)


def assistant(content: str) -> Message:
    """Return an assistant turn."""
    return Message(role="assistant", content=content)


# ---------------------------------------------------------------------------- messages


def messages(value: Any, field: str, place: Place, *, silent: bool = False) -> Turns:
    """Return the turns of a list of ``{"role", "content"}``; an assistant's may be empty if ``silent``."""
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else kind_of(value)
        wanted = f"found {found}, expected a list of messages"
        raise place.fault(field, wanted, 'write [{"role": ..., "content": ...}, ...]')
    turns = tuple(message(item, f"{field}[{i}]", place, silent=silent) for i, item in enumerate(value))
    return _named_tools(turns, field, place) if any(turn.role == "tool" for turn in turns) else turns


def message(item: Any, field: str, place: Place, *, silent: bool = False) -> Message:
    """Return one turn of ``{"role", "content"}``; tool calls, a tool's name and ``train`` are read as well."""
    if not isinstance(item, dict):
        raise place.fault(field, f"found {kind_of(item)}, expected a message", 'write {"role": ..., "content": ...}')
    role, content = item.get("role"), item.get("content")
    silent = silent and role == "assistant"
    if len(item) == 2 and isinstance(content, str) and role in ROLES and role != "tool":
        return Message(role=role, content=text(content, f"{field}.content", place, empty=silent))
    missing = {"role", "content"} - item.keys() - ({"content"} if item.get("tool_calls") else set())
    extra = [key for key in item if key not in _KEYS and item[key] is not None]  # null says nothing
    if missing or extra:
        found = [key[:40] for key in sorted(extra)[:5]]
        what = f"lacks {sorted(missing)}" if missing else f"has {found}, which nothing here reads"
        raise place.fault(field, f"the message {what}", "use the keys 'role', 'content' and, optionally, 'train'")
    if role not in ROLES:
        hint = suggest(role, ROLES) if isinstance(role, str) else f"known: {', '.join(ROLES)}"
        raise place.fault(f"{field}.role", f"unknown role {shown(role)}", hint)
    _only_on(item, ("name", "tool_call_id"), "tool", role, field, place)
    _only_on(item, ("tool_calls", "weight"), "assistant", role, field, place)
    calls = tool_calls(item["tool_calls"], f"{field}.tool_calls", place) if item.get("tool_calls") else ()
    unsaid = bool(calls) or role == "tool"
    return Message(
        role=role,
        content=""
        if content is None and unsaid
        else _content(content, f"{field}.content", place, empty=silent or unsaid),
        train=_train(item, field, place),
        tool_calls=calls,
        name=text(item["name"], f"{field}.name", place) if item.get("name") is not None else "",
        call_id=text(item["tool_call_id"], f"{field}.tool_call_id", place) if item.get("tool_call_id") else "",
    )


def _nothing_more(item: Mapping[str, Any], known: Iterable[str], field: str, what: str, place: Place) -> None:
    """Refuse keys that nothing reads, so that nothing they say is lost; null says nothing."""
    extra = [key[:40] for key in item if key not in known and item[key] is not None]
    if extra:
        remedy = "remove the key, or the row if it matters"
        raise place.fault(field, f"the {what} has {sorted(extra)[:5]}, which nothing here reads", remedy)


def _only_on(item: Mapping[str, Any], keys: Iterable[str], wanted: str, role: str, field: str, place: Place) -> None:
    for key in keys:
        if role != wanted and item.get(key) not in (None, []):
            found = f"has ['{key}'], which nothing here reads on a turn of role '{role}'"
            raise place.fault(field, f"the message {found}", f"'{key}' belongs to a turn of role '{wanted}'; remove it")


def _train(item: Mapping[str, Any], field: str, place: Place) -> bool | None:
    """``train``, or what fine-tuning files call ``weight`` (0 or 1) of an assistant turn."""
    train, marked = item.get("train"), item.get("weight")
    if train is not None and not isinstance(train, bool):
        found = f"found {kind_of(train)}, expected true or false"
        raise place.fault(f"{field}.train", found, "correct it or leave it out")
    if marked is None:
        return train
    if isinstance(marked, bool) or marked not in (0, 1) or train is not None:
        found = "stands beside 'train'" if train is not None else f"found {shown(marked)}, expected 0 or 1"
        raise place.fault(f"{field}.weight", found, "keep one of the two" if train is not None else "correct it")
    return marked == 1


def _content(value: Any, field: str, place: Place, *, empty: bool) -> str:
    """Text, or a list of text parts; other parts are refused by name."""
    if not isinstance(value, list):
        return text(value, field, place, empty=empty)
    parts: list[str] = []
    for i, part in enumerate(entries(value, field, place, least=1)):
        kind = fields_of(part, f"{field}[{i}]", place, ("type",))["type"]
        if kind != "text":
            found = f"a content part of type {shown(kind)}; only text is read"
            raise place.fault(f"{field}[{i}]", found, "remove the row or the part")
        _nothing_more(part, ("type", "text"), f"{field}[{i}]", "content part", place)
        parts.append(text(part.get("text"), f"{field}[{i}].text", place, empty=True))
    return text("".join(parts), field, place, empty=empty)


def tool_calls(value: Any, field: str, place: Place) -> tuple[ToolCall, ...]:
    """Return the calls of ``[{"id", "function": {"name", "arguments"}}]`` or of ``[{"name", "arguments"}]``."""
    calls: list[ToolCall] = []
    for i, item in enumerate(entries(value, field, place, least=1)):
        at = f"{field}[{i}]"
        item = fields_of(item, at, place)
        if item.get("type", "function") != "function":
            raise place.fault(f"{at}.type", f"found {shown(item['type'])}, expected 'function'", "remove the row")
        nested = "function" in item
        _nothing_more(item, ("id", "type", "index", *(("function",) if nested else _CALL)), at, "call", place)
        at, inner = (f"{at}.function", item["function"]) if nested else (at, item)
        inner = fields_of(inner, at, place, ("name", "arguments"))
        if nested:
            _nothing_more(inner, _CALL, at, "call", place)
        number = text(item["id"], f"{field}[{i}].id", place) if item.get("id") is not None else ""
        name = text(inner["name"], f"{at}.name", place)
        calls.append(ToolCall(name=name, arguments=_arguments(inner["arguments"], f"{at}.arguments", place), id=number))
    return tuple(calls)


def _arguments(value: Any, field: str, place: Place) -> Mapping[str, Any]:
    """An object, or the JSON text of one."""
    found = parsed(value, field, place) if isinstance(value, str) else value
    if not isinstance(found, dict):
        raise place.fault(field, f"found {kind_of(found)}, expected an object", "write {...}, or {} for no arguments")
    return found


def parsed(value: str, field: str, place: Place) -> Any:
    """Return the value of JSON text that stands in a field, read strictly: no doubled keys, no NaN."""
    text(value, field, place)
    try:
        found = STRICT.decode(value)
    except Refused as refused:
        raise place.fault(field, f"in the JSON text: {refused.args[1]}", refused.args[2]) from refused
    except (ValueError, RecursionError) as error:
        why = f" ({error})" if isinstance(error, json.JSONDecodeError) else ", or nested too deeply, or of huge numbers"
        raise place.fault(field, f"the text isn't JSON{why}", "write JSON, or the value itself") from error
    if too_deep(found, value):
        raise place.fault(field, f"JSON text nested deeper than {MAX_DEPTH} levels", "flatten it or remove the row")
    if half_pair(found, value):
        raise place.fault(field, "half of a surrogate pair in the JSON text", "remove the broken escape")
    return found


def tools(value: Any, place: Place, field: str = "tools") -> tuple[Mapping[str, Any], ...]:
    """Return the JSON schemas of the tools on offer: a list of objects, or the JSON text of one; null means none."""
    if value is None:
        return ()
    found = parsed(value, field, place) if isinstance(value, str) else value
    return tuple(fields_of(item, f"{field}[{i}]", place) for i, item in enumerate(entries(found, field, place)))


def _named_tools(turns: Turns, field: str, place: Place) -> Turns:
    """Tool turns that name the call they answer get the name of its tool; both have to be known."""
    names: dict[str, str] = {}
    found: list[Message] = []
    for i, turn in enumerate(turns):
        names.update((call.id, call.name) for call in turn.tool_calls if call.id)
        if turn.role == "tool" and turn.call_id:
            known = names.get(turn.call_id, "")
            if not known or turn.name not in ("", known):
                what = f"answers the call {shown(turn.call_id)}"
                what += f" of '{known}', but is named '{turn.name}'" if known else ", which no earlier turn makes"
                raise place.fault(f"{field}[{i}].tool_call_id", what, "name an earlier call or remove the row")
            turn = Message(role="tool", content=turn.content, train=turn.train, name=known, call_id=turn.call_id)
        found.append(turn)
    return tuple(found)


# ---------------------------------------------------------------------------- other ways to write turns


def sharegpt(value: Any, field: str, place: Place) -> Turns:
    """Return the turns of a list of ``{"from", "value"}``; a list of ``{"role", "content"}`` is read as messages."""
    items = entries(value, field, place, least=1)
    if isinstance(items[0], dict) and "role" in items[0]:
        return messages(items, field, place)
    return tuple(sharegpt_turn(item, f"{field}[{i}]", place) for i, item in enumerate(items))


def sharegpt_turn(item: Any, field: str, place: Place) -> Message:
    """Return one turn of ``{"from", "value"}``; a ``function_call`` has the JSON of its name and arguments as value."""
    who = fields_of(item, field, place, ("from", "value"))["from"]
    _nothing_more(item, ("from", "value", "train", "weight"), field, "turn", place)
    if who == "function_call":
        call = parsed(item["value"], f"{field}.value", place)
        calls = tool_calls(call if isinstance(call, list) else [call], f"{field}.value", place)
        return Message(role="assistant", content="", tool_calls=calls, train=_train(item, field, place))
    if not isinstance(who, str) or who not in _SHAREGPT:
        hint = suggest(who, _SHAREGPT) if isinstance(who, str) else f"known: {', '.join(sorted(_SHAREGPT))}"
        raise place.fault(f"{field}.from", f"unknown speaker {shown(who)}", hint)
    role = _SHAREGPT[who]
    _only_on(item, ("weight",), "assistant", role, field, place)
    said = text(item["value"], f"{field}.value", place)
    return Message(role=role, content=said, train=_train(item, field, place))


def transcript(value: Any, field: str, place: Place) -> list[tuple[str, str]]:
    """Return (role, stripped text) of each turn of a Human/Assistant transcript (hh-rlhf); texts may be empty."""
    parts = _TURN.split(text(value, field, place))
    if len(parts) < 3 or parts[0].strip():
        found = f"starts with {value[:20]!r}, expected '\\n\\nHuman: '"
        raise place.fault(field, found, "write a whole transcript, or give a 'prompt' column")
    return [(_TURN_ROLES[who], said.strip()) for who, said in zip(parts[1::2], parts[2::2], strict=True)]


def spoken(turns: Iterable[tuple[str, str]], field: str, place: Place) -> Turns:
    """Return the messages of (role, text) pairs, each of which has to say something."""
    pairs = enumerate(turns, 1)
    return tuple(Message(role=role, content=text(said, f"{field} turn {i}", place)) for i, (role, said) in pairs)


# ---------------------------------------------------------------------------- prompts and answers


def turns_of(value: Any, field: str, role: str, place: Place, *, silent: bool = False) -> Turns:
    """Return messages of a list, or text as one turn of ``role``."""
    if isinstance(value, list):
        return messages(value, field, place, silent=silent)
    return (Message(role=role, content=text(value, field, place, empty=silent)),)


def prompt_of(value: Any, field: str, place: Place) -> Turns:
    """Return the turns of a prompt, whose last one is there to be answered."""
    turns = turns_of(value, field, "user", place)
    if turns[-1].role == "assistant":
        raise place.fault(field, "ends in an assistant turn", "end it with the turn to be answered")
    return turns


def answer_of(value: Any, field: str, prompt: Turns, place: Place, *, silent: bool = False) -> Turns:
    """Return an answer's turns; one that repeats the whole conversation loses the prompt it starts with.

    ``silent`` allows an empty answer, where judgements are about it.
    """
    turns = turns_of(value, field, "assistant", place, silent=silent)
    if len(turns) > len(prompt) and turns[: len(prompt)] == prompt:
        turns = turns[len(prompt) :]
    if turns[0].role != "assistant" or turns[-1].role != "assistant":
        raise place.fault(
            field,
            f"starts with role '{turns[0].role}' and ends with '{turns[-1].role}', expected 'assistant'",
            "an answer starts and ends with an assistant turn; what comes before belongs in 'prompt'",
        )
    return turns


def conversation(turns: Turns, field: str, place: Place) -> tuple[Turns, tuple[Response, ...]]:
    """Return what stands before the last turn, which has to be the assistant's, and that turn as the response."""
    if turns[-1].role != "assistant":
        found = f"ends with role '{turns[-1].role}', expected 'assistant'"
        raise place.fault(field, found, "remove what follows the last answer")
    if len(turns) < 2:
        raise place.fault(field, "nothing stands before the answer", "put the turn it answers first")
    return turns[:-1], (Response(messages=turns[-1:]),)


def identity(turns: Turns) -> tuple[Any, ...]:
    """Return a key that is equal for answers that say and do the same."""
    calls = [[(call.name, json.dumps(call.arguments, sort_keys=True)) for call in m.tool_calls] for m in turns]
    return tuple((m.role, m.content) for m in turns), repr(calls) if any(calls) else ""


def twins(answers: Sequence[Turns]) -> tuple[int, int] | None:
    """Return the positions of the first two answers that are identical."""
    seen: dict[tuple[Any, ...], int] = {}
    for i, answer in enumerate(answers):
        first = seen.setdefault(identity(answer), i)
        if first != i:
            return first, i
    return None


def told_apart(answers: Sequence[Turns], field: str, place: Place) -> None:
    """Check that no two answers are identical where an order of them is given; if all are, the row is useless."""
    same = twins(answers)
    if same is None:
        return
    problem = f"answers {same[0]} and {same[1]} (from 0) are identical, so their order means nothing"
    remedy = "remove the row or one of them"
    if len({identity(answer) for answer in answers}) == 1:
        raise place.useless("identical answers", field, problem, remedy)
    raise place.fault(field, problem, remedy)


def in_order(answers: Sequence[Turns], field: str, place: Place) -> tuple[Response, ...]:
    """Return answers, best first, as ranked responses."""
    told_apart(answers, field, place)
    return tuple(Response(messages=answer, rank=i) for i, answer in enumerate(answers))
