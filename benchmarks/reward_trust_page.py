"""What was measured of trust in reward models, as sections of ``docs/results/reward-models.md`` (`benchmarks.reward_page`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from posttrain.evals.reward_plots import curves_png
from posttrain.evals.statistics import cluster_bootstrap, paired_bootstrap

IMAGES = Path(__file__).parents[1] / "docs" / "images"
Rows = list[dict[str, Any]]
PENALISED = "variance 0.5"


def sections(rows: Rows) -> list[str]:
    """All that has been run."""
    of = lambda proof: sorted((r for r in rows if r["proof"] == proof), key=lambda r: r["seed"])  # noqa: E731
    found = [*overoptimisation(of("overoptimisation")), *length(of("length"))]
    return [*found, *two_heads(of("two_heads"))]


def overoptimisation(rows: Rows) -> list[str]:
    """Gold over n and drops of all seeds by rule, and a picture of the first."""
    if not rows:
        return []
    counts = rows[0]["counts"]
    lines = ["## Best of n with a quarter of the labels flipped\n"]
    lines += ["    python -m benchmarks.reward_trust --only overoptimisation\n"]
    lines += [row_of("proxy", *(f"n = {n}" for n in counts), "drop [95 %]"), "|" + "---|" * (len(counts) + 2)]
    values = {name: np.concatenate([r["falls"][name]["by_prompt"] for r in rows]) for name in rows[0]["falls"]}
    drops = {name: drop(v) for name, v in values.items()}
    for name, v in values.items():
        lines.append(row_of(name, *(f"{x:.3f}" for x in v.mean(axis=0)), told(drops[name])))
    single, penalised = drops["single"], drops[PENALISED]
    above = paired_bootstrap(values[PENALISED][:, -1], values["single"][:, -1], range(len(values["single"])))
    holds = single.low > 0 and penalised.low <= 0.01 and above.low > 0
    by_seed = "; ".join(
        f"seed {r['seed']}: {r['falls']['single']['drop']:.3f} and {r['falls'][PENALISED]['drop']:.3f}" for r in rows
    )
    lines += [
        "",
        f"Gold of the best of n, {len(values['single'])} prompts of {len(rows)} seeds; the drop is from the highest to the last. "
        f"Drops of the single model and of the ensemble of mean - 0.5 variance by seed: {by_seed}. At n = {counts[-1]} the ensemble is "
        f"above the single model by {told(above)}. {shown(holds)}",
        "",
    ]
    name = "reward-trust-best-of-n.png"
    IMAGES.mkdir(exist_ok=True)
    (IMAGES / name).write_bytes(curves_png(rows[0]["best_of_n"]))
    return [*lines, f"![gold and proxy of the best of n, seed {rows[0]['seed']}](../images/{name})", ""]


def drop(values: np.ndarray) -> Any:
    """How far the mean over prompts at the largest n lies under its highest point, ``[P, counts]``, paired over prompts."""
    return paired_bootstrap(values[:, int(values.mean(axis=0).argmax())], values[:, -1], range(len(values)))


def length(rows: Rows) -> list[str]:
    """Correlation and accuracy by seed and method."""
    if not rows:
        return []
    lines = ["## Length taken out\n", "    python -m benchmarks.reward_trust --only length\n", *length_table(rows), ""]
    for name in ("balanced", "residual"):  # of two heads nothing was claimed
        held = [r["verdict"][name]["halved"] and r["verdict"][name]["points"] >= -1 for r in rows]
        lines.append(f"- {name}: halves it for at most 1 point in {sum(held)} of {len(held)} seeds. {shown(all(held))}")
    return [*lines, ""]


def two_heads(rows: Rows) -> list[str]:
    """The second head on seeds of its own."""
    if not rows:
        return []
    lines = ["## Length taken out by a second head\n", "    python -m benchmarks.reward_trust --only two_heads\n"]
    moved = [x for r in rows for x in r["models"]["two heads"]["moved"]]
    change = cluster_bootstrap(moved, [(r["seed"], c) for r in rows for c in r["cluster"]])
    halved = sum(r["verdict"]["two heads"]["halved"] for r in rows)
    holds = halved == len(rows) and change.mean >= -0.01
    points = f"{100 * change.mean:+.1f} points [{100 * change.low:+.1f}, {100 * change.high:+.1f}]"
    said = f"The correlation is halved in {halved} of {len(rows)} seeds; accuracy changes by {points}. {shown(holds)}"
    return [*lines, *length_table(rows), "", said, ""]


def length_table(rows: Rows) -> list[str]:
    """Correlation and accuracy of each model by seed."""
    lines = [row_of("seed", "model", "rho of score and length [95 %]", "accuracy [95 %]", "change in points [95 %]")]
    lines.append("|---|---|---|---|---|")
    for row in rows:
        for name, e in row["models"].items():
            rho, share, points = e["rho"], e["accuracy"], [100 * c for c in e["change"]]
            cells = [
                f"{rho[0]:+.3f} [{rho[1]:+.3f}, {rho[2]:+.3f}]",
                f"{share[0]:.3f} [{share[1]:.3f}, {share[2]:.3f}]",
                "" if name == "raw" else f"{points[0]:+.1f} [{points[1]:+.1f}, {points[2]:+.1f}]",
            ]
            lines.append(row_of(str(row["seed"]), name, *cells))
    return lines


def row_of(*cells: str) -> str:
    """A row of a table."""
    return f"| {' | '.join(cells)} |"


def told(found: Any) -> str:
    """A mean with its interval."""
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def shown(whether: bool) -> str:
    """The verdict in words."""
    return "**Shown.**" if whether else "**Not shown at this scale.**"
