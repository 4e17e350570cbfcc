"""One row of feedback, in any of the formats people have, as `Example` records.

Each family of formats is a module that enters its parsers into `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The order is that of the documentation's table.
from posttrain.data.formats import example, basic, demonstrations, pairs, kwise, trees, judged, verifiable, prompts  # isort: skip # noqa: F401
from posttrain.data.formats.fields import Place, kind_of
from posttrain.data.formats.table import FORMATS, Format, named, recognise, renamed
from posttrain.data.formats.turns import ROLES
from posttrain.types import Example

__all__ = ["FORMATS", "ROLES", "Format", "Place", "kind_of", "parse_row", "parse_rows"]


def parse_rows(
    row: Mapping[str, Any],
    file: str = "row",
    number: int = 1,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[Example]:
    """Turn one row into its examples: one for most formats, several for trees and tasks with many instances.

    Args:
        row: column -> value.
        file: where the row came from, for messages and for ``Example.file``.
        number: its number there, from 1.
        format: a name in `FORMATS`; None = told by the columns.
        columns: what columns of ours are called in this row: {"prompt": "question"}.

    Raises:
        DataError: a missing, misspelt, mistyped or contradictory column.
        UselessRow: a well-formed row that teaches nothing, such as a pair of identical answers.
        ConfigError: an unknown format, or a mapped column that no format reads.
    """
    place = Place(file, number)
    if columns:
        place = Place(file, number, columns)
        row = renamed(row, columns, place)
    if format is None:
        chosen = recognise(row, place)
    else:
        chosen = named(format)
        for column in sorted(chosen.needs - row.keys()):
            found = ", ".join(f"'{c[:40]}'" for c in list(row)[:20]) or "none"
            remedy = f"format '{format}' needs it; name what it is called here with --map, or another format"
            raise place.fault(column, f"missing column (found {found})", remedy)
    return chosen.parse(row, Place(file, number, place.names, chosen.used))


def parse_row(row: Mapping[str, Any], file: str = "row", number: int = 1) -> Example:
    """Turn a row that makes one example into it; arguments and errors as `parse_rows`.

    Raises:
        DataError: as `parse_rows`, or a row that makes several examples.
    """
    examples = parse_rows(row, file, number)
    if len(examples) != 1:
        raise Place(file, number).fault("(row)", f"makes {len(examples)} examples, expected one", "use parse_rows")
    return examples[0]
