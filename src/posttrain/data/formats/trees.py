"""Conversation trees (OASST): rankings at every depth, and the best path as a demonstration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from posttrain.data.formats.fields import Place, Row, build, entries, fields_of, optional_text, shown, text, whole
from posttrain.data.formats.table import in_format
from posttrain.data.formats.turns import Turns, conversation, told_apart
from posttrain.types import Example, Message, Response

_ROLES = {"prompter": "user", "assistant": "assistant"}


class _Node(NamedTuple):
    """A message that stands in the data, the turns before it, and its depth."""

    item: Mapping[str, Any]
    before: Turns
    field: str


def _message(node: _Node, place: Place) -> Message:
    role = node.item.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise place.fault(f"{node.field}.role", f"unknown role {shown(role)}", "known: assistant, prompter")
    return Message(role=_ROLES[role], content=text(node.item.get("text"), f"{node.field}.text", place))


def _replies(node: _Node, said: Message, place: Place) -> list[_Node]:
    """What answers a message; deleted messages are left out with all that follows them."""
    field = f"{node.field}.replies"
    items = [
        (fields_of(item, f"{field}[{i}]", place, ("text", "role")), f"{field}[{i}]")
        for i, item in enumerate(entries(node.item.get("replies") or [], field, place))
    ]
    before = (*node.before, said)
    return [_Node(item, before, at) for item, at in items if item.get("deleted") is not True]


def _root(row: Row, place: Place) -> _Node:
    return _Node(fields_of(row["prompt"], "prompt", place, ("text", "role")), (), "prompt")


def _walk(row: Row, place: Place) -> Iterator[tuple[_Node, Message, list[_Node]]]:
    """Every message, its parents first, with its replies. A stack of our own: a tree may be deeper than Python's."""
    stack = [_root(row, place)]
    while stack:
        node = stack.pop()
        said = _message(node, place)
        replies = _replies(node, said, place)
        yield node, said, replies
        stack += reversed(replies)


def _rank(node: _Node, place: Place) -> int | None:
    rank = node.item.get("rank")
    return None if rank is None else whole(rank, f"{node.field}.rank", place, range(1000))


_TREE = {
    "message_tree_id": "t1",
    "tree_state": "ready_for_export",
    "prompt": {
        "message_id": "t1",
        "text": "What is 2 + 3?",
        "role": "prompter",
        "replies": [
            {"message_id": "m2", "text": "6", "role": "assistant", "rank": 1, "replies": []},
            {
                "message_id": "m3",
                "text": "5",
                "role": "assistant",
                "rank": 0,
                "replies": [
                    {
                        "message_id": "m4",
                        "text": "Thanks. And 2 * 3?",
                        "role": "prompter",
                        "replies": [{"message_id": "m5", "text": "6", "role": "assistant", "replies": []}],
                    }
                ],
            },
        ],
    },
}


@in_format("oasst_tree", ["message_tree_id", "prompt"], example=_TREE)
def oasst_tree_row(row: Row, place: Place) -> list[Example]:
    """A ranking for each message with 2 or more ranked replies, at every depth; meta counts the unranked (OASST)."""
    found: list[Example] = []
    tied = 0
    for node, said, replies in _walk(row, place):
        ranked = [(reply, rank) for reply in replies if (rank := _rank(reply, place)) is not None]
        if said.role != "user" or len(ranked) < 2:
            continue
        if len({rank for _, rank in ranked}) < 2:
            tied += 1
            continue
        answers = [(_message(reply, place),) for reply, _ in ranked]
        for (reply, _), (answer,) in zip(ranked, answers, strict=True):
            if answer.role != "assistant":
                raise place.fault(f"{reply.field}.role", "the prompter answers the prompter", "remove the row")
        told_apart(answers, f"{node.field}.replies", place)
        responses = tuple(
            Response(messages=answer, rank=rank, meta=_about(reply.item))
            for answer, (reply, rank) in zip(answers, ranked, strict=True)
        )
        meta = {
            "message_tree_id": row["message_tree_id"],
            "message_id": node.item.get("message_id"),
            "unranked": len(replies) - len(ranked),
        }
        found.append(build(row, place, prompt=(*node.before, said), responses=responses, meta=meta))
    if not found:
        what = f"{tied} messages have only tied replies" if tied else "no message has 2 ranked replies"
        raise place.useless("nothing ranked", "prompt.replies", what, "read it as 'oasst_paths', or remove the row")
    return found


def _about(item: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in item.items() if key not in ("text", "role", "rank", "replies", "parent_id")}


@in_format("oasst_paths", ["message_tree_id", "prompt"], example=_TREE, asked=True)
def oasst_paths_row(row: Row, place: Place) -> list[Example]:
    """The best path as a demonstration: of ranked replies the best, else the first, to the last answer (OASST)."""
    node: _Node | None = _root(row, place)
    turns: list[Message] = []
    while node is not None:
        said = _message(node, place)
        turns.append(said)
        replies = _replies(node, said, place)
        node = min(replies, key=lambda reply: _order(reply, place), default=None)
    if turns[-1].role == "user":
        turns.pop()
    if len(turns) < 2:
        raise place.useless("nothing answered", "prompt.replies", "nothing answers the prompt", "remove the row")
    prompt, responses = conversation(tuple(turns), "prompt", place)
    lang = optional_text(row["prompt"], "lang", place)
    meta = {"message_tree_id": row["message_tree_id"], **({"lang": lang} if lang else {})}
    return [build(row, place, prompt=prompt, responses=responses, meta=meta)]


def _order(node: _Node, place: Place) -> float:
    rank = _rank(node, place)
    return float("inf") if rank is None else rank
