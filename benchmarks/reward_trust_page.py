"""Write ``docs/results/reward-trust.md`` and its pictures from the raw results: ``python -m benchmarks.reward_trust_page``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from posttrain.evals.grids import Grid
from posttrain.evals.reward_page import reward_model_grids
from posttrain.evals.reward_plots import calibration_png, curves_png, styles_png

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PAGE = ROOT / "docs" / "results" / "reward-trust.md"
IMAGES = ROOT / "docs" / "images"
INTRO = """# Trust in reward models: what was shown

Made by `python -m benchmarks.reward_trust_page` from `benchmarks/results/reward_trust.jsonl` and `reward_real.jsonl`. What is
measured and what was expected was written down before: `benchmarks/reward_trust.md`.
"""


def main() -> None:
    """Write the page."""
    rows = read(RESULTS / "reward_trust.jsonl")
    parts = [INTRO, *overoptimisation([r for r in rows if r["proof"] == "overoptimisation"])]
    parts += length([r for r in rows if r["proof"] == "length"])
    parts += real(read(RESULTS / "reward_real.jsonl"))
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text("\n".join(parts).rstrip() + "\n")
    print(f"wrote {PAGE.relative_to(ROOT)} from {len(rows)} runs")


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def overoptimisation(rows: list[dict[str, Any]]) -> list[str]:
    """Drops by seed and rule, and a picture of the first seed."""
    if not rows:
        return []
    lines = ["## Best of n with a quarter of the labels flipped\n"]
    lines += ["    python -m benchmarks.reward_trust --only overoptimisation\n"]
    lines += [
        "| seed | proxy | gold at n = 1 | highest, at n | gold at the largest n | drop [95 %] |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        for name, e in row["falls"].items():
            drop = f"{e['drop']:.3f} [{e['low']:.3f}, {e['high']:.3f}]"
            best = f"{max(e['gold']):.3f}, {e['peak_n']}"
            lines.append(f"| {row['seed']} | {name} | {e['gold'][0]:.3f} | {best} | {e['gold'][-1]:.3f} | {drop} |")
    count = len(rows)
    single = sum(r["verdict"]["single falls"] for r in rows)
    stays = sum(not r["verdict"]["penalised ensemble falls"] for r in rows)
    lines += [
        "",
        f"The single model falls in {single} of {count} seeds; the penalised ensemble doesn't in {stays} of {count}. ",
    ]
    lines += [shown(single == count and stays == count), ""]
    name = "reward-trust-best-of-n.png"
    IMAGES.mkdir(exist_ok=True)
    (IMAGES / name).write_bytes(curves_png(rows[0]["best_of_n"]))
    return [*lines, f"![gold and proxy of the best of n, seed {rows[0]['seed']}](../images/{name})", ""]


def length(rows: list[dict[str, Any]]) -> list[str]:
    """Correlation and accuracy by seed and method."""
    if not rows:
        return []
    lines = ["## Length\n", "    python -m benchmarks.reward_trust --only length\n"]
    lines += [
        "| seed | model | rho of score and length [95 %] | accuracy [95 %] | change in points [95 %] |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        for name, e in row["models"].items():
            rho, share, change = (e[k] for k in ("rho", "accuracy", "change"))
            cells = [
                f"{rho[0]:+.3f} [{rho[1]:+.3f}, {rho[2]:+.3f}]",
                f"{share[0]:.3f} [{share[1]:.3f}, {share[2]:.3f}]",
            ]
            points = [100 * c for c in change]
            cells.append("" if name == "raw" else f"{points[0]:+.1f} [{points[1]:+.1f}, {points[2]:+.1f}]")
            lines.append(f"| {row['seed']} | {name} | {' | '.join(cells)} |")
    lines.append("")
    for name in ("balanced", "residual"):  # of two heads nothing was claimed
        held = [r["verdict"][name]["halved"] and r["verdict"][name]["points"] >= -1 for r in rows]
        lines.append(f"- {name}: halves it for at most 1 point in {sum(held)} of {len(held)} seeds. {shown(all(held))}")
    return [*lines, ""]


def shown(whether: bool) -> str:
    """The verdict in words."""
    return "Shown." if whether else "Not shown at this scale."


def real(rows: list[dict[str, Any]]) -> list[str]:
    """The newest run on public data, table by table."""
    if not rows:
        return []
    row = rows[-1]
    spent = row["train"], row["evaluate"]
    lines = ["## SmolLM2 on public data\n", "    POSTTRAIN_REAL_DATA=FOLDER python -m benchmarks.reward_real\n"]
    lines.append(
        f"SmolLM2-135M-Instruct, dequantised Q4_1; {row['train']['pairs']} pairs, one epoch, adapters of rank 16, seed {row['seed']}; "
        f"training {spent[0]['seconds']:.0f} s, evaluation {spent[1]['seconds']:.0f} s on {row['train']['threads']} threads. "
        "What was trained, and which rows were measured, stands in `benchmarks/reward_real.py`.\n"
    )
    for grid in reward_model_grids(row["results"]):
        lines += markdown(grid)
    IMAGES.mkdir(exist_ok=True)
    models = row["results"]["models"]
    for name, png in (("calibration", calibration_png(models)), ("styles", styles_png(models))):
        if png:
            (IMAGES / f"reward-trust-{name}.png").write_bytes(png)
            lines += [f"![{name}](../images/reward-trust-{name}.png)", ""]
    return [*lines, *(f"- {note}" for note in row["results"]["notes"]), ""]


def markdown(grid: Grid) -> list[str]:
    """A grid as Markdown."""
    flat = lambda cell: cell.replace("\n", " ").replace("|", "\\|")  # noqa: E731
    lines = [f"**{grid.title}**\n", "| " + " | ".join(map(flat, grid.header)) + " |", "|" + "---|" * len(grid.header)]
    lines += ["| " + " | ".join(map(flat, row)) + " |" for row in grid.rows]
    return [*lines, "", *(f"{note}\n" for note in grid.notes)]


if __name__ == "__main__":
    main()
