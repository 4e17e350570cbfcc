"""Write ``docs/results/policy.md`` and its picture from ``benchmarks/results/policy.jsonl``: ``python -m benchmarks.policy --page``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks import policy
from benchmarks.kept import origin, read
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from posttrain.evals.statistics import paired_test
from posttrain.train.algorithms import ALGORITHMS

ROOT = Path(__file__).parents[1]
PAGE, PICTURE = ROOT / "docs" / "results" / "policy.md", ROOT / "docs" / "images" / "policy.png"
FEWEST = 3
Runs = Mapping[str, Mapping[int, dict[str, Any]]]
COLOURS = {"critic": "#bc4c00", "groups": "#1f6feb", "neither": "#1a7f37", "selecting": "#8250df"}

HEAD = """# Every algorithm with equal samples

Made by `python -m benchmarks.policy --page` from `benchmarks/results/policy.jsonl`, in which every run stands;
`python -m benchmarks.policy` makes those that are missing. Small world, small base model (1.8M parameters, all trained,
fp32), seeds {seeds}. A seed is another reward model (Bradley-Terry on {rankings} rankings of four, {epochs} epochs), other training
prompts, other draws. Every algorithm draws {samples} answers of up to {longest} tokens, {rollout} a rollout, in groups of {group} where
it compares (pairs in `p3o`; in `remax` half of them are the greedy ones), and makes two updates a rollout at the learning
rate {lr:g}, the same for all. That and the sizes were looked at on seeds 10 and 11 with four algorithms,
at 3e-4 and 1e-3 and with 16 to 20 rollouts; KL
coefficients, clips and options are each row's own, the paper's where it gives them. So this is how algorithms behave at
one rate with their own numbers, not what each can reach if tuned.

*Reward* is the reward model's score of two answers to each of {held} held-out prompts, in deviations of the start's answers;
*gold* the small world's own score (0 to 1), which nothing is trained on; *KL* from the start, in nats an answer; *length*
in tokens; *CPU* the processor's seconds of training on a machine that was shared with other work, so with care. Intervals
are 95 % over seeds, paired with the start (`posttrain.evals.statistics.paired_test`); an interval that contains 0 shows
nothing at this scale. No difference between algorithms was declared beforehand and none is claimed.
"""

WORDS = """
`best_of_n` trains nothing: it draws {group} answers to each held-out prompt and gives the one that the reward model likes best, so
that one answer costs {group}; its KL is the bound `log n - (n - 1) / n`. `raft` and `rest` draw as many answers as the others and
learn the selected ones by supervised steps, at the same rate. `ppo_dual_clip` differs from `ppo` only where a ratio passes its
bound. A mean hides a seed that went astray: the range of the KL stands beside it. {missing}
"""


def table(runs: Runs, names: Sequence[str]) -> list[str]:
    """A line an algorithm: means over its seeds, and changes from the start with intervals."""
    lines = ["| algorithm | reward | change | gold | change | KL | length | ended | CPU s | seeds |"]
    lines.append("|---|--:|---|--:|---|--:|--:|--:|--:|--:|")
    for name in names:
        found = runs[name]
        mean = {
            key: np.mean([r["numbers"][key] for r in found.values()]) for key in next(iter(found.values()))["numbers"]
        }
        changes = ["", ""] if name == "start" else [change(runs, name, key) for key in ("reward", "gold")]
        cells = [f"`{name}`", f"{mean['reward']:+.2f}", changes[0], f"{mean['gold']:.3f}", changes[1]]
        kl = [r["numbers"]["kl"] for r in found.values()]
        cells += [f"{mean['kl']:.2f} ({min(kl):.1f} to {max(kl):.1f})", f"{mean['length']:.1f}", f"{mean['ended']:.2f}"]
        cells += [f"{np.mean([r['cpu'] for r in found.values()]):.1f}", str(len(found))]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def change(runs: Runs, name: str, key: str) -> str:
    """By how much a number differs from the start's, over the seeds that both have."""
    seeds = sorted(set(runs[name]) & set(runs["start"]))
    one, two = ([runs[n][s]["numbers"][key] for s in seeds] for n in (name, "start"))
    if len(seeds) < FEWEST:
        return f"{np.mean(one) - np.mean(two):+.3f}"
    found, _ = paired_test(one, two)
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def kind(name: str) -> str:
    """What an algorithm compares a response with."""
    needs = ALGORITHMS[name].needs if name in ALGORITHMS else None
    if needs is None:
        return "selecting"
    return "critic" if "critic" in needs else "groups" if needs & {"groups", "pairs"} else "neither"


