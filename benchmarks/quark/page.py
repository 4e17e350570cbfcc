"""The page of what Quark's tokens do, from its kept lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import kept

ROOT = Path(__file__).parents[2]
PAGE, IMAGE = ROOT / "docs" / "results" / "quark.md", ROOT / "docs" / "images" / "quark.png"
DECLARED = Path(__file__).with_name("declared.md")


def claims(line: dict[str, Any]) -> dict[str, bool]:
    """What was declared of a seed, and whether it is so."""
    found = line["explorations"]
    quarter = max(1, len(line["kl"]) // 4)
    return {
        "rank correlation of token and mean score at least 0.9": line["rank_correlation"] >= 0.9 - 1e-9,
        "what the best token gives beats the start on held-out prompts": line["bins"][0]
        > line["held"]["start"]["mean"],
        "explorations after the best token score more than the start's": found[-1]["reward/mean"]
        > found[0]["reward/mean"],
        "KL at the end below 2 nats a token": sum(line["kl"][-quarter:]) / quarter < 2,
    }


def write(lines: list[dict[str, Any]]) -> None:
    """Write page and image from the lines of all seeds."""
    out = ["# Quark: what was declared, and what came", "", DECLARED.read_text().partition("\n")[2].strip(), ""]
    if not lines:
        PAGE.write_text("\n".join([*out, "Not run yet.", ""]))
        return
    draw(lines)
    out += [
        "## What came",
        "",
        "| claim | " + " | ".join(f"seed {x['seed']}" for x in lines) + " |",
        "|---" * (len(lines) + 1) + "|",
    ]
    found = [claims(x) for x in lines]
    out += [f"| {name} | " + " | ".join("yes" if f[name] else "**no**" for f in found) + " |" for name in found[0]]
    bins = range(len(lines[0]["bins"]))
    out += [
        "",
        "| seed | start | " + " | ".join(f"token {k}" for k in bins) + " | Spearman | KL at the end | processor s |",
    ]
    out += ["|---" * (len(bins) + 5) + "|"]
    for x in lines:
        means = " | ".join(f"{m:.3f}" for m in x["bins"])
        rho, kl = f"{x['rank_correlation']:.2f}", f"{x['kl'][-1]:.2f}"
        out.append(f"| {x['seed']} | {x['held']['start']['mean']:.3f} | {means} | {rho} | {kl} | {x['cpu']:.0f} |")
    out += [
        "",
        "Mean scores (minus the number of words) on held-out prompts; token 0 is the best.",
        "",
        "![score by token and by exploration](../images/quark.png)",
        "",
    ]
    out += [kept.origin(lines[-1]) + ".", ""]
    PAGE.write_text("\n".join(out))


def draw(lines: list[dict[str, Any]]) -> None:
    """Mean score by token with its interval, and by exploration; a line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for x in lines:
        rows = [x["held"][f"bin {k}"] for k in range(len(x["bins"]))]
        low, high = ([abs(r["mean"] - r[b]) for r in rows] for b in ("low", "high"))
        left.errorbar(range(len(rows)), x["bins"], [low, high], capsize=2, lw=1.2, label=f"seed {x['seed']}")
        right.plot([e["reward/mean"] for e in x["explorations"]], marker="o", ms=3, lw=1.2)
    left.set_xlabel("token given (0 the best)")
    left.set_ylabel("minus words, held-out prompts")
    right.set_xlabel("exploration (0: the start)")
    right.set_ylabel("mean score of new answers")
    left.legend(frameon=False, fontsize=8)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    IMAGE.parent.mkdir(exist_ok=True)
    figure.savefig(IMAGE, dpi=120)
    pyplot.close(figure)
