"""What a person sees while something trains: one bar with the numbers that matter, and the step-0 table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from posttrain.train.terms import Check

SHOWN = {
    "loss/nll": "nll {:.3f}",
    "loss/ranking": "loss {:.3f}",
    "loss/preference": "loss {:.3f}",
    "accuracy/pairs": "pairs {:.0%}",
    "reward/margin": "margin {:+.3f}",
    "reward/mean": "reward {:+.2f}",
    "kl/mean": "kl {:.2f}",
    "length/mean": "len {:.0f}",
    "truncated/share": "cut {:.0%}",
    "speed/tokens": "{:.0f} tok/s",
    "memory/peak": "{:.1f} GB",
}


@contextmanager
def progress(console: Console, title: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
    """A bar; the yielded function takes how many are done and a line of numbers."""
    columns = [
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=18),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=console, refresh_per_second=4) as display:
        task = display.add_task(title, total=total, completed=done, numbers="")
        yield lambda count, numbers="": display.update(task, completed=count, numbers=numbers)


@contextmanager
def bar(console: Console, title: str, start: int, total: int) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """A training bar; the yielded function advances it by a step with that step's metrics."""
    with progress(console, title, total, start) as update:
        done = start

        def advance(metrics: Mapping[str, float]) -> None:
            nonlocal done
            done += 1
            scaled = {k: v / 1e9 if k == "memory/peak" else v for k, v in metrics.items()}
            update(done, " ".join(form.format(scaled[key]) for key, form in SHOWN.items() if key in scaled))

        yield advance


def check_table(title: str, checks: Sequence[Check]) -> Table:
    """The step-0 table: what was found, what was expected, and whether they agree."""
    table = Table(title=f"{title}: before the first update", title_justify="left", box=None, pad_edge=False)
    for column in ("check", "found", "expected", ""):
        table.add_column(column)
    marks = {True: "[green]ok[/]", False: "[red]FAILED[/]", None: ""}
    for c in checks:
        table.add_row(c.name, c.value, c.expected, marks[c.ok])
    return table
