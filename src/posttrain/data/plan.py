"""What a template that copies contents writes for a sequence of roles, as ids with gaps where contents come.

Where a template is proved to copy contents (`copying`), what it writes depends on the roles only. So each sequence of
roles has a plan: the ids of all that stands between contents, and the texts that contents are part of.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from posttrain.data.control import Coder, Found, encode_text, find_controls
from posttrain.data.layout import Scaffold, cached_scaffold, coder_for, roles_only, stop_ids
from posttrain.data.template import Talk, markers, write
from posttrain.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Fixed(NamedTuple):
    """Ids that don't depend on contents; ``turn`` is the assistant message they are sampled in, or -1."""

    ids: list[int]
    turn: int


class Text(NamedTuple):
    """Text to encode: strings and, as numbers, messages whose contents come there; else as `Fixed`."""

    parts: tuple[str | int, ...]
    turn: int
    prefix: bool
    lstrip: bool
    rstrip: bool


class Plan(NamedTuple):
    """How conversations of one sequence of roles become ids.

    Attributes:
        items: in order; none straddles the start of a sampled turn.
        trimmed: for each message, whether the template trims its content on the left and on the right.
        first: for each assistant message, the item that starts its sampled turn.
        after: for each message, the item after the stop token that ends it; None if none follows its content.
        where: for each message, the item with its content.
    """

    items: tuple[Fixed | Text, ...]
    trimmed: tuple[tuple[bool, bool], ...]
    first: dict[int, int]
    after: dict[int, int]
    where: dict[int, int]


def trim(text: str, left: bool, right: bool) -> str:
    """Return the text without white space on these sides."""
    text = text.lstrip() if left else text
    return text.rstrip() if right else text


@lru_cache(maxsize=1024)
def plan_of(
    tokenizer: PreTrainedTokenizerBase, key: tuple[Any, ...], roles: tuple[str, ...], generation_prompt: bool
) -> Plan | None:
    """Return the plan for these roles.

    None where conversations of these roles have to be rendered one by one, if only for their error's sake.
    """
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
    return _joined(Plan(tuple(builder.items), trimmed, builder.first, builder.after, builder.where))


def _joined(plan: Plan) -> Plan:
    """The same plan with neighbouring fixed ids in one item, but where a turn starts or ends between them."""
    bounds = {*plan.first.values(), *plan.after.values()}
    items: list[Fixed | Text] = []
    moved: list[int] = []  # for each item, and their end, where it is now
    for i, item in enumerate(plan.items):
        last = items[-1] if items else None
        if i not in bounds and isinstance(item, Fixed) and isinstance(last, Fixed) and last.turn == item.turn:
            items[-1] = Fixed(last.ids + item.ids, item.turn)
            moved.append(len(items) - 1)
            continue
        moved.append(len(items))
        items.append(item)
    moved.append(len(items))
    places = [{m: moved[i] for m, i in where.items()} for where in (plan.first, plan.after, plan.where)]
    return Plan(tuple(items), plan.trimmed, *places)


class _Builder:
    """Gathers a plan's items from left to right, with the rules of `encode_controlled`."""

    def __init__(self, coder: Coder) -> None:
        self.coder = coder
        self.items: list[Fixed | Text] = []
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
            text = trim("".join(map(str, parts)), lstrip, rstrip)
            if not text:
                return
            self.items.append(Fixed(encode_text(self.coder, text, self._prefix).ids, self._turn))
        else:
            self.where.update({p: len(self.items) for p in parts if isinstance(p, int)})
            self.items.append(Text(tuple(parts), self._turn, self._prefix, lstrip, rstrip))
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
        self.items.append(Fixed([token.id], self._turn))
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
