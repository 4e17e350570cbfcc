"""What was measured of reward models as tables, on the terminal and in one page with plots."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.evals import page
from posttrain.evals.grids import Grid, bounds
from posttrain.evals.reward_bench import SECTIONS, total_score
from posttrain.evals.reward_plots import accuracy_png, best_of_n_png, calibration_png, styles_png

Results = Mapping[str, Any]


def reward_model_grids(results: Results) -> list[Grid]:
    """Lay out everything that is a table: accuracy, sections, styles, calibration, correlations, trust, best of n."""
    models: Mapping[str, Any] = results["models"]
    grids = [accuracy_grid(models), *section_grids(models), *style_grids(models)]
    judged = {name: m for name, m in models.items() if not m.get("baseline")}
    grids += [
        *calibration_grids(judged),
        correlation_grid(models),
        *rating_grids(models),
        *trust_grids(judged),
        *edit_grids(judged),
    ]
    return [*grids, *best_of_n_grids(models)]


def accuracy_grid(models: Results) -> Grid:
    """Accuracy by subset, one column a model."""
    subsets = list(dict.fromkeys(s for m in models.values() for s in m["accuracy"]))
    rows = []
    for subset in subsets:
        entries = [m["accuracy"].get(subset) for m in models.values()]
        known = next(e for e in entries if e)
        cells = ("–" if e is None else f"{e['accuracy']:.3f}\n{bounds(e, 3)}" for e in entries)
        rows.append((subset, str(known["pairs"]), str(known["rankings"]), *cells))
    return Grid(
        title="Share of pairs in the right order",
        header=("subset", "pairs", "rankings", *models),
        rows=tuple(rows),
        notes=("0.5 is chance; second line: 95 % interval by bootstrap over rankings",),
    )


def section_grids(models: Results) -> list[Grid]:
    """RewardBench's sections, of models for which some are complete."""
    found = {name: m["sections"] for name, m in models.items() if m.get("sections")}
    if not found:
        return []
    names = list(dict.fromkeys(s for sections in found.values() for s in sections))
    rows = [(s, *(f"{sections[s]:.3f}" if s in sections else "–" for sections in found.values())) for s in names]
    if all(set(SECTIONS) <= set(sections) for sections in found.values()):
        rows.append(("total", *(f"{total_score(sections):.3f}" for sections in found.values())))
    note = "subsets weigh as their numbers of pairs there; a total needs all four sections, and prior sets count half"
    return [Grid(title="RewardBench sections", header=("section", *found), rows=tuple(rows), notes=(note,))]


def style_grids(models: Results) -> list[Grid]:
    """RM-Bench's summary of the style matrix."""
    rows = tuple(
        (name, subset, *(f"{e[key]:.3f}" for key in ("hard", "normal", "easy", "mean")), str(e["rows"]))
        for name, m in models.items()
        for subset, e in m.get("styles", {}).items()
    )
    note = "hard: the wrong answer is the more elaborate one; normal: both alike; easy: the right one is"
    header = ("model", "subset", "hard", "normal", "easy", "mean", "rows")
    return [Grid(title="By style (RM-Bench)", header=header, rows=rows, left=(0, 1), notes=(note,))] if rows else []


def calibration_grids(models: Results) -> list[Grid]:
    """Calibration before and after a temperature."""
    rows = []
    for name, m in models.items():
        if c := m.get("calibration"):
            before, after = c["before"], c["after"]
            errors = (f"{before['ece']:.3f}", f"{after['ece']:.3f}", f"{before['nll']:.3f}", f"{after['nll']:.3f}")
            rows.append((name, f"{c['temperature']:.3g}", *errors, str(c["pairs"])))
    header = ("model", "temperature", "ECE\nbefore", "ECE\nafter", "nats a pair\nbefore", "nats a pair\nafter", "pairs")
    note = "the temperature is fitted on half of the prompts, the rest measured on the others; a coin has 0.693 nats"
    return [Grid(title="Calibration", header=header, rows=tuple(rows), notes=(note,))] if rows else []


def correlation_grid(models: Results) -> Grid:
    """Correlation of score with length and style."""
    names = list(dict.fromkeys(s for m in models.values() for s in m["correlations"]))
    cell = lambda e: "–" if e is None else f"{e['mean']:+.3f}\n{bounds(e, 3)}"  # noqa: E731
    rows = tuple((s, *(cell(m["correlations"].get(s)) for m in models.values())) for s in names)
    note = "Spearman's rho over answers, each less its prompt's mean; second line: 95 % interval over prompts"
    return Grid(title="What scores go along with", header=("count", *models), rows=rows, notes=(note,))


