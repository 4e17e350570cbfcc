"""Training curves from ``metrics.jsonl``: one panel a quantity, only those that a stage wrote."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from posttrain.errors import ConfigError, DataError
from posttrain.evals.overoptimisation import fit_reinforcement_law

# Metric, or prefix ending in "/" whose metrics share a panel, to the panel's title.
PANELS = {
    "loss/total": "loss",
    "loss/policy": "policy loss",
    "loss/value": "value loss",
    "reward/": "reward",
    "gold/reward": "gold reward (not trained on)",
    "kl/": "KL (nats a sequence)",
    "length/": "length (tokens)",
    "truncated/": "truncated (share)",
    "entropy/": "entropy (nats a token)",
    "accuracy/": "accuracy",
}
_TRADE = ("kl/mean", "reward/mean")
_COLUMNS, _PANEL, _HEAD = (
    4,
    (3.25, 2.5),
    0.45,
)  # panels a row; width and height of one, of a heading, in inches
_COLOURS = ("#1f6feb", "#bc4c00", "#1a7f37", "#8250df", "#57606a")

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read ``metrics.jsonl``, one object a line, each with a step.

    A last line without its line end is being written (or was when the run was killed) and is left for later.

    Raises:
        DataError: a line that is not an object with a numeric step.
    """
    rows: list[dict[str, Any]] = []
    text = path.read_text(encoding="utf-8")
    lines = text.split("\n")
    for number, line in enumerate(lines[:-1], 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError.at(
                path, number, "step", f"not JSON ({error})", "remove the line or run the stage again"
            ) from error
        if not isinstance(row, dict) or not _is_number(row.get("step")):
            raise DataError.at(path, number, "step", "no number", "expected an object with a step a line")
        rows.append(row)
    return rows


def metric_files(source: Path | Sequence[Path]) -> dict[str, Path]:
    """Find the logs behind a stage directory, a run directory or a list of files, by stage name.

    Raises:
        ConfigError: nothing there.
    """
    if isinstance(source, Path):
        found = [source / "metrics.jsonl", *sorted(source.glob("*/metrics.jsonl"))] if source.is_dir() else [source]
        files = [path for path in found if path.is_file()]
    else:
        files = list(source)
    missing = [str(path) for path in files if not path.is_file()]
    if missing or not files:
        raise ConfigError(f"no metrics.jsonl in {', '.join(missing) or source}; expected a stage or run directory")
    return {path.parent.name: path for path in files}


def curves(source: Path | Sequence[Path], out: Path) -> Path:
    """Draw the curves of a stage directory, a run directory or some ``metrics.jsonl`` files into one PNG.

    Raises:
        ConfigError: no log found, or nothing in it that can be drawn.
    """
    logs = {name: read_metrics(path) for name, path in metric_files(source).items()}
    image = curve_png(logs)
    if image is None:
        raise ConfigError(f"nothing to draw in {', '.join(logs)}; expected metrics such as loss/total or reward/mean")
    out.write_bytes(image)
    return out


def curve_png(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes | None:
    """Draw each stage's panels below its name; None if there is nothing to draw.

    Args:
        logs: stage name to the rows of its metrics.
    """
    stages = {name: (series(rows), trade(rows)) for name, rows in logs.items()}
    panels = {name: _panels(lines) for name, (lines, _) in stages.items()}
    counts = {name: len(panels[name]) + (stages[name][1] is not None) for name in stages if panels[name]}
    if not counts:
        return None
    rows = {name: math.ceil(count / _COLUMNS) for name, count in counts.items()}
    height = sum(_HEAD + _PANEL[1] * n for n in rows.values())
    figure = Figure(figsize=(_COLUMNS * _PANEL[0], height), dpi=100)
    FigureCanvasAgg(figure)
    top = height
    for name in counts:
        figure.text(0.01, (top - 0.3) / height, name, fontsize=13, fontweight="bold", parse_math=False)
        lines, both = stages[name]
        axes = _places(figure, top - _HEAD, counts[name])
        for title, keys in panels[name].items():
            _draw(next(axes), title, {key: lines[key] for key in keys})
        if both is not None:
            _draw_trade(next(axes), *both)
        top -= _HEAD + _PANEL[1] * rows[name]
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _places(figure: Figure, top: float, count: int) -> Iterator[Axes]:
    """Add ``count`` axes in rows below ``top`` (inches); much quicker than a solved layout."""
    width, height = figure.get_size_inches()
    for i in range(count):
        row, column = divmod(i, _COLUMNS)
        left, bottom = column * _PANEL[0] + 0.55, top - (row + 1) * _PANEL[1] + 0.5
        yield figure.add_axes((left / width, bottom / height, (_PANEL[0] - 0.75) / width, (_PANEL[1] - 0.8) / height))


def series(rows: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """Collect every metric's steps and values ``[S]``; a later row of a step replaces an earlier one.

    A value that is null or not finite is a gap in the line.
    """
    points: dict[str, dict[float, float]] = {}
    for row in rows:
        for key, value in row.items():
            if key != "step" and (value is None or _is_number(value)):
                number = math.nan if value is None else float(value)
                points.setdefault(key, {})[float(row["step"])] = number if math.isfinite(number) else math.nan
    return {key: (np.array(sorted(p)), np.array([p[step] for step in sorted(p)])) for key, p in points.items()}


def trade(rows: Sequence[Mapping[str, Any]]) -> Curve | None:
    """Return reward against KL over training, ``[S]`` each, where a row has both."""
    lines = series([row for row in rows if all(_is_number(row.get(key)) for key in _TRADE)])
    return (lines[_TRADE[0]][1], lines[_TRADE[1]][1]) if _TRADE[0] in lines else None


def gold_png(rows: Sequence[Mapping[str, Any]]) -> bytes | None:
    """Draw proxy and gold against sqrt(KL to the start), joined in the order of training; None of fewer than two measurements.

    Each has its own axis, for a proxy's scale is not gold's. Dashed: Gao's law of gold, where four measurements or more fit it.
    """
    keys = ("kl/mean", "reward/mean", "gold/reward")
    lines = series([row for row in rows if all(_is_number(row.get(key)) for key in keys)])
    if "gold/reward" not in lines or len(lines["gold/reward"][0]) < 2:
        return None
    kl, proxy, gold = (lines[key][1] for key in keys)
    distance = np.sqrt(np.maximum(kl, 0.0))  # an estimate of a KL near 0 may be below it
    figure = Figure(figsize=(6.0, 3.8), dpi=100)
    FigureCanvasAgg(figure)
    left = figure.add_axes((0.11, 0.14, 0.77, 0.74))
    right = left.twinx()
    for axes, values, colour, name in ((left, proxy, _COLOURS[0], "proxy"), (right, gold, _COLOURS[1], "gold")):
        axes.plot(distance, values, color=colour, alpha=0.3, linewidth=0.8)
        axes.scatter(distance, values, color=colour, s=9)
        axes.set_ylabel(name, color=colour, fontsize=9)
    if (distance > 0).sum() >= 4:
        law = fit_reinforcement_law(distance**2, gold - gold[0])
        fine = np.linspace(distance[distance > 0].min(), distance.max(), 80)
        fitted = gold[0] + fine * (law.alpha - law.beta * np.log(fine))
        right.plot(fine, fitted, "--", color=_COLOURS[1], linewidth=1.2)
    _frame(left, "proxy and gold (dashed: fitted law)", "sqrt(KL to the start, nats a sequence)")
    left.spines["right"].set_visible(True)
    right.tick_params(labelsize=7)
    right.spines["top"].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _panels(lines: Mapping[str, Curve]) -> dict[str, list[str]]:
    """Sort the metrics into panels; those of no panel (speed, memory, learning rate) stay in the log."""
    panels: dict[str, list[str]] = {}
    for prefix, title in PANELS.items():
        keys = [key for key in lines if key == prefix or (prefix.endswith("/") and key.startswith(prefix))]
        keys = [key for key in keys if np.isfinite(lines[key][1]).any()]
        if keys:
            panels[title] = keys
    return panels


def _draw(axes: Axes, title: str, lines: Mapping[str, Curve]) -> None:
    """Draw one panel: the values, and over many steps their running mean in front."""
    for i, (key, (steps, values)) in enumerate(lines.items()):
        colour, label = _COLOURS[i % len(_COLOURS)], key.partition("/")[2]
        window = len(values) // 20
        if window < 2:
            dots = "o" if len(values) < 12 else None
            axes.plot(steps, values, color=colour, label=label, linewidth=1.3, marker=dots, ms=3)
            continue
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, running_mean(values, window), color=colour, label=label, linewidth=1.6)
    _frame(axes, title, "step")
    if len(lines) > 1:
        axes.legend(fontsize=7, frameon=False)


def _draw_trade(axes: Axes, kl: NDArray[np.float64], reward: NDArray[np.float64]) -> None:
    """Draw reward against KL, early steps light, late ones dark."""
    axes.plot(kl, reward, color="#c9d1d9", linewidth=0.7, zorder=1)
    axes.scatter(kl, reward, c=np.arange(len(kl)), cmap="viridis_r", s=10, zorder=2)
    _frame(axes, "reward against KL (dark = late)", "KL (nats a sequence)")


def _frame(axes: Axes, title: str, below: str) -> None:
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel(below, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def running_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Return ``[S]``: the mean of the numbers up to ``window // 2`` rows away; nan where there is none."""
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    at = np.arange(len(values))
    first, last = np.maximum(at - window // 2, 0), np.minimum(at + window // 2 + 1, len(values))
    within = counts[last] - counts[first]
    return np.where(within > 0, (sums[last] - sums[first]) / np.maximum(within, 1), np.nan)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
