"""Principles of a constitution, and rules over propositions: what AI feedback and rule-based rewards are told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.data.formats.fields import Place, doubled, entries, fields_of, flag, shown, text, texts
from posttrain.data.formats.turns import Turns, messages
from posttrain.data.records import records
from posttrain.errors import DataError

_KEYS = ("prompt_template", "simple_propositions", "completion_classes", "completion_class_order")


@dataclass(frozen=True, kw_only=True, slots=True)
class Principle:
    """A principle as two requests: to criticise an answer by it, and to rewrite the answer after the critique."""

    name: str
    critique: str
    revision: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """Rules that put an answer in a class by what is true of it.

    Attributes:
        template: the grader's prompt, with ``{question}`` and ``{response}``.
        questions: proposition -> the question whose yes or no says whether it holds.
        derived: proposition -> the propositions (true or false) that together mean it; it may name earlier ones.
        classes: class -> kind of response wanted -> the propositions that put an answer in the class.
        order: the classes, best first.
    """

    template: str
    questions: Mapping[str, str]
    derived: Mapping[str, Mapping[str, bool]]
    classes: Mapping[str, Mapping[str, Mapping[str, bool]]]
    order: tuple[str, ...]


def read_principles(path: str | Path) -> list[Principle]:
    """Read the principles of a constitution, from any kind of file that `posttrain.data.records` reads.

    Rows are {"name", "critique", "revision"}; a file may instead be {"constitutions": [{"critic", "revision"}]}, or
    {NAME: {"prompt": ["CritiqueRequest: ..."], "edit_request": "RevisionRequest: ..."}}, whose marks are taken off.

    Raises:
        DataError: another shape, an empty request, a name that stands twice.
        ConfigError: no such file.
    """
    found: list[Principle] = []
    for place, row in records(path):
        if "constitutions" in row:
            given = entries(row["constitutions"], "constitutions", place, least=1)
            found += [_principle(item, f"constitutions[{i}]", i + 1, place) for i, item in enumerate(given)]
        elif "edit_request" in row:
            found.append(_requests(row, place))
        else:
            found.append(_principle(row, "", place.row, place))
    if twice := doubled(principle.name for principle in found):
        raise DataError(f"{path}: two principles are named {shown(twice[0])}; rename one")
    return found


def read_chats(path: str | Path) -> list[Turns]:
    """Read the conversations that a constitution file shows a critic as examples ('system_chat'); none is [].

    Raises:
        DataError: faulty turns.
        ConfigError: no such file.
    """
    found: list[Turns] = []
    for place, row in records(path):
        chats = entries(row.get("system_chat") or [], "system_chat", place)
        found += [messages(chat, f"system_chat[{i}]", place) for i, chat in enumerate(chats)]
    return found


def _principle(item: Any, field: str, number: int, place: Place) -> Principle:
    item = fields_of(item, field or "(row)", place, ("revision",))
    critique = "critic" if "critic" in item else "critique"
    at = f"{field}." if field else ""
    return Principle(
        name=text(item.get("name", f"principle {number}"), f"{at}name", place),
        critique=text(item.get(critique), f"{at}{critique}", place),
        revision=text(item["revision"], f"{at}revision", place),
    )


def _requests(row: Mapping[str, Any], place: Place) -> Principle:
    critique = texts(row.get("prompt"), "prompt", place, least=1, most=1)[0]
    revision = text(row["edit_request"], "edit_request", place)
    return Principle(
        name=text(row.get("key"), "key", place),
        critique=text(_unmarked(critique, "CritiqueRequest:", "Critique:"), "prompt", place),
        revision=text(_unmarked(revision, "RevisionRequest:", "Revision:"), "edit_request", place),
    )


def _unmarked(request: str, before: str, after: str) -> str:
    return request.strip().removeprefix(before).removesuffix(after).strip()


def read_rules(path: str | Path) -> Rules:
    """Read rules over propositions from YAML.

    Keys are 'prompt_template', 'simple_propositions' (name -> {"prompt"}), 'derived_propositions',
    'completion_classes' and 'completion_class_order'; every proposition that a rule names has to be there.

    Raises:
        DataError: another shape, a rule about an unknown proposition, an order that isn't that of the classes.
        ConfigError: no such file.
    """
    rows = list(records(path))
    place, row = rows[0] if rows else (Place(str(path), 1), {})
    given = fields_of(row if len(rows) == 1 else {}, "(file)", place, _KEYS)
    simple = fields_of(given["simple_propositions"], "simple_propositions", place)
    questions = {
        name: text(fields_of(item, name, place, ("prompt",))["prompt"], f"{name}.prompt", place)
        for name, item in simple.items()
    }
    known = set(questions)
    derived: dict[str, Mapping[str, bool]] = {}
    for name, item in fields_of(given.get("derived_propositions") or {}, "derived_propositions", place).items():
        derived[name] = _wanted(item, f"derived_propositions.{name}", known, place)
        known.add(name)
    classes = {
        name: {
            kind: _wanted(item, f"completion_classes.{name}.{kind}", known, place)
            for kind, item in fields_of(kinds, f"completion_classes.{name}", place).items()
        }
        for name, kinds in fields_of(given["completion_classes"], "completion_classes", place).items()
    }
    order = texts(given["completion_class_order"], "completion_class_order", place)
    if sorted(order) != sorted(classes):
        found = f"orders {', '.join(sorted(order))}, but the classes are {', '.join(sorted(classes))}"
        raise place.fault("completion_class_order", found, "name every class once")
    template = text(given["prompt_template"], "prompt_template", place)
    return Rules(template=template, questions=questions, derived=derived, classes=classes, order=tuple(order))


def _wanted(item: Any, field: str, known: set[str], place: Place) -> dict[str, bool]:
    wanted = fields_of(item, field, place)
    for name in wanted:
        if name not in known:
            raise place.fault(field, f"names the proposition '{name}', which isn't defined before", "define it first")
    return {name: flag(value, f"{field}.{name}", place) for name, value in wanted.items()}
