"""The table of formats, and telling by a row's columns which one it is in."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from posttrain.data.formats.fields import COMMON, Place, Row, doubled
from posttrain.errors import ConfigError, DataError, suggest
from posttrain.types import Example

Parse = Callable[[Row, Place], list[Example]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """One way to write feedback.

    Attributes:
        name: what ``--format`` calls it.
        summary: what a row becomes, in a line.
        needs: columns that have to be there.
        used: all columns that it reads; what else a row has goes to ``Example.meta``.
        parse: makes examples of a row.
        example: a row in this format.
        looks: whether the values of a row with these columns look right, where columns alone don't tell.
        asked: read only when asked for by name.
    """

    name: str
    summary: str
    needs: frozenset[str]
    used: frozenset[str]
    parse: Parse
    example: Row
    looks: Callable[[Row], bool] | None = None
    asked: bool = False


FORMATS: dict[str, Format] = {}
"""Name -> format, in the order of the documentation."""

_ANSWERS = ("messages", "chosen", "completions", "completion", "rejected", "failures")
_COLUMNS = frozenset({"prompt", "reason", *COMMON, *_ANSWERS})
# What other tools call our columns; only looked at in rows that otherwise hold no answer.
_FOREIGN = {
    "response": "completion",
    "output": "completion",
    "responses": "completions",
    "conversation": "messages",
    "instruction": "prompt",
    "question": "prompt",
    "query": "prompt",
}
_USUAL = (
    '{"prompt","completion"}, {"prompt","chosen","rejected"}, {"prompt","completions"}, {"messages"}, '
    '{"prompt"} or {"chosen","rejected"} (whole transcripts)'
)
# Rows that are no examples: their columns, what they are, and what reads them.
_ELSEWHERE = (
    ({"prompt_template", "output_format"}, "judge templates", "posttrain.data.judging.read_judge_templates"),
    ({"question_id", "choices"}, "a model's answers to questions", "posttrain.data.judging.join_references"),
    ({"idx", "gpt_result"}, "a judge's verdicts", "posttrain.data.judging.join_verdicts"),
    ({"message_id", "parent_id", "role"}, "single messages of trees", "whole trees, one a row (OASST's 'trees' files)"),
)


def in_format(
    name: str,
    needs: Sequence[str],
    *,
    example: Row,
    reads: Sequence[str] = (),
    looks: Callable[[Row], bool] | None = None,
    asked: bool = False,
) -> Callable[[Parse], Parse]:
    """Enter a parser into the table; its docstring's first line says what a row becomes. ``reads``: optional columns."""

    def enter(parse: Parse) -> Parse:
        if name in FORMATS:
            raise ValueError(f"format '{name}' is entered twice")
        FORMATS[name] = Format(
            name=name,
            summary=(parse.__doc__ or "").partition("\n")[0],
            needs=frozenset(needs),
            used=frozenset({*needs, *reads, *COMMON}),
            parse=parse,
            example=example,
            looks=looks,
            asked=asked,
        )
        return parse

    return enter


