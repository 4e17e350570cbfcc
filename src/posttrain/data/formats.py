"""One row of feedback, in any of the formats told apart by columns, as an `Example`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from posttrain.errors import DataError, suggest
from posttrain.types import Example, Message, Response

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles a message may have. A fixed list, because templates write the role next to their control tokens."""

_FORMATS = (
    '{"prompt","completion"}, {"prompt","chosen","rejected"}, {"prompt","completions"}, {"messages"}, '
    '{"prompt"} or {"chosen","rejected"} (whole transcripts)'
)
_ANSWERS = ("messages", "chosen", "completions", "completion")
_COLUMNS = frozenset({"prompt", "rejected", "failures", "reason", "kind", *_ANSWERS})
# What other tools call our columns; only looked at in rows that otherwise hold no answer.
_FOREIGN = {
    "response": "completion",
    "output": "completion",
    "responses": "completions",
    "conversation": "messages",
    "conversations": "messages",
    "instruction": "prompt",
    "question": "prompt",
    "query": "prompt",
}
_TURN = re.compile(r"\n\n(Human|Assistant):")
_TURN_ROLES = {"Human": "user", "Assistant": "assistant"}


class Place(NamedTuple):
    """Where a row stands, for faults."""

    file: str
    row: int

    def fault(self, field: str, problem: str, remedy: str) -> DataError:
        """Return the standard error for one of the row's fields."""
        return DataError.at(self.file, self.row, field, problem, remedy)


def parse_row(row: Mapping[str, Any], file: str = "row", number: int = 1) -> Example:
    """Turn one row into an `Example`; ``file`` and ``number`` are where it came from.

    Raises:
        DataError: a missing, misspelt, mistyped or contradictory column.
    """
    place = Place(file, number)
    form = _form(row, place)
    if form == "messages":
        prompt, responses = _conversation(_messages(row["messages"], "messages", place), place)
    elif form == "chosen" and "prompt" not in row:
        prompt, responses = _transcripts(row, place)
    else:
        prompt = _turns(row["prompt"], "prompt", "user", place)
        if prompt[-1].role == "assistant":
            raise place.fault("prompt", "ends in an assistant turn", "end it with the turn to be answered")
        responses = _responses(row, form, prompt, place)
    kind = row.get("kind", "")
    if not isinstance(kind, str):
        raise place.fault("kind", f"found {kind_of(kind)}, expected a string", "quote it or leave it out")
    meta = {k: v for k, v in row.items() if k == "reason" or k not in _COLUMNS}
    return Example(prompt=prompt, responses=responses, kind=kind, meta=meta, file=file, row=number)


def _form(row: Mapping[str, Any], place: Place) -> str:
    """Say which format the columns make: the name of the column that holds the answers, or 'prompt'."""
    forms = [c for c in _ANSWERS if c in row]
    for column in sorted(row.keys() - _COLUMNS):
        near = difflib.get_close_matches(column, sorted(_COLUMNS - row.keys()), n=1, cutoff=0.8)
        near = near or ([_FOREIGN[column]] if not forms and column in _FOREIGN else [])
        if near and near[0] not in row:
            raise place.fault(
                column,
                f"unknown column; did you mean '{near[0]}'?",
                "rename it, or name an extra column otherwise",
            )
    columns = ", ".join(f"'{c}'" for c in row) or "none"
    if len(forms) > 1 or ("messages" in row and "prompt" in row):
        raise place.fault(forms[0], f"columns {columns} fit several formats", f"keep those of one of {_FORMATS}")
    form = forms[0] if forms else "prompt"
    if form == "prompt" and "prompt" not in row and "rejected" not in row:
        raise place.fault("prompt", f"columns {columns} fit no format", f"expected {_FORMATS}")
    needed = {"chosen": ["rejected"], "messages": []}.get(form, ["prompt"])
    needed += ["chosen"] if "rejected" in row else []
    for column in needed:
        if column not in row:
            raise place.fault(column, f"missing column (found {columns})", f"expected {_FORMATS}")
    if "failures" in row and form != "completions":
        raise place.fault(
            "failures",
            "stands without 'completions'",
            "it labels the entries of 'completions'; add or remove it",
        )
    return form


def kind_of(value: Any) -> str:
    """Return what a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number")


def _text(value: Any, field: str, place: Place) -> str:
    if not isinstance(value, str):
        raise place.fault(field, f"found {kind_of(value)}, expected text", "write a string")
    if not value.strip():
        raise place.fault(field, "empty text", "fill it in or remove the row")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise place.fault(
            field, f"half of a surrogate pair at character {error.start}", "remove the broken escape"
        ) from error
    return value


def _messages(value: Any, field: str, place: Place) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else kind_of(value)
        raise place.fault(
            field, f"found {found}, expected a list of messages", 'write [{"role": ..., "content": ...}, ...]'
        )
    return tuple(_message(item, f"{field}[{i}]", place) for i, item in enumerate(value))


def _message(item: Any, field: str, place: Place) -> Message:
    if not isinstance(item, dict):
        raise place.fault(field, f"found {kind_of(item)}, expected a message", 'write {"role": ..., "content": ...}')
    missing = {"role", "content"} - item.keys()
    extra = item.keys() - {"role", "content", "train"}
    if missing or extra:
        what = f"lacks {sorted(missing)}" if missing else f"has {sorted(extra)}, which nothing here reads"
        raise place.fault(field, f"the message {what}", "use the keys 'role', 'content' and, optionally, 'train'")
    role, train = item["role"], item.get("train")
    if role not in ROLES:
        hint = suggest(role, ROLES) if isinstance(role, str) else f"known: {', '.join(ROLES)}"
        raise place.fault(f"{field}.role", f"unknown role {role!r}", hint)
    if train is not None and not isinstance(train, bool):
        raise place.fault(
            f"{field}.train", f"found {kind_of(train)}, expected true or false", "correct it or leave it out"
        )
    return Message(role=role, content=_text(item["content"], f"{field}.content", place), train=train)


def _turns(value: Any, field: str, role: str, place: Place) -> tuple[Message, ...]:
    """Text is one turn of ``role``; a list is messages."""
    if isinstance(value, list):
        return _messages(value, field, place)
    return (Message(role=role, content=_text(value, field, place)),)


def _answer(value: Any, field: str, prompt: tuple[Message, ...], place: Place) -> tuple[Message, ...]:
    """An answer's messages; one that repeats the whole conversation loses the prompt it starts with."""
    turns = _turns(value, field, "assistant", place)
    if len(turns) > len(prompt) and turns[: len(prompt)] == prompt:
        turns = turns[len(prompt) :]
    if turns[0].role != "assistant" or turns[-1].role != "assistant":
        raise place.fault(
            field,
            f"starts with role '{turns[0].role}' and ends with '{turns[-1].role}', expected 'assistant'",
            "an answer starts and ends with an assistant turn; what comes before belongs in 'prompt'",
        )
    return turns