def rating_grids(models: Results) -> list[Grid]:
    """Correlation with ratings of single answers."""
    found = {name: m["ratings"] for name, m in models.items() if m.get("ratings")}
    if not found:
        return []
    subsets = list(dict.fromkeys(s for entries in found.values() for s in entries))
    cell = lambda e: "–" if e is None else f"{e['mean']:+.3f}\n{bounds(e, 3)}"  # noqa: E731
    count = lambda s: str(next(e[s]["n"] for e in found.values() if s in e))  # noqa: E731
    rows = tuple((s, count(s), *(cell(entries.get(s)) for entries in found.values())) for s in subsets)
    note = "Spearman's rho over single answers to different prompts; second line: 95 % interval over prompts"
    return [Grid(title="Agreement with ratings", header=("subset", "answers", *found), rows=rows, notes=(note,))]


def trust_grids(models: Results) -> list[Grid]:
    """Ensemble disagreement and distance from what is familiar."""
    rows = []
    for name, m in models.items():
        d, o = m.get("disagreement", {}), m.get("outliers", {})
        if d or o:
            keys = ((d, "gap_deviation"), (d, "unanimous"), (d, "auroc_wrong"), (o, "auroc_shuffled"), (o, "beyond"))
            rows.append((name, *(f"{entry[key]:.3f}" if key in entry else "–" for entry, key in keys)))
    header = (
        "model",
        "members' deviation\nof a gap",
        "unanimous\npairs",
        "deviation tells\nwrong pairs (AUROC)",
        "distance tells shuffled\nwords (AUROC)",
        "answers beyond\nthe threshold",
    )
    return [Grid(title="Trust", header=header, rows=tuple(rows))] if rows else []


def edit_grids(models: Results) -> list[Grid]:
    """What edits do that change nothing asked for."""
    found = {name: {e["edit"]: e for e in m["edits"]} for name, m in models.items() if m.get("edits")}
    if not found:
        return []
    edits = list(dict.fromkeys(e for entries in found.values() for e in entries))
    cell = lambda e: f"{e['mean']:+.2f}\n{bounds(e, 2)}"  # noqa: E731
    rows = tuple((edit, *(cell(entries[edit]) for entries in found.values())) for edit in edits)
    note = "change of the score in standard deviations of unedited answers' scores, with its 95 % interval over prompts"
    return [Grid(title="Edits that change nothing asked for", header=("edit", *found), rows=rows, notes=(note,))]


def best_of_n_grids(models: Results) -> list[Grid]:
    """Gold of the sample that each model likes best among n."""
    found = {name: m["best_of_n"] for name, m in models.items() if m.get("best_of_n")}
    if not found:
        return []
    counts = [row["n"] for row in next(iter(found.values()))["curve"]]
    by_n = {name: {row["n"]: row for row in entry["curve"]} for name, entry in found.items()}
    rows = tuple(
        (
            str(n),
            f"{next(iter(by_n.values()))[n]['kl']:.2f}",
            *(f"{r[n]['gold']:.3f}\n{bounds(r[n], 3)}" for r in by_n.values()),
        )
        for n in counts
    )
    notes = []
    for name, entry in found.items():
        if law := entry.get("law"):
            peak = "never falls" if law["peak"] is None else f"highest at d = {law['peak']:.2f}"
            notes.append(f"{name}: gain = d ({law['alpha']:+.3f} {-law['beta']:+.3f} d), d = sqrt(KL), {peak}")
    first = next(iter(found.values()))
    title = f"Gold of the best of n by each model ({first['prompts']} prompts, {first['samples']} samples each)"
    notes.append(f"the best there is among the samples: {first['limit']:.3f}")
    return [Grid(title=title, header=("n", "KL (nats)", *found), rows=rows, notes=tuple(notes))]


def write_page(results: Results, out: Path) -> Path:
    """Write the page: one file without scripts, that loads nothing."""
    models = results["models"]
    pictures = [
        (accuracy_png(models), "accuracy by subset with intervals"),
        (calibration_png(models), "calibration diagram before and after the temperature"),
        (best_of_n_png(models), "gold and proxy against the square root of KL"),
        (styles_png(models), "accuracy by style of the right and of the wrong answer"),
    ]
    notes = [page.note(line) for line in results.get("notes", ())]
    body = "".join(
        [
            f"<h1>Reward models</h1>\n{page.facts(results.get('facts', {}))}\n",
            page.section("Pictures", *(page.image(png, about) for png, about in pictures if png)),
            page.section("Tables", *(page.table(grid) for grid in reward_model_grids(results)), *notes),
        ]
    )
    part = out.with_name(out.name + ".part")
    part.write_text(page.document("Reward models", body), encoding="utf-8")
    os.replace(part, out)
    return out