def draw(runs: Runs, names: Sequence[str], path: Path) -> None:
    """Reward and gold against KL, a point an algorithm, and the reward of every rollout."""
    figure = Figure(figsize=(17, 5.2), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    for axes, key, title in (
        (left, "reward", "reward (deviations of the start's)"),
        (middle, "gold", "gold (not trained on)"),
    ):
        mean = {n: [float(np.mean([r["numbers"][k] for r in runs[n].values()])) for k in ("kl", key)] for n in names}
        points = {n: (math.sqrt(max(kl, 0.0)), y) for n, (kl, y) in mean.items()}
        for name, (x, y) in points.items():
            axes.plot(x, y, "o", color="black" if name == "start" else COLOURS[kind(name)])
        label(axes, points)
        axes.set_xlabel("square root of the KL from the start (nats an answer)")
        axes.set_title(title)
    for name in names:
        curves = [[step["reward"] for step in r["curve"]] for r in runs[name].values() if r["curve"]]
        if curves:
            right.plot(
                range(1, len(curves[0]) + 1),
                np.mean(curves, axis=0),
                color=COLOURS[kind(name)],
                alpha=0.7,
                linewidth=1.2,
            )
    right.set_xlabel("rollout of 64 answers")
    right.set_title("reward of training answers, mean over seeds")
    for name, colour in COLOURS.items():
        text = {"critic": "with a critic", "groups": "groups or pairs", "neither": "neither", "selecting": "selecting"}[
            name
        ]
        right.plot([], [], color=colour, label=text)
    right.legend(loc="upper left", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def label(axes: Axes, points: Mapping[str, Sequence[float]]) -> None:
    """Names in a column beside the picture, in the order of the points' heights, each with a line to its point."""
    low, high = axes.get_ylim()
    for k, (name, point) in enumerate(sorted(points.items(), key=lambda item: item[1][1])):
        at = low + (high - low) * (k + 0.5) / len(points)
        axes.annotate(
            name, (point[0], point[1]), (1.03, at), textcoords=("axes fraction", "data"), fontsize=8, va="center",
            annotation_clip=False, arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "#8c959f", "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip


def write() -> None:
    """The page from all runs there are."""
    rows = read(policy.NAME)
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        if row["seed"] in policy.SEEDS:
            runs.setdefault(row["algorithm"], {})[row["seed"]] = row
    order = ["start", *sorted(set(ALGORITHMS) & set(runs)), *(n for n in policy.SELECTING if n in runs)]
    missing = [f"`{n}` is not here: {why}." for n, why in policy.NOT_RUN.items()]
    absent = sorted((set(ALGORITHMS) | set(policy.SELECTING)) - set(runs) - set(policy.NOT_RUN))
    missing += [f"Not run yet: {', '.join(absent)}."] if absent else []
    sizes = {
        "seeds": ", ".join(map(str, policy.SEEDS)), "rankings": policy.RANKINGS, "epochs": policy.REWARD_EPOCHS,
        "samples": policy.ROLLOUTS * policy.SAMPLES, "longest": policy.LONGEST, "rollout": policy.SAMPLES, "group": policy.GROUP,
        "lr": policy.LR, "held": policy.HELD, "missing": " ".join(missing),
    }  # fmt: skip
    draw(runs, order, PICTURE)
    parts = [HEAD.format(**sizes), *table(runs, order), WORDS.format(**sizes)]
    parts += [
        "![reward and gold against KL, and reward by rollout](../images/policy.png)",
        "",
        f"{origin(rows[-1])}.",
        "",
    ]
    PAGE.write_text("\n".join(parts))
    print(f"wrote {PAGE.relative_to(ROOT)} from {len(rows)} runs")
