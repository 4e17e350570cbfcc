"""Scoring whole files: every response of every row, in order, resumable, the output readable as data again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from posttrain.data.load import ReadReport, file_hash, stream
from posttrain.data.write import row_of
from posttrain.errors import ConfigError
from posttrain.rewards.panel import Panel, Scored
from posttrain.types import Example, stable_hash

GIVEN, SPREAD = "given_score", "disagreement"
"""Ratings of a scored response: the score that the data had, and the members' deviation in an ensemble."""

_CHUNK = 64  # examples between two writes


@dataclass(frozen=True)
class Outcome:
    """What scoring a file came to: examples, answers scored, answers too long, and examples that stood there already."""

    examples: int
    scored: int
    too_long: int
    resumed: int
    report: ReadReport


def score_file(
    panel: Panel,
    source: str,
    out: Path,
    *,
    identity: Mapping[str, Any],
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    skip_bad: int = 0,
    on_done: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Write each example of ``source`` with its responses' scores to ``out``, one a line, in the source's order.

    The lines are of the format ``example``: a response's ``score`` is the model's, its own score, if the data had one, stands
    among its attributes as ``given_score``, an ensemble's deviation as ``disagreement``. A response that is too long has
    no score. Cut off, the same call goes on after the last whole line; ``OUT.progress`` says of what it is, by ``identity``,
    and goes away at the end.

    Args:
        panel: of any tokenizer.
        source: what `posttrain.data.stream` reads.
        out: a new file, or one that was cut off.
        identity: what decides the scores (the model's hash, options).
        format: as `posttrain.data.stream`.
        columns: likewise.
        limit: likewise.
        skip_bad: likewise.
        on_done: hears how many examples and answers are done.

    Raises:
        ConfigError: ``out`` is finished, or of something else.
        DataError: as `posttrain.data.stream`.
    """
    known = dict(identity) | {"source": _fingerprint(source), "limit": limit, "format": format, "columns": columns}
    done = _resume(out, stable_hash(known), known)
    report = ReadReport()
    rows = stream(source, format=format, columns=columns, limit=limit, skip_bad=skip_bad, report=report)
    for line, example in zip(_lines(out), islice(rows, done), strict=True):
        if json.loads(line).get("prompt") != json.loads(json.dumps(row_of(example)))["prompt"]:
            raise ConfigError(f"'{out}' has other rows than '{source}'; remove it and start again")
    examples, scored, long = done, 0, 0
    with out.open("a", encoding="utf-8", newline="\n") as file:
        for chunk in _chunks(rows):
            for example, found in zip(chunk, panel.score(chunk), strict=True):
                file.write(json.dumps(row_of(with_scores(example, found)), ensure_ascii=False) + "\n")
                scored += sum(s is not None for s in found.scores)
                long += sum(s is None for s in found.scores)
            file.flush()
            os.fsync(file.fileno())
            examples += len(chunk)
            if on_done is not None:
                on_done(examples, scored + long)
    _progress(out).unlink()
    return Outcome(examples, scored, long, done, report)


def with_scores(example: Example, found: Scored) -> Example:
    """The example with the model's scores in place of its own, which move to the attributes."""
    responses = []
    for response, score, spread in zip(example.responses, found.scores, found.spread, strict=True):
        named = dict(response.attributes)
        named |= {GIVEN: response.score} if response.score is not None else {}
        named |= {SPREAD: spread} if spread is not None and len(found.members) > 1 else {}
        responses.append(replace(response, score=score, attributes=named))
    return replace(example, responses=tuple(responses))


def _chunks(rows: Iterator[Example]) -> Iterator[list[Example]]:
    while chunk := list(islice(rows, _CHUNK)):
        yield chunk


def _resume(out: Path, key: str, known: Mapping[str, Any]) -> int:
    """How many whole lines of this very work are there; a half line at the end is cut off."""
    if not _progress(out).exists():
        if out.exists() and out.stat().st_size:
            raise ConfigError(f"'{out}' is there already; give another name, or remove it")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.touch()
        _progress(out).write_text(json.dumps({"key": key, **known}, indent=2, default=str) + "\n")
        return 0
    before = json.loads(_progress(out).read_text())
    if before.get("key") != key:
        changed = [k for k in known if json.loads(json.dumps(known[k], default=str)) != before.get(k)]
        raise ConfigError(
            f"'{out}' was begun with other {', '.join(changed) or 'settings'}; remove it and '{_progress(out).name}' to start again"
        )
    if not out.exists():
        out.touch()
    with out.open("r+b") as file:
        data = file.read()
        whole = data.rfind(b"\n") + 1
        file.truncate(whole)
    return data[:whole].count(b"\n")


def _lines(out: Path) -> Iterator[str]:
    with out.open(encoding="utf-8") as file:
        yield from file


def _progress(out: Path) -> Path:
    return out.with_name(out.name + ".progress")


def _fingerprint(source: str) -> str:
    """A file's name and hash; names of other sources alone."""
    path = Path(source)
    return f"{path.name} {file_hash(path)}" if path.is_file() else source


def identity_of(model: str, files: Sequence[Path], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a panel's numbers: the hashes of its files, and its settings."""
    return {"model": model, "weights": stable_hash([file_hash(f) for f in files]), **settings}
