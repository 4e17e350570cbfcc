"""Examples as the columns that TRL's trainers read; what such columns can't say is refused by name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

from posttrain.data.tally import compared_pairs
from posttrain.errors import ConfigError, DataError, suggest
from posttrain.types import Example, Message, Response

Columns = Literal["prompt", "prompt-completion", "messages", "preference", "unpaired"]
"""TRL's dataset types: the columns prompt; prompt, completion; messages; prompt, chosen, rejected; prompt, completion,
label."""

SUFFIXES = (".jsonl", ".parquet")

_BATCH = 1000


def export(examples: Iterable[Example], path: str | Path, columns: Columns | None = None) -> int:
    """Write examples to a .jsonl or .parquet file as TRL's columns and return the number of rows.

    Messages are lists of ``{"role", "content"}``. Besides a type's own columns there may be ``score_chosen``,
    ``score_rejected`` and ``tools``; whatever else an example holds (``kind``, extra columns, ratings, who judged,
    the names of failures) stands as JSON text in the column ``meta``. The file appears only when it's complete.

    Args:
        examples: read once, in bounded memory.
        path: the file to write.
        columns: the type; None takes the one that fits the first example, and then all have to fit it.

    Raises:
        ConfigError: another kind of file, a directory that isn't there, unknown columns.
        DataError: an example that the columns can't express, with what it is that they can't; no examples.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"can't export to '{path}'; expected a name that ends with {' or '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise ConfigError(f"can't write '{path}': there is no directory '{path.parent}'; make it or name another")
    rows = export_rows(examples, columns)
    first = next(rows, None)
    if first is None:
        raise DataError("nothing to export: no examples")
    write = _write_parquet if path.suffix == ".parquet" else _write_jsonl
    part = path.with_name(path.name + ".part")
    try:
        count = write(chain([first], rows), part)
        os.replace(part, path)
    finally:
        with suppress(FileNotFoundError):
            part.unlink()
    return count


