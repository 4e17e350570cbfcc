"""A sweep on the terminal and as a picture, drawn from what ``sweep.json`` holds."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from posttrain.evals.grids import Grid

NO_DIFFERENCE = "no difference shown"
_LOG_SPAN = 8.0  # values that span more than this factor are drawn on a logarithmic axis
_SHOWN, _HIDDEN, _SEED = "#1f6feb", "#8b949e", "#aab4be"


def sweep_grid(sweep: Mapping[str, Any]) -> Grid:
    """Lay a sweep out: each point's mean and its difference from the baseline with interval, p and verdict."""
    compared = {entry["point"]: entry for entry in sweep["comparisons"]}
    rows = []
    for point in sweep["points"]:
        mean = "–" if point["mean"] is None else f"{point['mean']:.4g}"
        rows.append((point["label"], mean, *_cells(point, compared.get(point["name"]), sweep)))
    options = next(point["options"] for point in sweep["points"] if point["name"] == sweep["baseline"])
    seeds = len(sweep["seeds"])
    title = f"{sweep['metric']}, mean of {seeds} seed{'s' * (seeds != 1)}"
    against = "difference from\n" + (" ".join(*options.items()) if len(options) == 1 else "the baseline")
    header = ("point", "mean", against, "p\n(Holm)", "verdict")
    return Grid(title=title, header=header, rows=tuple(rows), left=(0, 4), notes=tuple(notes(sweep)))


def verdict(entry: Mapping[str, Any]) -> str:
    """Say in words what a comparison shows; an interval that contains 0 shows nothing."""
    if entry["p"] is None:
        return "no interval"
    if not entry["shown"]:
        return NO_DIFFERENCE
    return "higher" if entry["mean"] > 0 else "lower"


def notes(sweep: Mapping[str, Any]) -> list[str]:
    """Say what the intervals are over, what was corrected, and which runs failed."""
    lines: list[str] = []
    compared = [entry for entry in sweep["comparisons"] if entry["mean"] is not None]
    seeds, level = len(sweep["seeds"]), _percent(sweep["level"])
    units = {entry["unit"] for entry in compared}
    if "seed" in units:
        small = "; below 6 seeds they assume roughly normal differences" if seeds < 6 else ""
        lines.append(f"second line: {level} interval by bootstrap over seeds, paired, widened for their number{small}")
    if units - {"seed"}:
        lines.append(f"with {_few(compared)} no interval over seeds can be given: that takes 3")
    for unit in sorted(unit for unit in units if unit not in ("seed", None)):
        count = next(entry["n"] for entry in compared if entry["unit"] == unit)
        over = f"{count} held-out {unit}s"
        lines.append(f"second line: {level} interval by bootstrap over {over}, paired; says nothing of other seeds")
    known = sum(entry["p"] is not None for entry in compared)
    if known:
        lines.append(f"p corrected by Holm for {known} comparison{'s' * (known != 1)}")
    if any(entry["p"] is not None and entry["p"] <= 1 - sweep["level"] and not entry["shown"] for entry in compared):
        lines.append("an interval without 0 shows no difference where the corrected p is above 0.05")
    lines += [f"{run} failed: {why}" for point in sweep["points"] for run, why in point["failed"].items()]
    return lines


def _percent(level: float) -> str:
    return f"{100 * level:g} %"


def _few(compared: Sequence[Mapping[str, Any]]) -> str:
    """Write how many seeds the comparisons without an interval over seeds have."""
    counts = sorted({entry["seeds"] for entry in compared if entry["unit"] != "seed"})
    return " or ".join(map(str, counts)) + f" seed{'s' * (counts != [1])}"


