"""Read feedback of any kind of source into `Example` records; what is left out is counted, and faults say where and why."""

from __future__ import annotations

import difflib
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from posttrain.data.formats import parse_rows
from posttrain.data.formats.fields import Place
from posttrain.data.opened import READABLE, kind_by_name, stem
from posttrain.data.records import found_rows
from posttrain.errors import ConfigError, DataError, UselessRow, suggest
from posttrain.types import Example

NAMES = ("demonstrations", "rankings", "prompts", "heldout_rankings", "heldout_prompts")
"""Names under which a directory holds its parts, each a file of any kind or a directory of shards."""

DEFAULT_DIR = Path(__file__).parent / "default"

_KEPT = 10_000  # messages of faults that a report keeps
_LOOKED_AT = 100  # faulty rows passed over to find out what a file holds


@dataclass
class ReadReport:
    """What reading found.

    ``rows`` counts all of them, ``examples`` what they gave; ``useless`` counts rows that teach nothing by reason, and
    ``first`` has the first place of each; ``faulty`` counts faulty rows, of which ``bad`` keeps the first 10,000 messages.
    """

    rows: int = 0
    examples: int = 0
    useless: Counter[str] = field(default_factory=Counter[str])
    first: dict[str, Place] = field(default_factory=dict[str, Place])
    faulty: int = 0
    bad: list[str] = field(default_factory=list[str])

    def count(self, place: Place, error: DataError) -> None:
        """Count a row that gave no example."""
        if isinstance(error, UselessRow):
            self.useless[error.reason] += 1
            self.first.setdefault(error.reason, place)
            return
        self.faulty += 1
        if len(self.bad) < _KEPT:
            self.bad.append(str(error))

    def __str__(self) -> str:
        """One line; rows left out by reason, most frequent first."""
        parts = [f"{self.rows} rows, {self.examples} examples"]
        reasons = sorted(self.useless.items(), key=lambda item: (-item[1], item[0]))
        parts += [f"{count} useless ({reason}, first row {self.first[reason].row})" for reason, count in reasons]
        parts += [f"{self.faulty} faulty, first: {self.bad[0]}"] if self.bad else []
        return "; ".join(parts)


def stream(
    source: Any,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    skip_bad: int = 0,
    report: ReadReport | None = None,
) -> Iterator[Example]:
    """Yield the examples of a source, one row in memory at a time.

    Args:
        source: what `posttrain.data.records` reads.
        format: the rows' format; None = told by their columns.
        columns: our names of columns to the source's.
        limit: how many examples to yield at most; None = all.
        skip_bad: how many faulty rows to leave out and count; one more stops.
        report: filled while reading. Rows that teach nothing are left out and counted there in any case.

    Raises:
        DataError: a faulty row beyond ``skip_bad``, a file that can't be read, no usable row.
        ConfigError: no such source, or an option out of range.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}, expected at least 1; leave it out to read the whole file")
    if skip_bad < 0:
        raise ConfigError(f"skip_bad is {skip_bad}, expected 0 (the first fault stops) or more")
    report = ReadReport() if report is None else report
    found = _examples(source, format, columns, skip_bad, report)
    return found if limit is None else islice(found, limit)


def _examples(
    source: Any, format: str | None, columns: Mapping[str, str] | None, skip_bad: int, report: ReadReport
) -> Iterator[Example]:
    for place, row in found_rows(source):
        report.rows += 1
        try:
            if isinstance(row, DataError):
                raise row
            examples = parse_rows(row, place.file, place.row, format=format, columns=columns)
        except DataError as error:
            report.count(place, error)
            if report.faulty > skip_bad:
                raise error if skip_bad == 0 else _too_many(report, skip_bad) from error
            continue
        if not examples:
            report.count(place, UselessRow(f"{place.file} row {place.row}: no example", "no example"))
        for example in examples:
            report.examples += 1
            yield example
    if not report.examples:
        name = source if isinstance(source, (str, Path)) else type(source).__name__
        raise DataError(f"{name}: no rows" if not report.rows else f"{name}: no usable row ({report})")


def _too_many(report: ReadReport, skip_bad: int) -> DataError:
    what = f"{report.faulty} faulty rows of {report.rows} read, more than skip_bad={skip_bad}"
    return DataError(f"{what}; first: {report.bad[0]}")


def read(
    source: Any,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    skip_bad: int = 0,
    report: ReadReport | None = None,
) -> list[Example]:
    """Return the examples of a source as a list; arguments and errors are those of `stream`."""
    return list(stream(source, format=format, columns=columns, limit=limit, skip_bad=skip_bad, report=report))


def resolve_data(name: str | Path) -> dict[str, Path]:
    """Return part to path for ``default``, a directory of parts (NAME.jsonl, NAME.parquet, NAME/ ...), or one source.

    A lone source that bears none of `NAMES` holds rankings, demonstrations, prompts or labelled answers, by its first
    usable row.

    Raises:
        ConfigError: an unknown name, a directory without data, a misspelt or doubled part.
        DataError: a lone source whose first rows can't be read.
    """
    path = DEFAULT_DIR if str(name) == "default" else Path(name)
    if str(name).startswith("hf:"):
        raise ConfigError(f"a stage reads files, whose contents it remembers; got '{name}'; write it to a file first")
    if path.is_dir() and (parts := _parts(path)):
        return parts
    if path.exists():
        return {stem(path) if stem(path) in NAMES else _content(path): path}
    near = [str(p) for p in path.parent.iterdir() if kind_by_name(p)] if path.parent.is_dir() else []
    near = difflib.get_close_matches(str(path), near, n=1, cutoff=0.8)
    hint = suggest(str(name), ["default", *near])
    raise ConfigError(f"unknown data '{name}': neither a name, a directory nor a file; {hint}")


def _content(path: Path) -> str:
    """Say which part a lone source is, by its first usable row."""
    responses = next(stream(path, skip_bad=_LOOKED_AT)).responses
    if len(responses) == 1 and (responses[0].label is not None or responses[0].score is not None):
        return "labelled"  # an answer that may be bad is no demonstration
    return ("prompts", "demonstrations", "rankings")[min(len(responses), 2)]


def file_hash(path: str | Path) -> str:
    """Return the first 16 hex digits of SHA-256 over the file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()[:16]


def _parts(path: Path) -> dict[str, Path]:
    """The parts that a directory holds by name; none where it is a set of shards or a saved data set."""
    files: dict[str, Path] = {}
    doubled: list[str] = []
    for file in sorted(p for p in path.iterdir() if kind_by_name(p) or (p.is_dir() and p.name in NAMES)):
        part = stem(file)
        doubled += [f"'{path}' has both '{files[part].name}' and '{file.name}'; keep one"] if part in files else []
        files[part] = file
    if not files and not (path / "dataset_dict.json").exists():
        raise ConfigError(f"'{path}' has no data file; expected {', '.join(NAMES)} as {READABLE}")
    near = {
        part: difflib.get_close_matches(part, [n for n in NAMES if n not in files], n=1, cutoff=0.8) for part in files
    }
    for part, names in near.items():
        if names and part not in NAMES and not any(map(str.isdigit, part)):  # with digits it is a shard
            raise ConfigError(f"'{files[part]}' is none of the known names; did you mean '{names[0]}'? Rename it")
    if not files.keys() & set(NAMES):
        return {}
    if doubled:
        raise ConfigError(doubled[0])
    return files