def export_rows(examples: Iterable[Example], columns: Columns | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows that `export` writes; an example with several labelled answers gives one each."""
    if columns is not None and columns not in get_args(Columns):
        raise ConfigError(f"unknown columns '{columns}'; {suggest(columns, get_args(Columns))}")
    make: Callable[[Example], Iterator[dict[str, Any]]] | None = _MAKERS[columns] if columns else None
    for example in examples:
        if make is None:
            columns = fitting(example)
            make = _MAKERS[columns]
        _refuse_unsayable(example)
        for row in make(example):
            yield row | _rest(example, "score_chosen" in row)


def fitting(example: Example) -> Columns:
    """Return the columns that fit an example by the feedback it has."""
    answers = example.responses
    if not answers:
        return "prompt"
    if any(r.label is not None for r in answers):
        return "unpaired"
    return "prompt-completion" if len(answers) == 1 else "preference"


# ---------------------------------------------------------------------------- rows of each type


def _prompt(example: Example) -> Iterator[dict[str, Any]]:
    if example.responses:
        raise _fault(example, "responses", "it has answers, which the column 'prompt' alone would drop", "use others")
    yield {"prompt": _turns(example, example.prompt)}


def _prompt_completion(example: Example) -> Iterator[dict[str, Any]]:
    answer = _only(example)
    if answer.label is not None:
        raise _fault(example, "label", "these columns have none", "export as 'unpaired'")
    yield {"prompt": _turns(example, example.prompt), "completion": _turns(example, answer.messages, answer=True)}


def _messages(example: Example) -> Iterator[dict[str, Any]]:
    (row,) = _prompt_completion(example)
    yield {"messages": row["prompt"] + row["completion"]}


def _preference(example: Example) -> Iterator[dict[str, Any]]:
    if len(example.responses) != 2:
        remedy = "make rows of two of them, or train on the ranking here"
        raise _fault(example, "responses", f"a preference has two answers, not {len(example.responses)}", remedy)
    pairs, remedy = list(compared_pairs(example)), "posttrain.data.views.preferences_as_pairs makes pairs of verdicts"
    if len(pairs) != 1 or len(example.preferences) > 1 or any(p.better not in (0, 1) for p in example.preferences):
        what = "no order" if not pairs else "several comparisons, or one that isn't a clear verdict"
        raise _fault(example, "responses", f"{what}, a preference is one verdict", remedy)
    if pairs[0].tied:
        raise _fault(example, "responses", "a tie, which the columns can't express", "leave the row out")
    better, worse = (example.responses[i] for i in (pairs[0].better, pairs[0].worse))
    row: dict[str, Any] = {"prompt": _turns(example, example.prompt)}
    row |= {name: _turns(example, r.messages, answer=True) for name, r in (("chosen", better), ("rejected", worse))}
    scores = {"score_chosen": better.score, "score_rejected": worse.score}
    yield row | (scores if None not in scores.values() else {})


def _unpaired(example: Example) -> Iterator[dict[str, Any]]:
    for answer in example.responses:
        if answer.label is None:
            raise _fault(example, "label", "an answer has none", "label it or remove it")
        completion = _turns(example, answer.messages, answer=True)
        yield {"prompt": _turns(example, example.prompt), "completion": completion, "label": answer.label}


_MAKERS: dict[Columns, Callable[[Example], Iterator[dict[str, Any]]]] = {
    "prompt": _prompt,
    "prompt-completion": _prompt_completion,
    "messages": _messages,
    "preference": _preference,
    "unpaired": _unpaired,
}


def _only(example: Example) -> Response:
    if len(example.responses) != 1:
        found = f"these columns hold one answer, not {len(example.responses)}"
        raise _fault(example, "responses", found, "choose one, or other columns")
    return example.responses[0]


def _turns(example: Example, messages: Sequence[Message], *, answer: bool = False) -> list[dict[str, Any]]:
    """Messages in the common form; a ``train`` that differs from the columns' rule can't be expressed."""
    turns = []
    for message in messages:
        if message.train is not None and message.train != (answer and message.role == "assistant"):
            found = f"train={str(message.train).lower()} on a turn, which the columns can't express"
            raise _fault(example, "train", found, "remove it, or train on the row here")
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.name:
            turn["name"] = message.name
        if message.call_id:
            turn["tool_call_id"] = message.call_id
        if message.tool_calls:
            turn["tool_calls"] = [
                {"type": "function", "function": {"name": c.name, "arguments": dict(c.arguments)}}
                | ({"id": c.id} if c.id else {})
                for c in message.tool_calls
            ]
        turns.append(turn)
    return turns


def _refuse_unsayable(example: Example) -> None:
    """Refuse what no type of columns has a place for."""
    if example.weight != 1:
        raise _fault(example, "weight", f"{example.weight:g}; the columns have none", "set it to 1 or train here")
    if any(r.steps for r in example.responses):
        raise _fault(example, "steps", "labelled steps, which the columns can't express", "train on them here")
    if example.target is not None and example.target.kind not in ("number", "text"):
        found = f"a target of kind '{example.target.kind}', which the columns can't express"
        raise _fault(example, "target", found, "remove it or train here")


def _rest(example: Example, scored: bool) -> dict[str, Any]:
    """Columns beside a type's own; ``scored`` if scores have some already."""
    row: dict[str, Any] = {}
    if example.target is not None:
        row["solution"] = example.target.answer
    if example.tools:
        row["tools"] = [dict(tool) for tool in example.tools]
    meta: dict[str, Any] = dict(example.meta)
    answers = [
        {"score": None if scored else r.score, "attributes": dict(r.attributes), "failure": r.failure}
        | {"meta": dict(r.meta)}
        for r in example.responses
    ]
    answers = [{key: value for key, value in one.items() if value not in (None, {})} for one in answers]
    verdicts = [{key: value for key, value in (("axis", p.axis), ("by", p.by)) if value} for p in example.preferences]
    more = {"kind": example.kind, "responses": any(answers) and answers, "preferences": any(verdicts) and verdicts}
    for name, value in more.items():
        if value and name in meta:
            raise _fault(example, name, "a column of its own has the name that this takes in 'meta'", "rename it")
        meta |= {name: value} if value else {}
    return row | ({"meta": json.dumps(meta, ensure_ascii=False)} if meta else {})


def _fault(example: Example, field: str, problem: str, remedy: str) -> DataError:
    return DataError.at(example.file or "example", example.row, field, f"can't be exported: {problem}", remedy)


# ---------------------------------------------------------------------------- files


def _write_jsonl(rows: Iterable[dict[str, Any]], path: Path) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as handle:
        for row in rows:
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def _write_parquet(rows: Iterator[dict[str, Any]], path: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    first = next(rows)
    turns = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    kinds = {"label": pa.bool_(), "score_chosen": pa.float64(), "score_rejected": pa.float64()}
    kinds |= {"solution": pa.string(), "meta": pa.string()}
    names = [*(n for n in first if n not in kinds), *(n for n in kinds if n in first or n == "meta")]
    schema = pa.schema([(name, kinds.get(name, turns)) for name in names])
    count, batch = 0, []
    with pq.ParquetWriter(path, schema) as writer:
        for row in chain([first], rows):
            batch.append(_flat(row, names, count))
            count += 1
            if len(batch) == _BATCH:
                writer.write_table(pa.Table.from_pylist(batch, schema=schema))
                batch = []
        if batch:
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))
    return count


def _flat(row: dict[str, Any], names: Sequence[str], number: int) -> dict[str, Any]:
    """Refuse what fixed Parquet columns would drop or fill in."""
    remedy = "export to .jsonl"
    if "tools" in row:
        raise DataError(f"example {number} (from 0) offers tools, which Parquet columns can't hold; {remedy}")
    if extra := row.keys() - set(names):
        raise DataError(f"example {number} (from 0) has '{min(extra)}', the first one has not; {remedy}")
    for turns in row.values():
        for turn in turns if isinstance(turns, list) else []:
            if extra := turn.keys() - {"role", "content"}:
                found = f"example {number} (from 0) has a turn with '{min(extra)}'"
                raise DataError(f"{found}, which Parquet columns can't hold; {remedy}")
    return row