def named(name: str) -> Format:
    """Return the format of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in FORMATS:
        raise ConfigError(f"unknown format '{name}'; {suggest(name, FORMATS)}")
    return FORMATS[name]


def renamed(row: Row, columns: Mapping[str, str], place: Place) -> dict[str, Any]:
    """Return the row with its columns called as here; ``columns`` says what ours are called in the file.

    Raises:
        ConfigError: a name on our side that no format reads.
        DataError: a column that the row doesn't have, or one that has our name already.
    """
    known = _known()
    theirs = {v: k for k, v in columns.items()}
    if twice := doubled(columns.values()):
        raise ConfigError(f"the column '{twice[0]}' is mapped to two of ours; map it to one")
    for ours, name in columns.items():
        if ours not in known:
            raise ConfigError(f"no format reads a column '{ours}' (mapped from '{name}'); {suggest(ours, known)}")
        if name not in row:
            raise place.fault(name, f"no such column, it was to be read as '{ours}'", suggest(name, row))
        if ours in row and ours not in theirs:
            raise place.fault(name, f"is to be read as '{ours}', which is another column", "map or remove that one")
    return {theirs.get(key, key): value for key, value in row.items()}


@lru_cache(maxsize=1)
def _known() -> frozenset[str]:
    """All columns that some format reads."""
    return frozenset[str]().union(*(f.used for f in FORMATS.values()))


def recognise(row: Row, place: Place) -> Format:
    """Return the format that a row is in.

    Of formats whose columns are all there, one goes before those that need fewer columns, all of which it reads too.

    Raises:
        DataError: the columns fit no format or several, or look misspelt.
    """
    columns = tuple(row)
    choices, sure = _choices(columns)
    if not sure:
        choices = _most_specific([f for f in choices if f.looks is None or f.looks(row)])
    if len(choices) != 1:
        raise _several(columns, choices, place) if choices else _none(columns, place)
    if problem := _suspect(columns, choices[0].name):
        raise place.fault(*problem)
    if isinstance(row.get("label"), bool) and "label" not in choices[0].used and choices[0].name != "prompt":
        # A bad answer must not be read as one to imitate because its label is called something that we don't read.
        problem = f"true or false, which format '{choices[0].name}' doesn't read: is this a good or a bad answer?"
        raise place.fault("label", problem, "give 'prompt', 'completion' and 'label', or name the format with --format")
    return choices[0]


@lru_cache(maxsize=512)
def _choices(columns: tuple[str, ...]) -> tuple[Sequence[Format], bool]:
    """Formats whose columns are all there, and whether columns alone decide."""
    have = frozenset(columns)
    found = [f for f in FORMATS.values() if f.needs <= have and not f.asked]
    if any(f.looks for f in found):
        return found, False
    return _most_specific(found), True


def _most_specific(found: Sequence[Format]) -> Sequence[Format]:
    def below(f: Format, other: Format) -> bool:
        weaker = (len(f.needs), f.looks is not None) < (len(other.needs), other.looks is not None)
        return weaker and f.needs <= other.used

    return [f for f in found if not any(below(f, other) for other in found)]


@lru_cache(maxsize=512)
def _suspect(columns: tuple[str, ...], name: str) -> tuple[str, str, str] | None:
    """The fault of columns that fit a format, but hold more answers than it reads or look misspelt; None = fine."""
    bare, chosen = name == "prompt", FORMATS[name]
    misspelt = _misspelt(columns, _COLUMNS if bare else chosen.used | {"reason"}, bare, chosen.used)
    if misspelt:
        column, problem, remedy = misspelt
        return column, problem, _near(set(columns)) + remedy if bare else remedy
    unread = [column for column in _ANSWERS if column in columns and column not in chosen.used]
    if "failures" in unread:
        return "failures", "stands without 'completions'", "it labels its entries; add 'completions' or remove it"
    if not unread:
        return None
    missing = {"chosen": "rejected", "rejected": "chosen"}.get(unread[0], "prompt")
    return missing, f"missing column (found {_named(columns)})", f"expected {_USUAL}"


def _misspelt(
    columns: Sequence[str], known: frozenset[str], foreign: bool, used: frozenset[str] = frozenset()
) -> tuple[str, str, str] | None:
    for column in sorted(set(columns) - _COLUMNS - used):
        near = difflib.get_close_matches(column, sorted(known - set(columns)), n=1, cutoff=0.8)
        near = near or ([_FOREIGN[column]] if foreign and column in _FOREIGN else [])
        if near and near[0] not in columns:
            return column, f"unknown column; did you mean '{near[0]}'?", "rename it, or name an extra column otherwise"
    return None


def _named(columns: Iterable[str]) -> str:
    names = list(columns)
    return ", ".join(f"'{c[:40]}'" for c in names[:20]) + (", ..." if len(names) > 20 else "") or "none"


def _several(columns: tuple[str, ...], choices: Sequence[Format], place: Place) -> DataError:
    field = next((c for c in _ANSWERS if c in columns), columns[0])
    names = " and ".join(f"'{f.name}'" for f in choices)
    remedy = f"keep those of one of {names}, or name one with --format"
    return place.fault(field, f"columns {_named(columns)} fit several formats", remedy)


def _none(columns: tuple[str, ...], place: Place) -> DataError:
    """The fault of columns that fit no format: rows that aren't examples, misspelt, another content, nearly there."""
    have = set(columns)
    for needs, what, reader in _ELSEWHERE:
        if needs <= have:
            return place.fault(min(needs), f"these rows are {what}, not examples", f"see {reader}")
    unlike, _ = _choices(columns)
    if unlike:
        names = " and ".join(f"'{f.name}'" for f in unlike)
        problem = f"columns {_named(columns)} are those of {names}, but not what stands in them"
        return place.fault(min(unlike[0].needs), problem, "name the format with --format, or columns with --map")
    answers = [c for c in _ANSWERS if c in have]
    if misspelt := _misspelt(columns, _COLUMNS, not answers):
        return place.fault(*misspelt)
    if answers and answers[0] != "messages":
        wanted = next(c for c in ("rejected", "chosen", "prompt") if c not in have)
        wanted = wanted if {"chosen", "rejected"} & have else "prompt"
        return place.fault(wanted, f"missing column (found {_named(columns)})", f"expected {_USUAL}")
    return place.fault("prompt", f"columns {_named(columns)} fit no format", _nearest(have))


def _nearest(have: set[str]) -> str:
    """What to do about columns that fit no format."""
    return f"{_near(have)}expected {_USUAL}, or name the columns with --map"


def _near(have: set[str]) -> str:
    """The format of more than two columns that lacks the fewest, with what it lacks; '' if it lacks half or more."""
    wide = [f for f in FORMATS.values() if len(f.needs) > 2 and not f.needs <= have]
    best = max(wide, key=lambda f: (len(f.needs & have) / len(f.needs), len(f.needs)))
    if len(best.needs & have) * 2 <= len(best.needs):
        return ""
    return f"nearest is '{best.name}', which also needs {_named(sorted(best.needs - have))}; "