def _responses(row: Mapping[str, Any], form: str, prompt: tuple[Message, ...], place: Place) -> tuple[Response, ...]:
    if form == "prompt":
        return ()
    if form == "completion":
        return (Response(messages=_answer(row["completion"], "completion", prompt, place)),)
    if form == "chosen":
        return _ranked(
            [_answer(row[c], c, prompt, place) for c in ("chosen", "rejected")],
            (None, None),
            "rejected",
            place,
        )
    entries = row["completions"]
    if not isinstance(entries, list) or len(entries) < 2:
        found = f"{len(entries)} entries" if isinstance(entries, list) else kind_of(entries)
        raise place.fault(
            "completions",
            f"found {found}, expected a list of at least 2, best first",
            "one answer goes in 'completion'",
        )
    failures = row.get("failures")
    failures = [None] * len(entries) if failures is None else failures
    if not isinstance(failures, list) or len(failures) != len(entries):
        found = f"{len(failures)} entries" if isinstance(failures, list) else kind_of(failures)
        raise place.fault(
            "failures",
            f"found {found}, expected {len(entries)} (one a completion)",
            "use null where there is none",
        )
    for i, label in enumerate(failures):
        if label is not None and not (isinstance(label, str) and label.strip()):
            raise place.fault(
                f"failures[{i}]",
                f"found {kind_of(label)}, expected a label or null",
                "name the failure or use null",
            )
    answers = [_answer(entry, f"completions[{i}]", prompt, place) for i, entry in enumerate(entries)]
    return _ranked(answers, failures, "completions", place)


def _ranked(answers: list[tuple[Message, ...]], failures: Any, field: str, place: Place) -> tuple[Response, ...]:
    """Answers, best first, as ranked responses; two equal answers can't stand at two ranks."""
    for i, answer in enumerate(answers):
        if answer in answers[:i]:
            twin = f"answers {answers.index(answer)} and {i} (from 0) are identical"
            raise place.fault(field, f"{twin}, so their order means nothing", "remove the row or one of them")
    return tuple(
        Response(messages=m, rank=i, failure=f) for i, (m, f) in enumerate(zip(answers, failures, strict=True))
    )


def _conversation(messages: tuple[Message, ...], place: Place) -> tuple[tuple[Message, ...], tuple[Response, ...]]:
    """Turns before the last, which has to be the assistant's, are the prompt."""
    if messages[-1].role != "assistant":
        raise place.fault(
            "messages",
            f"ends with role '{messages[-1].role}', expected 'assistant'",
            "remove what follows the last answer",
        )
    if len(messages) < 2:
        raise place.fault("messages", "nothing stands before the answer", "put the turn it answers first")
    return messages[:-1], (Response(messages=messages[-1:]),)


def _transcripts(row: Mapping[str, Any], place: Place) -> tuple[tuple[Message, ...], tuple[Response, ...]]:
    """Two whole conversations that differ in the last assistant turn only (hh-rlhf)."""
    sides: list[tuple[Message, ...]] = []
    for column in ("chosen", "rejected"):
        is_text = isinstance(row[column], str)
        turns = _split_transcript(row[column], column, place) if is_text else _messages(row[column], column, place)
        if turns[-1].role != "assistant" or len(turns) < 2:
            raise place.fault(
                column,
                "doesn't end in an assistant turn after another turn",
                "remove the row, or give a 'prompt' column",
            )
        sides.append(turns)
    chosen, rejected = sides
    if chosen[:-1] != rejected[:-1]:
        length = max(len(chosen), len(rejected))
        part = next(i for i in range(length) if chosen[i : i + 1] != rejected[i : i + 1])
        found = f"differs from 'chosen' from turn {part + 1} on ({len(rejected)} and {len(chosen)} turns)"
        raise place.fault("rejected", found, "the two have to share all turns but the last; remove the row")
    return chosen[:-1], _ranked([chosen[-1:], rejected[-1:]], (None, None), "rejected", place)


def _split_transcript(text: str, field: str, place: Place) -> tuple[Message, ...]:
    parts = _TURN.split(_text(text, field, place))
    if len(parts) < 3 or parts[0].strip():
        start = text[:20]
        raise place.fault(
            field,
            f"starts with {start!r}, expected '\\n\\nHuman: '",
            "write a whole transcript, or give a 'prompt' column",
        )
    pairs = enumerate(zip(parts[1::2], parts[2::2], strict=True), 1)
    return tuple(
        Message(role=_TURN_ROLES[who], content=_text(said.strip(), f"{field} turn {i}", place))
        for i, (who, said) in pairs
    )
