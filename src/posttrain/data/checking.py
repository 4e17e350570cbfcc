"""Check files of feedback: read each to its end, survey it, and compare their prompts."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from posttrain.data.chat import render
from posttrain.data.formats.fields import Place
from posttrain.data.load import ReadReport, stream
from posttrain.data.quality import FileReport, Survey, Tally, by_reason
from posttrain.errors import DataError, ModelError
from posttrain.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from posttrain.data.chat import Rendered

_HELD_OUT = {"test", "eval", "evaluation", "valid", "validation", "val", "dev", "heldout", "held"}


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Prompts (but for case and white space) in two sources; a ``leak`` if one of them is held out by its name."""

    a: str
    b: str
    prompts: int
    rows_a: int
    rows_b: int
    first_a: str
    first_b: str
    leak: bool


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What `check` found in each source, and the prompts they share."""

    files: list[FileReport]
    overlaps: list[Overlap]

    @property
    def clean(self) -> bool:
        """Whether there is no fault and no leak."""
        return all(file.clean for file in self.files) and not any(overlap.leak for overlap in self.overlaps)

    def about(self, sources: Sequence[str]) -> CheckReport:
        """Return the part that concerns some of the sources."""
        mine = [overlap for overlap in self.overlaps if overlap.a in sources or overlap.b in sources]
        return replace(self, files=[file for file in self.files if file.source in sources], overlaps=mine)

    def json(self) -> str:
        """Return the report as JSON: ``clean``, ``files``, ``overlaps``, with the fields of their classes."""
        files = [{"clean": file.clean} | asdict(file) for file in self.files]
        found = {"clean": self.clean, "files": files, "overlaps": [asdict(overlap) for overlap in self.overlaps]}
        return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def check(
    sources: Sequence[str | Path],
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    skip_bad: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> CheckReport:
    """Read every source to its end, whatever is wrong with it, and report.

    Args:
        sources: what `load.stream` reads.
        format: as in `load.stream`.
        columns: as in `load.stream`.
        skip_bad: up to so many faulty rows in a source are a note, not a fault.
        tokenizer: counts lengths in tokens, and rows that its chat template can't render as faulty ones.

    Raises:
        ConfigError: a source that isn't there or can't be recognised.
    """
    surveys, files = [], []
    for source in sources:
        found, read, stopped = Survey(str(source)), ReadReport(), ""
        try:
            for example in stream(source, format=format, columns=columns, skip_bad=sys.maxsize, report=read):
                found.add(example, _tokens(tokenizer, example, read))
        except DataError as error:
            if not read.rows or read.examples:  # else nothing but rows that are counted already
                stopped = str(error)
        bad = by_reason(read.bad)
        if read.faulty > len(read.bad):
            bad["of more kinds or the same, beyond the first listed"] = Tally(count=read.faulty - len(read.bad))
        useless = {
            reason: Tally(count=count, first=f"{read.first[reason].file} row {read.first[reason].row}")
            for reason, count in read.useless.most_common()
        }
        surveys.append(found)
        files.append(found.report(rows=read.rows, bad=bad, useless=useless, allowed=skip_bad, stopped=stopped))
    return CheckReport(files=files, overlaps=overlaps(surveys))


def _tokens(tokenizer: PreTrainedTokenizerBase | None, example: Example, read: ReadReport) -> int | None:
    """The example's rendered length; one that can't be rendered is counted as a faulty row."""
    if tokenizer is None:
        return None
    try:
        return max(len(row.ids) for row in rendered(tokenizer, example))
    except (DataError, ModelError) as error:
        fault = DataError.at(example.file, example.row, "chat template", str(error), "")
        read.count(Place(example.file, example.row), fault)
        return None


def rendered(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[Rendered]:
    """Return the example as training reads it: the prompt with each of its responses; the prompt alone if it has none.

    Raises:
        DataError: as `chat.render`.
        ModelError: as `chat.render`.
    """
    history = [replace(m, train=m.train is True) for m in example.prompt]
    if not example.responses:
        return [render(tokenizer, history, tools=example.tools, generation_prompt=True)]
    return [render(tokenizer, [*history, *r.messages], tools=example.tools) for r in example.responses]


def overlaps(surveys: Sequence[Survey]) -> list[Overlap]:
    """Return which sources share prompts.

    A source is held out if its name has a word such as test, eval, valid, dev or heldout.
    """
    distinct = [s.prompts.distinct() for s in surveys]
    found = []
    for i, j in combinations(range(len(surveys)), 2):
        shared, at_a, at_b = np.intersect1d(distinct[i][0], distinct[j][0], assume_unique=True, return_indices=True)
        if not len(shared):
            continue
        a, b = surveys[i], surveys[j]
        first = int(np.argmin(distinct[i][1][at_a]))
        overlap = Overlap(
            a=a.source,
            b=b.source,
            prompts=len(shared),
            rows_a=int(distinct[i][2][at_a].sum()),
            rows_b=int(distinct[j][2][at_b].sum()),
            first_a=a.place(int(distinct[i][1][at_a[first]])),
            first_b=b.place(int(distinct[j][1][at_b[first]])),
            leak=held_out(a.source) != held_out(b.source),
        )
        found.append(overlap)
    return found


def held_out(source: str) -> bool:
    """Whether a source's name says that it is kept for evaluation."""
    return not _HELD_OUT.isdisjoint(re.split(r"[^a-z]+", Path(source).name.lower()))
