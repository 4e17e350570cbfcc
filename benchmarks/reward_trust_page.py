"""What was measured of trust in reward models, as sections of ``docs/results/reward-models.md`` (`benchmarks.reward_page`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posttrain.evals.reward_plots import curves_png

IMAGES = Path(__file__).parents[1] / "docs" / "images"


def sections(rows: list[dict[str, Any]]) -> list[str]:
    """All that has been run."""
    of = lambda proof: [r for r in rows if r["proof"] == proof]  # noqa: E731
    return [*overoptimisation(of("overoptimisation")), *length(of("length"))]


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
