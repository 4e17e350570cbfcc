"""Preference losses side by side, on the terminal, as a picture and as a page, from what ``sweep.json`` of a comparison holds."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from posttrain.evals import page
from posttrain.evals.grids import Grid
from posttrain.evals.statistics import Interval, paired_test
from posttrain.evals.sweep_view import sweep_grid

COLUMNS = {
    "accuracy": "accuracy",
    "margin": "margin\n(nats)",
    "chosen": "chosen\n(nats, change)",
    "kl": "KL (nats\nan answer)",
    "length": "length\n(tokens)",
}
"""Numbers of the policy in the order of the table; ``chosen`` is the change of its log-probability from the start's."""

FEWEST = 3
"""Seeds below which nothing is said of the spread over seeds."""

_COLOUR, _SEED = "#1f6feb", "#aab4be"


def by_seed(point: Mapping[str, Any], column: str) -> list[float]:
    """A point's values of a column, of the seeds that finished."""
    numbers = {key.partition("/")[2]: values for key, values in point["numbers"].items() if ":" not in key}
    trained, start = (numbers.get(f"{who}/{column}", []) for who in ("trained", "start"))
    if column != "chosen":
        return [x for x in trained if x is not None]
    return [x - y for x, y in zip(trained, start, strict=True) if x is not None and y is not None]


def over_seeds(values: Sequence[float]) -> Interval:
    """The mean with its interval over seeds, widened for their number; without bounds below three seeds."""
    mean = float(np.mean(values))
    if len(values) < FEWEST:
        return Interval(mean, -math.inf, math.inf, len(values))
    return paired_test(values, np.zeros(len(values)))[0]


def compare_grid(found: Mapping[str, Any]) -> Grid:
    """Lay a comparison out: a line a loss, with what it compares, each number's mean and interval, and seconds of training."""
    rows = []
    for point in found["points"]:
        about = found["objectives"][point["name"]]
        cells = [_cell(by_seed(point, column), interval=column != "length") for column in COLUMNS]
        cells.insert(1, _cell(by_seed(point, about["accuracy"]), interval=False))
        label = f"{point['options']['loss']}\n{about['targets']}"
        rows.append((label, *cells, _cell([s for s in about["seconds"] if s is not None], interval=False)))
    seeds = len(found["seeds"])
    notes = [
        "accuracy, margin: held-out pairs whose better answer gained more log-probability over the start, and how much more"
    ]
    notes += ["own: held-out pairs that what the loss compares (the line below its name) orders right"]
    notes += [
        "chosen: log-probability of held-out better answers less the start's; KL and length of the policy's own answers"
    ]
    notes += [f"second line: 95 % interval over seeds, widened for their number ({seeds})"] if seeds >= FEWEST else []
    notes += (
        []
        if seeds >= FEWEST
        else [f"with {seeds} seed{'s' * (seeds > 1)} no interval over seeds can be given: that takes 3"]
    )
    notes += [f"{run} failed: {why}" for point in found["points"] for run, why in point["failed"].items()]
    title = f"Preference losses on the same rows, mean of {seeds} seed{'s' * (seeds != 1)}"
    first, *others = COLUMNS.values()
    return Grid(title=title, header=("loss", first, "own", *others, "seconds"), rows=tuple(rows), notes=tuple(notes))


def _cell(values: Sequence[float], *, interval: bool) -> str:
    """A mean, with its interval below if asked and known; a dash for nothing."""
    if not values:
        return "–"
    found = over_seeds(values)
    if not interval or math.isinf(found.low):
        return f"{found.mean:.3g}"
    return f"{found.mean:.3g}\n[{found.low:.3g}, {found.high:.3g}]"


def compare_png(found: Mapping[str, Any]) -> bytes:
    """Draw a panel a number: every seed of every loss, the mean, and its interval over seeds."""
    points = found["points"]
    labels = [point["options"]["loss"] for point in points]
    width = min(4.2, max(2.4, 0.55 * len(points) + 0.8))
    figure = Figure(figsize=(width * len(COLUMNS), 3.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (column, title) in zip(figure.subplots(1, len(COLUMNS)), COLUMNS.items(), strict=True):
        for place, point in enumerate(points):
            values = by_seed(point, column)
            if not values:
                continue
            interval = over_seeds(values)
            axes.plot([place] * len(values), values, color=_SEED, linestyle="none", marker="o", ms=4, zorder=1)
            if math.isfinite(interval.low):
                axes.plot([place] * 2, [interval.low, interval.high], color=_COLOUR, linewidth=1.6, zorder=2)
            axes.plot([place], [interval.mean], color=_COLOUR, marker="o", ms=5, zorder=3)
        axes.set_title(title.replace("\n", " "), fontsize=9, loc="left")
        axes.set_xticks(range(len(points)), labels, fontsize=7, rotation=60, ha="right", parse_math=False)
        axes.tick_params(labelsize=7)
        axes.margins(x=0.12, y=0.12)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if column in ("margin", "chosen"):
            axes.axhline(0, color="black", linewidth=0.6)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def compare_page(found: Mapping[str, Any]) -> str:
    """A comparison as one self-contained page: what was asked, table, picture, and the tested differences."""
    asked = dict(found["fixed"]) | {"command": found["command"]}
    parts = [
        f"<h1>{page.escape(found['name'])}</h1>\n{page.facts(asked)}\n",
        page.section(
            "Losses", page.table(compare_grid(found)), page.image(compare_png(found), "values by loss and seed")
        ),
        page.section("Differences from the first", page.table(sweep_grid(found))),
    ]
    return page.document(f"{found['name']}: preference losses compared", "".join(parts))
