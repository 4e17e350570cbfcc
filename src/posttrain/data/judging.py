"""What stands beside examples in files of their own: judge templates, a judge's verdicts, reference answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from posttrain.data.formats.fields import Place, entries, fields_of, text, texts
from posttrain.data.records import records
from posttrain.errors import DataError
from posttrain.types import Example, Preference

_VERDICTS = {"1": 1.0, "2": 0.0, "Tie": 0.5}
_UNREADABLE = "garbage"


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgeTemplate:
    """How a judge model is asked.

    Attributes:
        name: what it is called.
        kind: whether it compares two answers or grades one.
        system: the system prompt; '' for none.
        prompt: the user turn, with places such as ``{question}`` and ``{answer_a}``.
        verdict: an example of how the judge writes its verdict: ``[[A]]``, ``[[rating]]``.
        category: which questions it is for.
    """

    name: str
    kind: Literal["pairwise", "single"]
    system: str
    prompt: str
    verdict: str
    category: str


def read_judge_templates(path: str | Path) -> list[JudgeTemplate]:
    """Read judge templates, a row of MT-bench's columns each.

    Raises:
        DataError: a missing or faulty column.
    """
    found: list[JudgeTemplate] = []
    for place, row in records(path):
        row = fields_of(row, "(row)", place, ("name", "type", "prompt_template", "output_format"))
        kind: Any = row["type"]
        if kind not in ("pairwise", "single"):
            raise place.fault("type", "expected 'pairwise' or 'single'", "correct it")
        found.append(
            JudgeTemplate(
                name=text(row["name"], "name", place),
                kind=kind,
                system=text(row.get("system_prompt", ""), "system_prompt", place, empty=True),
                prompt=text(row["prompt_template"], "prompt_template", place),
                verdict=text(row["output_format"], "output_format", place),
                category=text(row.get("category", ""), "category", place, empty=True),
            )
        )
    return found


class Joined(NamedTuple):
    """Examples with what was joined to them, and the rows that weren't: no example has their id, or no verdict is in them."""

    examples: list[Example]
    unmatched: int
    unreadable: int = 0


def join_verdicts(examples: Sequence[Example], path: str | Path, *, by: str) -> Joined:
    """Add a judge's verdicts (PandaLM's columns idx and gpt_result) to pairs as comparisons by the judge ``by``.

    Rows and examples belong together by 'idx'. "1" and "2" name the better response, "Tie" is one; "garbage", which the
    data has where the judge's answer couldn't be read, is no verdict and counts as ``unreadable``.

    Raises:
        DataError: another verdict, an id that two rows or no example share, an example without two responses.
    """
    rows = _by_id(records(path), "idx")
    found: list[Example] = []
    unreadable = 0
    for example in examples:
        place, row = rows.pop(_id(example, "idx"), (None, {}))
        if place is None:
            found.append(example)
            continue
        verdict = fields_of(row, "(row)", place, ("gpt_result",))["gpt_result"]
        if verdict == _UNREADABLE:
            unreadable += 1
            found.append(example)
            continue
        if verdict not in _VERDICTS or len(example.responses) != 2:
            raise place.fault("gpt_result", f"no verdict on {len(example.responses)} responses", "expected 1, 2 or Tie")
        given = Preference(a=0, b=1, better=_VERDICTS[verdict], by=by)
        about = {"reason": row.get("gpt_reason"), "reference": row.get("gpt_reference")}
        verdicts = {**example.meta.get("verdicts", {}), by: about}
        preferences = (*example.preferences, given)
        found.append(replace(example, preferences=preferences, meta={**example.meta, "verdicts": verdicts}))
    return Joined(found, len(rows), unreadable)


def join_references(examples: Sequence[Example], path: str | Path) -> Joined:
    """Add a model's answers (MT-bench's reference rows) to prompts, as ``meta["references"][model]``, one a turn.

    Rows and examples belong together by 'question_id'; examples without a row stay as they are.

    Raises:
        DataError: a faulty row, an id that two rows share, an example without an id.
    """
    rows = _by_id(records(path), "question_id")
    found: list[Example] = []
    for example in examples:
        place, row = rows.pop(_id(example, "question_id"), (None, {}))
        if place is None:
            found.append(example)
            continue
        choices = entries(row.get("choices"), "choices", place, least=1, most=1)
        turns = texts(
            fields_of(choices[0], "choices[0]", place, ("turns",))["turns"], "choices[0].turns", place, least=1
        )
        model = text(row.get("model_id"), "model_id", place)
        references = {**example.meta.get("references", {}), model: turns}
        found.append(replace(example, meta={**example.meta, "references": references}))
    return Joined(found, len(rows))


def _by_id(rows: Iterable[tuple[Place, Mapping[str, Any]]], column: str) -> dict[Any, tuple[Place, Mapping[str, Any]]]:
    found: dict[Any, tuple[Place, Mapping[str, Any]]] = {}
    for place, row in rows:
        key = fields_of(row, "(row)", place, (column,))[column]
        if not isinstance(key, (str, int)) or key in found:
            what = f"{key!r} stands twice" if isinstance(key, (str, int)) else "expected a number or text"
            raise place.fault(column, what, "give every row an id of its own")
        found[key] = (place, row)
    return found


def _id(example: Example, column: str) -> Any:
    if column not in example.meta:
        raise DataError.at(example.file, example.row, column, "the example has none to join by", "read it with its id")
    return example.meta[column]
