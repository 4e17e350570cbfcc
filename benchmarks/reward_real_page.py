"""What was measured of reward models on public data, as a section of ``docs/results/reward-models.md`` (`benchmarks.reward_page`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import kept

from posttrain.evals.grids import Grid, bounds
from posttrain.evals.reward_page import reward_model_grids
from posttrain.evals.reward_plots import accuracy_png, calibration_png, styles_png

IMAGES = Path(__file__).parents[1] / "docs" / "images"
HEADING = """## SmolLM2 on public data

    POSTTRAIN_REAL_DATA=FOLDER python -m benchmarks.reward_real --out DIR
"""


def sections(rows: list[dict[str, Any]]) -> list[str]:
    """The newest run, table by table, with its pictures."""
    if not rows:
        return []
    row = rows[-1]
    lines = [
        HEADING,
        about(row) + "\n",
        *markdown(cost_grid(row["commands"])),
    ]
    grids = reward_model_grids(row["results"])
    lines += [*markdown(grids[0]), *markdown(difference_grid(row["differences"]))]
    for grid in grids[1:]:
        lines += markdown(grid)
    models = row["results"]["models"]
    IMAGES.mkdir(exist_ok=True)
    for name, png in (
        ("accuracy", accuracy_png(models)),
        ("calibration", calibration_png(models)),
        ("styles", styles_png(models)),
    ):
        if png:
            (IMAGES / f"reward-real-{name}.png").write_bytes(png)
            lines += [f"![{name}](../images/reward-real-{name}.png)", ""]
    return lines


def about(row: dict[str, Any]) -> str:
    """Where it ran, and on how many rows each model was trained."""
    n, sizes = row["counts"], row["sizes"]
    hh, ultra = n["hh train"], n["ultrafeedback train"]
    return (
        f"{kept.origin(row)}. Adapters of rank 16, one epoch, seed {row['seed']}. Bradley-Terry and pairwise learn from the same "
        f"{hh + ultra} pairs ({hh} of hh-rlhf, {ultra} of UltraFeedback); the attribute model from both answers of the latter and "
        f"{n['prometheus train']} answers rated by Prometheus, each an attribute from 0 to 4. Answers of at most {sizes['longest']} "
        f"tokens with their prompt, {sizes['longest_rated']} in RM-Bench and Prometheus."
    )


def cost_grid(commands: dict[str, dict[str, Any]]) -> Grid:
    """Time and memory of each command."""
    rows = tuple(
        (f"posttrain {name}", f"{e['seconds']:.0f}", f"{e['cpu_seconds']:.0f}", f"{e['peak_mb'] / 1e3:.1f}")
        for name, e in commands.items()
    )
    note = (
        "each in a process of its own; the attribute and pairwise models score fewer rows, which the next table counts"
    )
    return Grid(
        title="Time and memory",
        header=("command", "seconds", "processor's seconds", "peak GB"),
        rows=rows,
        notes=(note,),
    )


def difference_grid(differences: list[dict[str, Any]]) -> Grid:
    """Bradley-Terry less each other, on the rows that both read."""
    told = lambda e: "better" if e["low"] > 0 else "worse" if e["high"] < 0 else "not shown at this scale"  # noqa: E731
    rows = tuple(
        (
            e["against"],
            e["subset"],
            str(e["n"]),
            f"{100 * e['mean']:+.1f} {bounds({k: 100 * e[k] for k in ('low', 'high')}, 1)}",
            told(e),
        )
        for e in differences
    )
    title = "Bradley-Terry less the others, in points, on the same pairs"
    return Grid(
        title=title,
        header=("against", "subset", "rankings", "difference", "Bradley-Terry is"),
        rows=rows,
        left=(0, 1, 4),
    )


def markdown(grid: Grid) -> list[str]:
    """A grid as Markdown."""
    flat = lambda cell: cell.replace("\n", " ").replace("|", "\\|")  # noqa: E731
    lines = [f"**{grid.title}**\n", "| " + " | ".join(map(flat, grid.header)) + " |", "|" + "---|" * len(grid.header)]
    lines += ["| " + " | ".join(map(flat, row)) + " |" for row in grid.rows]
    return [*lines, "", *(f"{note}\n" for note in grid.notes)]
