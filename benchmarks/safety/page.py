"""The page of what a limit on cost does, from its kept lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from benchmarks import kept

ROOT = Path(__file__).parents[2]
PAGE, IMAGE = ROOT / "docs" / "results" / "safety.md", ROOT / "docs" / "images" / "safety.png"
DECLARED = Path(__file__).with_name("declared.md")
ARMS = ("policy", "reward_only")
KEYS = ("cost/mean", "cost/recent", "cost/over", "cost/multiplier", "reward/mean", "kl/mean", "truncated/share")
EPOCH = 8
"""Rollouts in which every prompt is answered once."""
LABELS = {"policy": "under the limit", "reward_only": "reward alone"}


def crossing(line: dict[str, Any]) -> int | None:
    """The rollout (from 0) from which on the mean cost of the newest responses is at most the limit; None if it never stays."""
    recent = line["curve"]["cost/recent"]
    over = [k for k, c in enumerate(recent) if c > line["limit"]]
    first = over[-1] + 1 if over else 0
    return first if first < len(recent) else None


def claims(safe: dict[str, Any], alone: dict[str, Any]) -> dict[str, bool]:
    """What was declared of a seed's two arms, and whether it is so."""
    curve, limit, at = safe["curve"], safe["limit"], crossing(safe)
    last = sum(curve["reward/mean"][-EPOCH:]) / EPOCH
    return {
        "the start costs more than the limit": safe["start"]["cost"] > limit,
        "crosses by three quarters of the run and stays": at is not None and 0 < at <= 3 * len(curve["cost/mean"]) // 4,
        "reward at the end above the start, same prompts": last > safe["start"]["reward"],
        "reward above the start, held-out prompts": safe["held"]["policy"]["reward"] > safe["held"]["sft"]["reward"],
        "cost below the limit, held-out prompts": safe["held"]["policy"]["cost"] < limit,
        "reward alone ends above the limit": alone["curve"]["cost/recent"][-1] > limit,
        "reward alone above the limit, held-out prompts": alone["held"]["policy"]["cost"] > limit,
    }


def write(lines: list[dict[str, Any]]) -> None:
    """Write page and image from the lines of all seeds that have both arms."""
    known = {(x["seed"], x["arm"]): x for x in lines}
    seeds = sorted({seed for seed, _ in known if all((seed, arm) in known for arm in ARMS)})
    out = [
        "# A limit on cost: what was declared, and what came",
        "",
        DECLARED.read_text().partition("\n")[2].strip(),
        "",
    ]
    if not seeds:
        PAGE.write_text("\n".join([*out, "Not run yet.", ""]))
        return
    draw([known[seed, arm] for seed in seeds for arm in ARMS])
    found = [claims(*(known[seed, arm] for arm in ARMS)) for seed in seeds]
    out += [
        "## What came",
        "",
        "| claim | " + " | ".join(f"seed {seed}" for seed in seeds) + " |",
        "|---" * (len(seeds) + 1) + "|",
    ]
    out += [f"| {name} | " + " | ".join("yes" if f[name] else "**no**" for f in found) + " |" for name in found[0]]
    out += ["", "On 64 held-out prompts, two samples each:", ""]
    out += ["| seed | policy | reward | cost | unsafe answers |", "|---|---|---|---|---|"]
    for seed in seeds:
        rows = {"start": known[seed, "policy"]["held"]["sft"]}
        rows |= {LABELS[arm]: known[seed, arm]["held"]["policy"] for arm in ARMS}
        for name, row in rows.items():
            out.append(f"| {seed} | {name} | {row['reward']:.3f} | {row['cost']:+.3f} | {row['unsafe']:.3f} |")
    told = []
    for seed in seeds:
        x, m = known[seed, "policy"], known[seed, "policy"]["curve"]["cost/multiplier"]
        spent = sum(known[seed, arm]["cpu"] for arm in ARMS)
        told.append(
            f"seed {seed}: start {x['start']['reward']:.3f} of reward on the training prompts, crossing at rollout {crossing(x)}, "
            f"multiplier at most {max(m):.2f} and {m[-1]:.2f} at the end, {spent:.0f} s of processor time"
        )
    out += ["", "; ".join(told) + ".", "", "![cost, reward and multiplier by rollout](../images/safety.png)", ""]
    out += [kept.origin(lines[-1]) + ".", ""]
    PAGE.write_text("\n".join(out))


def draw(lines: list[dict[str, Any]]) -> None:
    """Cost of the newest responses, reward and multiplier by rollout, a line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    colours = {"policy": "tab:blue", "reward_only": "tab:orange"}
    titles = {
        "cost/recent": "mean cost, newest responses",
        "reward/mean": f"mean reward, {EPOCH} rollouts (all prompts)",
        "cost/multiplier": "multiplier",
    }
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for x in lines:
            values, first = np.array(x["curve"][key]), x["seed"] == lines[0]["seed"]
            at = np.arange(len(values))
            if key == "reward/mean":
                values, at = np.convolve(values, np.ones(EPOCH) / EPOCH, "valid"), at[EPOCH - 1 :]
            label = LABELS[x["arm"]] if first else None
            axis.plot(at, values, color=colours[x["arm"]], lw=1.2, alpha=0.8, label=label)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("rollout")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].axhline(lines[0]["limit"], color="black", lw=0.8, ls=":")
    for x in lines:
        axes[1].plot(0, x["start"]["reward"], "k_", ms=8)
    axes[0].legend(frameon=False, fontsize=8)
    IMAGE.parent.mkdir(exist_ok=True)
    figure.savefig(IMAGE, dpi=120)
    pyplot.close(figure)
