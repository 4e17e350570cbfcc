"""What is wrong or odd in feedback data: counts, lengths, duplicates, contradictions.

One pass, with hashes instead of texts in memory: about 100 bytes a row.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from posttrain.data.mixing import keyed, normal_prompt, normal_text
from posttrain.data.tally import Compared, Found, Lengths, Log, Pair, PairLengths, compared_pairs, lengths
from posttrain.types import Example, Message, Response

_QUOTED = re.compile(r"(?<!\w)'[^']*'|\"[^\"]*\"")  # not the apostrophe of "isn't"

KINDS, OTHER_KINDS = 1000, "(others)"
"""So many kinds are counted one by one, the first to come."""

BIASED, ENOUGH = 0.1, 100
"""A share of pairs this far from one half, over at least so many pairs, is worth a note."""


@dataclass(frozen=True, kw_only=True)
class Tally:
    """How often something was found, and where first (with the ``other`` place it concerns, if it has one)."""

    count: int
    first: str = ""
    other: str = ""


@dataclass(frozen=True, kw_only=True)
class Labels:
    """How many answers are labelled good and bad, and their mean words (None without any)."""

    good: int
    bad: int
    words_good: float | None
    words_bad: float | None


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing to know; a ``fault`` makes the verdict, a ``note`` doesn't."""

    level: Literal["fault", "note"]
    text: str
    count: int
    first: str = ""


@dataclass(frozen=True, kw_only=True)
class FileReport:
    """Everything found in one source; made by `Survey.report`, JSON by `dataclasses.asdict`.

    Attributes:
        source: its name.
        rows: rows read, blank lines not counted.
        examples: what the rows became.
        bad: faulty rows by reason.
        useless: rows that teach nothing, by reason.
        shapes: what the examples are (pairs, demonstrations ...), with counts.
        kinds: the rows' own column ``kind``, with counts.
        words: of prompts and of responses.
        turns: of a prompt with its longest response.
        tokens: of a prompt with its longest response, as rendered; None without a tokenizer.
        compared: length of better against worse answers; None where nothing is ordered.
        labels: None where nothing is labelled.
        duplicates: rows beyond the first, by what of it they repeat.
        contradictions: the same two answers ordered both ways, the same answer labelled both ways.
        findings: what of this is worth saying, faults first.
    """

    source: str
    rows: int
    examples: int
    bad: dict[str, Tally]
    useless: dict[str, Tally]
    shapes: dict[str, int]
    kinds: dict[str, int]
    words: dict[str, Lengths]
    turns: Lengths | None
    tokens: Lengths | None
    compared: Compared | None
    labels: Labels | None
    duplicates: dict[str, Tally]
    contradictions: dict[str, Tally]
    findings: list[Finding]

    @property
    def clean(self) -> bool:
        """Whether there is no fault."""
        return all(finding.level != "fault" for finding in self.findings)


def survey(examples: Iterable[Example], source: str = "examples") -> FileReport:
    """Return the report on examples, read once; `Survey` takes them one by one."""
    found = Survey(source)
    for example in examples:
        found.add(example)
    return found.report()


def shape(example: Example) -> str:
    """Say what an example is, by the feedback its responses have."""
    responses = example.responses
    if example.preferences:
        return "comparisons"
    if responses and all(r.rank is not None for r in responses):
        return "pairs" if len(responses) == 2 else f"rankings of {len(responses)}"
    if any(r.steps for r in responses):
        return "labelled steps"
    if any(r.label is not None for r in responses):
        return "labelled answers"
    if any(r.score is not None or r.attributes for r in responses):
        return "rated answers"
    if example.target is not None:
        return "verifiable prompts"
    return {0: "prompts", 1: "demonstrations"}.get(len(responses), "answers without feedback")


# ---------------------------------------------------------------------------- one source


