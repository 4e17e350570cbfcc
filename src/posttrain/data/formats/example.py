"""The columns of `posttrain.types.Example` itself: what this library writes, and reads back code point for code point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_type_hints

from posttrain.data.formats.fields import (
    Place,
    Row,
    entries,
    fields_of,
    flag,
    kind_of,
    number,
    shown,
    text,
    texts,
    weight,
    whole,
)
from posttrain.data.formats.table import in_format
from posttrain.data.formats.turns import Turns, identity, message, tools
from posttrain.errors import suggest
from posttrain.types import Example, Preference, Response, Step, Target

_COLUMNS = ("prompt", "responses", "preferences", "target", "tools", "weight", "kind", "meta")
_RESPONSE = ("messages", "rank", "score", "label", "attributes", "steps", "failure", "meta")
_PREFERENCE = ("a", "b", "better", "axis", "by")
_TARGET = ("kind", "answer", "choices", "correct", "tests", "constraints")
_TARGETS: tuple[str, ...] = get_args(get_type_hints(Target)["kind"])


def _looks(row: Row) -> bool:
    responses = row["responses"]
    if not isinstance(row["prompt"], list) or not isinstance(responses, list):
        return False
    return all(isinstance(item, dict) and "messages" in item for item in responses)


@in_format(
    "example",
    ["prompt", "responses"],
    reads=_COLUMNS[2:],
    looks=_looks,
    example={
        "prompt": [{"role": "user", "content": "What is the capital of France?"}],
        "responses": [
            {"messages": [{"role": "assistant", "content": "Paris."}], "rank": 0},
            {"messages": [{"role": "assistant", "content": "Lyon."}], "rank": 1},
        ],
    },
)
def example_row(row: Row, place: Place) -> list[Example]:
    """This library's own record, with every kind of feedback that it holds."""
    _only(row, _COLUMNS, "", place)
    answers = entries(row["responses"], "responses", place)
    responses = tuple(_response(item, f"responses[{i}]", place) for i, item in enumerate(answers))
    _told_apart(responses, place)
    kind = row.get("kind", "")
    if not isinstance(kind, str):
        raise place.fault("kind", f"found {kind_of(kind)}, expected a string", "quote it or leave it out")
    example = Example(
        prompt=_turns(row["prompt"], "prompt", place),
        responses=responses,
        preferences=_preferences(row.get("preferences", []), len(responses), place),
        target=_target(row["target"], place) if row.get("target") is not None else None,
        tools=tools(row.get("tools"), place),
        weight=weight(row["weight"], place) if "weight" in row else 1.0,
        kind=kind,
        meta=dict(fields_of(row.get("meta", {}), "meta", place)),
        file=place.file,
        row=place.row,
    )
    return [example]


def _only(item: Mapping[str, Any], known: Sequence[str], field: str, place: Place) -> None:
    for key in item:
        if key not in known:
            path = f"{field}.{key[:40]}" if field else key[:40]
            raise place.fault(path, "unknown key", f"{suggest(key[:40], known)}; what else there is goes in 'meta'")


def _turns(value: Any, field: str, place: Place) -> Turns:
    return tuple(
        message(item, f"{field}[{i}]", place, silent=True)
        for i, item in enumerate(entries(value, field, place, least=1))
    )


def _response(value: Any, field: str, place: Place) -> Response:
    item = fields_of(value, field, place, ("messages",))
    _only(item, _RESPONSE, field, place)
    given = {key: part for key, part in item.items() if part is not None}
    ratings = fields_of(given.get("attributes", {}), f"{field}.attributes", place)
    steps = entries(given.get("steps", []), f"{field}.steps", place)
    rank = whole(given["rank"], f"{field}.rank", place) if "rank" in given else None
    if rank is not None and rank < 0:
        raise place.fault(f"{field}.rank", f"found {rank}, expected 0 (best) or more", "count ranks from 0")
    return Response(
        messages=_turns(item["messages"], f"{field}.messages", place),
        rank=rank,
        score=number(given["score"], f"{field}.score", place) if "score" in given else None,
        label=flag(given["label"], f"{field}.label", place) if "label" in given else None,
        attributes={key: number(part, f"{field}.attributes.{key[:40]}", place) for key, part in ratings.items()},
        steps=tuple(_step(step, f"{field}.steps[{i}]", place) for i, step in enumerate(steps)),
        failure=text(given["failure"], f"{field}.failure", place) if "failure" in given else None,
        meta=dict(fields_of(given.get("meta", {}), f"{field}.meta", place)),
    )


def _step(value: Any, field: str, place: Place) -> Step:
    item = fields_of(value, field, place, ("text",))
    _only(item, ("text", "label"), field, place)
    label = whole(item["label"], f"{field}.label", place, (-1, 0, 1)) if item.get("label") is not None else None
    return Step(text=text(item["text"], f"{field}.text", place, empty=True), label=label)


def _preferences(value: Any, count: int, place: Place) -> tuple[Preference, ...]:
    found: list[Preference] = []
    for i, part in enumerate(entries(value, "preferences", place)):
        field = f"preferences[{i}]"
        item = fields_of(part, field, place, ("a", "b", "better"))
        _only(item, _PREFERENCE, field, place)
        a, b = (whole(item[key], f"{field}.{key}", place, range(count)) for key in "ab")
        better = number(item["better"], f"{field}.better", place)
        if a == b or not 0 <= better <= 1:
            what = f"compares response {a} with itself" if a == b else f"better is {better:g}, expected 0 to 1"
            raise place.fault(field, what, "correct it or remove the row")
        names = [text(item.get(key, ""), f"{field}.{key}", place, empty=True) for key in ("axis", "by")]
        found.append(Preference(a=a, b=b, better=better, axis=names[0], by=names[1]))
    return tuple(found)


def _target(value: Any, place: Place) -> Target:
    item = fields_of(value, "target", place, ("kind",))
    _only(item, _TARGET, "target", place)
    kind: Any = item["kind"]
    if kind not in _TARGETS:
        hint = suggest(kind, _TARGETS) if isinstance(kind, str) else f"known: {', '.join(_TARGETS)}"
        raise place.fault("target.kind", f"found {shown(kind)}", hint)
    choices = [text(c, "target.choices", place, empty=True) for c in entries(item.get("choices", []), "target", place)]
    constraints: list[tuple[str, Mapping[str, Any]]] = []
    for i, part in enumerate(entries(item.get("constraints", []), "target.constraints", place)):
        field = f"target.constraints[{i}]"
        name, arguments = entries(part, field, place, least=2, most=2)
        constraints.append((text(name, field, place), dict(fields_of(arguments, field, place))))
    return Target(
        kind=kind,
        answer=text(item.get("answer", ""), "target.answer", place, empty=True),
        choices=tuple(choices),
        correct=tuple(
            whole(c, "target.correct", place, range(len(choices)))
            for c in entries(item.get("correct", []), "target.correct", place)
        ),
        tests=tuple(texts(item.get("tests", []), "target.tests", place)),
        constraints=tuple(constraints),
    )


def _told_apart(responses: Sequence[Response], place: Place) -> None:
    """Check that no answer stands at two ranks; if there is but one answer, the row is useless."""
    ranks: dict[Any, int] = {}
    for i, response in enumerate(responses):
        if response.rank is None or ranks.setdefault(identity(response.messages), response.rank) == response.rank:
            continue
        problem = f"response {i} is identical with one of another rank, so their order means nothing"
        if len({identity(other.messages) for other in responses}) == 1:
            raise place.useless("identical answers", "responses", problem, "remove the row")
        raise place.fault("responses", problem, "remove the row or one of them")
