"""The closing tables and the answers side by side, drawn for a terminal of 100 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

from posttrain.evals.grids import (
    SAMPLES_NOTE,
    WORST_NOTE,
    Grid,
    clean_text,
    clip_text,
    closing_grids,
    row_heading,
    score_line,
)

_SHOWN = 480  # characters of an answer in a terminal; the page shows all


def closing_tables(results: Mapping[str, Any]) -> list[RenderableType]:
    """Draw the closing tables: reward models, policies, differences, samples side by side, machine."""
    drawn: list[RenderableType] = [rich_grid(grid) for grid in closing_grids(results)]
    if results.get("samples"):
        drawn.append(Text(f"Before and after: {SAMPLES_NOTE}", style="dim"))
        drawn += answer_tables("Before and after", results["samples"])
    return [*drawn, Text(f"Measured on {clean_text(str(results['machine']['line']))}", style="dim")]


def worst_tables(results: Mapping[str, Any]) -> list[RenderableType]:
    """Draw the prompts that training made worse; none if there are none."""
    if not results.get("worst"):
        return []
    note = Text(f"Made worse by training: {WORST_NOTE}", style="dim")
    return [note, *answer_tables("Made worse by training", results["worst"])]


def rich_grid(grid: Grid) -> RenderableType:
    """Draw a grid; cells are plain text, never markup."""
    title = Text(grid.title, style="bold")  # above, as a table's own title wraps at the table's width
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(grid.header):
        justify: JustifyMethod = "left" if i in grid.left else "right"
        table.add_column(Text(clean_text(name)), justify=justify, vertical="top", overflow="fold")
    for row in grid.rows:
        table.add_row(*(Text(clean_text(cell)) for cell in row))
    return Group(title, table, *(Text(note, style="dim") for note in grid.notes), Text())


def answer_tables(title: str, rows: Sequence[Mapping[str, Any]]) -> list[RenderableType]:
    """Draw one table a prompt, a column a policy; a long answer is cut, and says by how much."""
    tables: list[RenderableType] = []
    for i, row in enumerate(rows, 1):
        heading = Text(f"{title}, {i} of {len(rows)}", style="bold")
        if row_heading(row):
            heading.append(f" ({row_heading(row)})", style="not bold")
        prompt = Text(clip_text(clean_text(row["prompt"]), 2 * _SHOWN), style="italic")
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
        for policy in row["answers"]:
            table.add_column(Text(policy), ratio=1, overflow="fold")
        answers = row["answers"].values()
        table.add_row(*(Text(clip_text(clean_text(a["text"]), _SHOWN)) for a in answers), end_section=True)
        table.add_row(*(Text(score_line(a), style="dim") for a in answers))
        tables.append(Group(heading, prompt, table))
    return tables