class Survey:
    """Collects what a `FileReport` says, one example at a time.

    Args:
        source: its name, for the report.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.examples = 0
        self.prompts = Log()
        self._prompts, self._rows, self._normal_rows = Log(), Log(), Log()
        self._orders, self._verdicts = Log(), Log()
        self._files: dict[str, int] = {}
        self._file, self._row = array("I"), array("Q")
        self._shapes, self._kinds = Counter[str](), Counter[str]()
        self._prompt_words, self._response_words = Counter[int](), Counter[int]()
        self._turns, self._tokens = Counter[int](), Counter[int]()
        self._lengths = PairLengths()
        self._labels, self._label_words = Counter[bool](), Counter[bool]()
        self._scores, self._scored = set[float](), 0  # of different scores, two are enough to know
        self._tied = self._unlabelled = Found(0)

    def add(self, example: Example, tokens: int | None = None) -> None:
        """Count one example; ``tokens`` is its rendered length, if known."""
        self._file.append(self._files.setdefault(example.file, len(self._files)))
        self._row.append(example.row)
        self._shapes[shape(example)] += 1
        if example.kind:
            known = example.kind in self._kinds or len(self._kinds) < KINDS
            self._kinds[example.kind if known else OTHER_KINDS] += 1
        words = [len(r.text.split()) for r in example.responses]
        self._prompt_words[sum(len(m.content.split()) for m in example.prompt)] += 1
        self._response_words.update(words)
        self._turns[len(example.prompt) + max((len(r.messages) for r in example.responses), default=0)] += 1
        if tokens is not None:
            self._tokens[tokens] += 1
        pairs = list(compared_pairs(example))
        self._lengths.add(words, pairs)
        self._remember(example, pairs)
        self._judge(example, words, pairs)
        self.examples += 1

    def place(self, number: int) -> str:
        """Say where an example (from 0) came from: ``FILE row R``; one made in memory is counted from 0."""
        file = list(self._files)[self._file[number]]
        return f"{file} row {self._row[number]}" if file else f"example {number} (from 0)"

    def _remember(self, example: Example, pairs: Sequence[Pair]) -> None:
        """Log the hashes that show duplicates and contradictions."""
        number, prompt, normal = self.examples, _text(example.prompt), normal_prompt(example)
        answers = [_text(r.messages) for r in example.responses]
        rest = [f"{r.rank} {r.score} {r.label} {r.attributes} {r.steps}" for r in example.responses]
        rest.append(f"{example.preferences}{example.target}{example.tools}")
        self.prompts.add(keyed(normal), number)
        self._prompts.add(keyed(prompt), number)
        self._rows.add(keyed(prompt, *answers, *rest), number)
        self._normal_rows.add(keyed(normal, *map(normal_text, answers), *rest), number)
        for pair in pairs:
            one, two = answers[pair.better], answers[pair.worse]
            if not pair.tied and one != two:
                key = keyed(normal, pair.axis, min(one, two), max(one, two))
                self._orders.add(key & ~1 | (one < two), number)
        for answer, response in zip(answers, example.responses, strict=True):
            if response.label is not None:
                self._verdicts.add(keyed(normal, answer) & ~1 | response.label, number)

    def _judge(self, example: Example, words: Sequence[int], pairs: Sequence[Pair]) -> None:
        """Count labels, scores and ties."""
        for response, length in zip(example.responses, words, strict=True):
            if response.label is not None:
                self._labels[response.label] += 1
                self._label_words[response.label] += length
            elif not _judged(response):
                self._unlabelled = _one_more(self._unlabelled, self.examples)
            if response.score is not None:
                self._scored += 1
                if len(self._scores) < 2:
                    self._scores.add(response.score)
        if pairs and all(pair.tied for pair in pairs):
            self._tied = _one_more(self._tied, self.examples)

    def report(
        self,
        *,
        rows: int | None = None,
        bad: dict[str, Tally] | None = None,
        useless: dict[str, Tally] | None = None,
        allowed: int = 0,
        stopped: str = "",
    ) -> FileReport:
        """Return the report.

        Args:
            rows: rows read; the examples if None.
            bad: faulty rows by reason.
            useless: rows that teach nothing, by reason.
            allowed: up to so many faulty rows are a note, not a fault.
            stopped: why the source could not be read to its end.
        """
        duplicates = {
            "row, exactly": self._tally(self._rows.repeats()),
            "row, but for case and white space": self._tally(self._normal_rows.repeats()),
            "prompt, exactly": self._tally(self._prompts.repeats()),
            "prompt, but for case and white space": self._tally(self.prompts.repeats()),
        }
        contradictions = {
            "the same two answers are ordered both ways": self._tally(self._orders.both_ways()),
            "the same answer is labelled both ways": self._tally(self._verdicts.both_ways()),
        }
        compared = self._lengths.result()
        findings = [
            *([Finding(level="fault", text=f"reading stopped: {stopped}", count=1)] if stopped else []),
            *_row_findings(bad or {}, useless or {}, allowed),
            *self._faults(contradictions),
            *self._notes(duplicates, compared),
        ]
        counted = {"prompt": self._prompt_words, "response": self._response_words}
        return FileReport(
            source=self.source,
            rows=self.examples if rows is None else rows,
            examples=self.examples,
            bad=bad or {},
            useless=useless or {},
            shapes=dict(self._shapes.most_common()),
            kinds=dict(self._kinds.most_common()),
            words={name: found for name, counts in counted.items() if (found := lengths(counts))},
            turns=lengths(self._turns),
            tokens=lengths(self._tokens),
            compared=compared,
            labels=self._label_result(),
            duplicates=duplicates,
            contradictions=contradictions,
            findings=sorted(findings, key=lambda finding: finding.level),
        )

    def _tally(self, found: Found) -> Tally:
        if not found.count:
            return Tally(count=0)
        return Tally(count=found.count, first=self.place(found.first), other=self.place(found.second))

    def _label_result(self) -> Labels | None:
        good, bad = self._labels[True], self._labels[False]
        if not good + bad:
            return None
        words = [self._label_words[label] / n if n else None for label, n in ((True, good), (False, bad))]
        return Labels(good=good, bad=bad, words_good=words[0], words_bad=words[1])

    def _faults(self, contradictions: dict[str, Tally]) -> Iterator[Finding]:
        if not self.examples:
            yield Finding(level="fault", text="no row became an example", count=0)
        good, bad = self._labels[True], self._labels[False]
        if good + bad and not (good and bad):
            text = f"every label is {'true' if good else 'false'}: one class alone can't be learnt from"
            yield Finding(level="fault", text=text, count=good + bad)
        if good + bad:
            yield from self._first("answers without a label among labelled ones", self._unlabelled)
        if self._scored > 1 and len(self._scores) == 1:
            yield Finding(level="fault", text="every score is the same: they order nothing", count=self._scored)
        yield from self._first("rows whose answers are all tied", self._tied)
        for text, tally in contradictions.items():
            if tally.count:
                both = f"{tally.first} and {tally.other}"
                yield Finding(level="fault", text=f"contradictions: {text}", count=tally.count, first=both)

    def _first(self, text: str, found: Found) -> Iterator[Finding]:
        """A fault, if anything was found."""
        if found.count:
            yield Finding(level="fault", text=text, count=found.count, first=self.place(found.first))

    def _notes(self, duplicates: dict[str, Tally], compared: Compared | None) -> Iterator[Finding]:
        twice, exact = duplicates["row, but for case and white space"], duplicates["row, exactly"].count
        if twice.count:
            text = f"rows that repeat an earlier one, {exact} of them exactly"
            yield Finding(level="note", text=text, count=twice.count, first=f"{twice.other} repeats {twice.first}")
        if compared and compared.pairs >= ENOUGH and abs(compared.longer_better - 0.5) > BIASED:
            longer = compared.longer_better > 0.5
            share = compared.longer_better if longer else 1 - compared.longer_better
            text = f"pairs; in {share:.0%} of them the better answer is the {'longer' if longer else 'shorter'} one"
            yield Finding(level="note", text=text, count=compared.pairs)
        if len(self._shapes) > 1:
            text = f"shapes of rows in one source: {', '.join(self._shapes)}"
            yield Finding(level="note", text=text, count=len(self._shapes))


def _text(messages: Iterable[Message]) -> str:
    return "\x1e".join(f"{m.role}\x1f{m.content}{m.tool_calls or ''}" for m in messages)


def _one_more(found: Found, example: int) -> Found:
    return Found(found.count + 1, found.first if found.count else example)


def _judged(response: Response) -> bool:
    return response.rank is not None or response.score is not None or bool(response.steps)


# ---------------------------------------------------------------------------- faulty rows


def by_reason(errors: Iterable[str]) -> dict[str, Tally]:
    """Count the standard errors ``FILE row R, field 'F': PROBLEM; REMEDY`` by field and problem.

    What differs from row to row in them is left out: numbers and what is quoted.
    """
    found: dict[str, Tally] = {}
    for error in errors:
        place, comma, rest = error.partition(", field ")
        text = rest.rpartition("; ")[0] or rest if comma else error
        text = re.sub(r"\d+", "N", re.sub(r"(?<=: )(.*)", lambda m: _QUOTED.sub("'...'", m[1]), text, count=1))
        seen = found.get(text, Tally(count=0, first=place if comma else ""))
        found[text] = Tally(count=seen.count + 1, first=seen.first)
    return dict(sorted(found.items(), key=lambda item: -item[1].count))


def _row_findings(bad: dict[str, Tally], useless: dict[str, Tally], allowed: int) -> Iterator[Finding]:
    total = sum(tally.count for tally in bad.values())
    for text, tally in bad.items():
        level = "fault" if total > allowed else "note"
        yield Finding(level=level, text=f"faulty rows: {text}", count=tally.count, first=tally.first)
    for text, tally in useless.items():
        yield Finding(level="fault", text=f"rows that teach nothing: {text}", count=tally.count, first=tally.first)
