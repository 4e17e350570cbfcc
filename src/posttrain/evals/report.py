"""A run as one self-contained page, and on the terminal."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from posttrain.evals import page
from posttrain.evals.grids import SAMPLES_NOTE, WORST_NOTE, clean_text, closing_grids, stage_grid
from posttrain.evals.plots import curve_png
from posttrain.evals.run_view import RunView, read_run
from posttrain.evals.tables import closing_tables, rich_grid, worst_tables

_NO_RESULTS = "no evaluation yet: no stage has written results.json"
_NO_CURVES = "no curves: no stage has written metrics"
_NOTHING_WORSE = "no prompt's mean score fell"


def write_report(run_dir: Path) -> Path:
    """Write ``run_dir/report.html``: one file without scripts, that loads nothing; model text is escaped.

    Raises:
        ConfigError: the directory is not a run.
        DataError: a file in it is not what it should be.
    """
    view = read_run(Path(run_dir))
    name = str(view.run.get("name", view.directory.name))
    body = "".join(
        [
            f"<h1>{page.escape(name)}</h1>\n{page.facts(_header(view))}\n",
            page.section("Stages", page.table(stage_grid(_stage_rows(view), title=""))),
            *_result_sections(view.results),
            page.section("Curves", *_curve_images(view)),
            page.section("Configuration", *_configuration(view)),
        ]
    )
    out = view.directory / "report.html"
    part = out.with_name(out.name + ".part")
    part.write_text(page.document(f"{name}: training report", body), encoding="utf-8")
    os.replace(part, out)
    return out


def show_run(run_dir: Path, console: Console) -> None:
    """Print stages, closing tables, answers before and after, and the worst; write ``run_dir/curves.png``.

    Raises:
        ConfigError: the directory is not a run.
        DataError: a file in it is not what it should be.
    """
    view = read_run(Path(run_dir))
    for name, value in _header(view).items():
        console.print(Text.assemble((f"{name:<9}", "dim"), clean_text(value)))
    console.print()
    console.print(rich_grid(stage_grid(_stage_rows(view))))
    if view.results is None:
        console.print(Text(_NO_RESULTS, style="dim"))
    else:
        for drawn in [*closing_tables(view.results), Text()]:
            console.print(drawn)
        worst = worst_tables(view.results)
        if not worst and "worst" in view.results:
            console.print(Text(_NOTHING_WORSE, style="dim"))
        for drawn in worst:
            console.print(drawn)
    image = curve_png(view.logs)
    if image is None:
        console.print(Text(_NO_CURVES, style="dim"))
    else:
        path = view.directory / "curves.png"
        path.write_bytes(image)
        _print_path(console, "curves", path)
    report = view.directory / "report.html"
    if report.is_file():
        _print_path(console, "report", report)


def _header(view: RunView) -> dict[str, str]:
    """Collect what a reader asks first; what the run did not record is left out."""
    run = view.run
    known = {
        "recipe": ": ".join(str(run[key]) for key in ("recipe", "summary") if run.get(key)),
        "model": ", ".join(view.models),
        "date": run.get("created"),
        "command": run.get("command"),
        "seed": run.get("seed"),
        "size": "tiny: the small world, not the recipe's own model" if run.get("tiny") else None,
        "hardware": _hardware(run.get("hardware") or {}),
        "measured": (view.results or {}).get("machine", {}).get("line"),
        "versions": ", ".join(f"{k} {v}" for k, v in (run.get("versions") or {}).items() if v),
    }
    return {name: str(value) for name, value in known.items() if value not in (None, "")}


def _hardware(found: Mapping[str, Any]) -> str:
    """Write the manifest's hardware on one line."""
    parts = [str(found["cpu"])] if found.get("cpu") else []
    parts += [f"{found[key]} {key}" for key in ("cores", "threads") if found.get(key)]
    parts += [f"{found['memory']:.1f} GiB memory"] if found.get("memory") else []
    return "; ".join([", ".join(parts), *map(str, found.get("accelerators") or [])])


def _stage_rows(view: RunView) -> list[tuple[str, str, float | None]]:
    return [(name, stage.kind, stage.seconds) for name, stage in view.stages.items()]


def _result_sections(results: Mapping[str, Any] | None) -> list[str]:
    """Return the closing tables, the samples and the worst prompts."""
    if results is None:
        return [page.section("Results", page.note(_NO_RESULTS))]
    worst = [page.note(_NOTHING_WORSE)] if results.get("worst") == [] else _answers(WORST_NOTE, results.get("worst"))
    return [
        page.section("Results", *(page.table(grid) for grid in closing_grids(results))),
        page.section("Before and after", *_answers(SAMPLES_NOTE, results.get("samples"))),
        page.section("Made worse by training", *worst),
    ]


def _answers(explanation: str, rows: Sequence[Mapping[str, Any]] | None) -> list[str]:
    """Return prompts with their answers below a line that says how they were chosen; nothing for none."""
    return [page.note(explanation), page.blocks(rows)] if rows else []


def _curve_images(view: RunView) -> list[str]:
    """Return one image a stage."""
    images = {name: curve_png({name: rows}) for name, rows in view.logs.items()}
    drawn = [page.image(png, f"training curves of stage {name}") for name, png in images.items() if png is not None]
    return drawn or [page.note(_NO_CURVES)]


def _configuration(view: RunView) -> list[str]:
    """Return each stage's resolved configuration, folded."""
    return [
        page.folded(name, json.dumps(stage.config, indent=2, ensure_ascii=False)) for name, stage in view.stages.items()
    ]


def _print_path(console: Console, name: str, path: Path) -> None:
    console.print(Text(f"{name:<9}{path}"), soft_wrap=True)