def _cells(point: Mapping[str, Any], entry: Mapping[str, Any] | None, sweep: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return difference, p and verdict of a point; the baseline has none, and without other points nothing is one."""
    if point["mean"] is None:
        return "–", "–", "failed"
    if entry is None:
        return "–", "–", "baseline" if sweep["comparisons"] else ""
    if entry["mean"] is None:
        return "–", "–", "no seed that the baseline finished"
    low, high = entry["low"], entry["high"]
    digits = _decimals([abs(value) for value in (entry["mean"], low, high) if value])
    text = f"{entry['mean']:+z.{digits}f}"
    if low is not None and high is not None:
        text += f"\n[{low:+z.{digits}f}, {high:+z.{digits}f}]"
    p = "–" if entry["p_holm"] is None else "<0.001" if entry["p_holm"] < 0.001 else f"{entry['p_holm']:.3f}"
    return text, p, verdict(entry).replace("difference ", "difference\n")


def _decimals(sizes: Sequence[float]) -> int:
    """Return how many decimals give the largest size three significant digits."""
    return max(0, 2 - math.floor(math.log10(max(sizes)))) if sizes else 2


# ---------------------------------------------------------------------------- picture


def sweep_png(sweep: Mapping[str, Any]) -> bytes:
    """Draw every seed's value and the means, and beside them the differences from the baseline with their intervals."""
    points = sweep["points"]
    places, ticks, scale = _places(points)
    width = min(14.0, max(4.2, 1.0 + 0.75 * len(points)))
    panels = 2 if sweep["comparisons"] else 1
    figure = Figure(figsize=(panels * width, 3.8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = np.atleast_1d(figure.subplots(1, panels))
    _draw_values(axes[0], sweep, places, scale)
    if panels == 2:
        _draw_differences(axes[1], sweep, places)
    for panel in axes:
        _frame(panel, sweep, places, ticks, scale)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _places(points: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[str], str]:
    """Return where each point stands, its tick, and the axis's scale: numbers stand at their value, others side by side."""
    options = [list(point["options"].values()) for point in points]
    labels = ["\n".join(values) or point["label"] for values, point in zip(options, points, strict=True)]
    if len(points) > 1 and all(len(values) == 1 and _number(values[0]) is not None for values in options):
        values = [float(values[0]) for values in options]
        positive = [abs(value) for value in values if value]
        wide = len(positive) == len(values) and min(values) > 0 and max(values) / min(values) > _LOG_SPAN
        return values, labels, "log" if wide else "linear"
    return [float(i) for i in range(len(points))], labels, "category"


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _draw_values(axes: Axes, sweep: Mapping[str, Any], places: Sequence[float], scale: str) -> None:
    """Draw a thin line a seed (what is paired) and the means in front, joined where the axis has an order."""
    points = sweep["points"]
    order = np.argsort(places, kind="stable")
    x = np.array(places)[order]
    for i in range(len(sweep["seeds"])) if len(sweep["seeds"]) > 1 else ():
        y = [math.nan if points[k]["values"][i] is None else points[k]["values"][i] for k in order]
        axes.plot(x, y, color=_SEED, linewidth=0.9, marker="o", ms=3.5, zorder=1, label="a seed" if i == 0 else None)
    means = [math.nan if points[k]["mean"] is None else points[k]["mean"] for k in order]
    line = "none" if scale == "category" else "-"
    axes.plot(x, means, color=_SHOWN, linewidth=1.6, linestyle=line, marker="o", ms=5, zorder=2, label="mean")
    axes.set_title(str(sweep["metric"]), fontsize=10, loc="left", parse_math=False)
    axes.legend(fontsize=8, frameon=False)


def _draw_differences(axes: Axes, sweep: Mapping[str, Any], places: Sequence[float]) -> None:
    """Draw each difference with its interval, grey where no difference is shown; the baseline is the line at 0."""
    at = {point["name"]: place for point, place in zip(sweep["points"], places, strict=True)}
    axes.axhline(0, color="black", linewidth=0.8)
    axes.plot([at[sweep["baseline"]]], [0], color="black", marker="s", ms=5)
    for entry in sweep["comparisons"]:
        if entry["mean"] is None:
            continue
        colour = _SHOWN if entry["shown"] else _HIDDEN
        if entry["low"] is not None and entry["high"] is not None:
            axes.plot([at[entry["point"]]] * 2, [entry["low"], entry["high"]], color=colour, linewidth=2)
        axes.plot([at[entry["point"]]], [entry["mean"]], color=colour, marker="o", ms=5)
    units = " and ".join(sorted(f"{unit}s" for unit in {entry["unit"] for entry in sweep["comparisons"]} - {None}))
    over = f"{_percent(sweep['level'])} intervals over {units}; " if units else ""
    baseline = next(point for point in sweep["points"] if point["name"] == sweep["baseline"])
    against = ", ".join(baseline["options"].values()) or baseline["label"]
    axes.set_title(f"difference from {against}\n{over}grey: {NO_DIFFERENCE}", fontsize=9, loc="left", parse_math=False)


def _frame(axes: Axes, sweep: Mapping[str, Any], places: Sequence[float], ticks: Sequence[str], scale: str) -> None:
    """Put a tick at every point, and name the swept options below."""
    if scale == "log":
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(list(places), list(ticks), fontsize=8, rotation=60 if len(ticks) > 10 else 0, parse_math=False)
    axes.set_xlabel(", ".join(sweep["points"][0]["options"]), fontsize=9, parse_math=False)
    axes.margins(x=0.08, y=0.1)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
