"""Pictures of what was measured of reward models: accuracy, calibration, best of n, styles; each a PNG or None."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = ("#1f6feb", "#bc4c00", "#1a7f37", "#8250df", "#57606a", "#9a6700", "#cf222e", "#0a7ea4")
Models = Mapping[str, Any]


def accuracy_png(models: Models) -> bytes | None:
    """Accuracy of each model on each subset, with intervals."""
    subsets = list(dict.fromkeys(s for m in models.values() for s in m["accuracy"]))
    figure, (axes,) = _figure(1, height=0.9 + 0.24 * len(subsets) * (len(models) + 1), width=8)
    step = 1 / (len(models) + 1)
    for k, (name, model) in enumerate(models.items()):
        known = [(i, model["accuracy"][s]) for i, s in enumerate(subsets) if s in model["accuracy"]]
        at = [i + (k - (len(models) - 1) / 2) * step for i, _ in known]
        mean = np.array([e["accuracy"] for _, e in known])
        low, high = (np.array([e[b] if e[b] is not None else e["accuracy"] for _, e in known]) for b in ("low", "high"))
        bars = np.maximum([mean - low, high - mean], 0)
        axes.errorbar(mean, at, xerr=bars, fmt="o", ms=4, color=_colour(k), label=name, elinewidth=1.3)
    axes.axvline(0.5, color="#57606a", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(subsets)), subsets, fontsize=8)
    axes.invert_yaxis()
    _frame(axes, "share of pairs in the right order", "")
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _png(figure)


def calibration_png(models: Models) -> bytes | None:
    """How often the predicted winner is right, against the probability it was given, before and after the temperature."""
    found = {n: m["calibration"] for n, m in models.items() if m.get("calibration") and not m.get("baseline")}
    if not found:
        return None
    figure, panels = _figure(2, height=3.4, width=8.5)
    for axes, when in zip(panels, ("before", "after"), strict=True):
        axes.plot([0.5, 1], [0.5, 1], color="#57606a", linewidth=0.8, linestyle=":")
        for k, (name, entry) in enumerate(found.items()):
            bins = np.array(entry[when]["bins"])
            label = f"{name}: ECE {entry[when]['ece']:.3f}"
            axes.plot(bins[:, 0], bins[:, 1], color=_colour(k), linewidth=1.2, label=label)
            axes.scatter(bins[:, 0], bins[:, 1], s=8 + 120 * bins[:, 2] / bins[:, 2].sum(), color=_colour(k))
        axes.set_ylim(min(0.3, axes.get_ylim()[0]), 1.02)
        _frame(axes, f"{when} the temperature", "probability of the predicted winner")
        axes.legend(fontsize=7, frameon=False, loc="lower right")
    panels[0].set_ylabel("share right", fontsize=8)
    return _png(figure)


def best_of_n_png(models: Models) -> bytes | None:
    """Gold against the square root of KL with the fitted law, and proxy beside it."""
    found = {n: m["best_of_n"] for n, m in models.items() if m.get("best_of_n")}
    return None if not found else curves_png(found)


def curves_png(found: Mapping[str, Any]) -> bytes:
    """The same of best-of-n results by name."""
    figure, (gold, proxy) = _figure(2, height=3.6, width=9)
    for k, (name, entry) in enumerate(found.items()):
        rows: Sequence[Mapping[str, float]] = entry["curve"]
        d = np.sqrt([r["kl"] for r in rows])
        low, mean, high = (np.array([r[key] for r in rows], dtype=float) for key in ("low", "gold", "high"))
        gold.fill_between(d, low, high, color=_colour(k), alpha=0.12, linewidth=0)
        gold.plot(d, mean, "o-", ms=3, color=_colour(k), linewidth=1.2, label=name)
        if law := entry.get("law"):
            fine = np.linspace(0, d[-1], 60)
            fitted = mean[0] + fine * (law["alpha"] - law["beta"] * fine)
            gold.plot(fine, fitted, "--", color=_colour(k), linewidth=0.9)
        proxies = np.array([r["proxy"] for r in rows])
        proxy.plot(d, proxies, "o-", ms=3, color=_colour(k), linewidth=1.2)
    _frame(gold, "gold of the best of n (dashed: fitted law)", "sqrt(KL), KL = log n - (n - 1) / n")
    _frame(proxy, "the model's own score of it", "sqrt(KL)")
    gold.legend(fontsize=7, frameon=False)
    return _png(figure)


def styles_png(models: Models) -> bytes | None:
    """RM-Bench's matrix of each model."""
    found = {}
    for name, model in models.items():
        if styles := model.get("styles"):
            found[name] = styles.get("all") or next(iter(styles.values()))
    if not found:
        return None
    figure, panels = _figure(len(found), height=2.7, width=2.5 * len(found) + 0.6)
    for axes, (name, entry) in zip(panels, found.items(), strict=True):
        matrix = np.array(entry["matrix"])
        axes.imshow(matrix, vmin=0, vmax=1, cmap="RdYlGn")
        for (i, j), value in np.ndenumerate(matrix):
            dark = abs(value - 0.5) > 0.35
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color="white" if dark else "black")
        short = ["concise", "detailed", "marked up"][: len(matrix)]
        axes.set_xticks(range(len(matrix)), short, fontsize=7)
        axes.set_yticks(range(len(matrix)), short, fontsize=7, rotation=90, va="center")
        axes.set_xlabel("the wrong answer's style", fontsize=7)
        axes.set_title(name, fontsize=9, loc="left")
    panels[0].set_ylabel("the right answer's style", fontsize=7)
    return _png(figure)


def _figure(columns: int, *, height: float, width: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _frame(axes: Axes, title: str, below: str) -> None:
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel(below, fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _colour(k: int) -> str:
    return COLOURS[k % len(COLOURS)]


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
