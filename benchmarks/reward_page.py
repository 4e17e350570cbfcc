"""Write ``docs/results/reward-models.md`` from the raw results: ``python -m benchmarks.reward_page``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks import reward_real_page, reward_trust_page

from posttrain.evals.statistics import cluster_bootstrap

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "reward_kinds.jsonl"
PAGE = ROOT / "docs" / "results" / "reward-models.md"

INTRO = """# Reward models: what was shown

Made by `python -m benchmarks.reward_page` from `benchmarks/results/reward_kinds.jsonl`, `reward_trust.jsonl` and
`reward_real.jsonl`. What is run on the small world, its sizes and seeds, and what was expected were written down before the
seeds that are reported: [kinds](../../benchmarks/reward_kinds/PLAN.md), [trust](../../benchmarks/reward_trust.md). There the model
is the shipped small one (1.8M parameters). Intervals are 95 %, by bootstrap over prompts of all seeds. Seconds are of one processor.
"""

Row = Mapping[str, Any]
NOT = "**Not shown at this scale.**"


def main() -> None:
    """Write the page from what has been run."""
    rows, trust, real = (
        read(RESULTS.with_name(f"{name}.jsonl")) for name in ("reward_kinds", "reward_trust", "reward_real")
    )
    parts = [INTRO, *(s for section in SECTIONS if (s := section(rows)))]
    parts += [*reward_trust_page.sections(trust), *reward_real_page.sections(real)]
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text("\n".join(parts).rstrip() + "\n")
    print(f"wrote {PAGE.relative_to(ROOT)} from {len(rows) + len(trust) + len(real)} runs")


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def interval(values: Sequence[Sequence[float]], clusters: Sequence[Sequence[int]]) -> tuple[float, float, float]:
    """Mean and interval of the values of all seeds; clusters of different seeds are different."""
    flat = np.array([x for row in values for x in row])
    found = cluster_bootstrap(flat, [(s, c) for s, row in enumerate(clusters) for c in row])
    return found.mean, found.low, found.high


def percent(value: float) -> str:
    """A share in per cent."""
    return f"{100 * value:.1f} %"


def points(found: tuple[float, float, float]) -> str:
    """A difference of shares with its interval, in points."""
    return f"{100 * found[0]:+.1f} points [{100 * found[1]:+.1f}, {100 * found[2]:+.1f}]"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def of(rows: Sequence[Row], proof: str, **wanted: Any) -> list[Row]:
    """The lines of a proof, by seed; of one that was run twice the last."""
    found = {r["seed"]: r for r in rows if r["proof"] == proof and all(r.get(k) == v for k, v in wanted.items())}
    return [found[seed] for seed in sorted(found)]


def verdict(holds: bool, said: str) -> str:
    """What was expected, and whether it was shown."""
    return f"{said} {'**Shown.**' if holds else NOT}\n"


def _two(
    rows: Sequence[Row], proof: str, names: tuple[str, str], measure: str
) -> tuple[str, tuple[float, float, float]]:
    """The table of two models by seed, and the first's lead over the second."""
    first, second = (of(rows, proof, model=name) for name in names)
    pairs = [(a, b) for a in first for b in second if a["seed"] == b["seed"]]
    lines = [
        [str(a["seed"]), percent(a[measure]), percent(b[measure]), f"{a['cpu_seconds']:.0f} / {b['cpu_seconds']:.0f}"]
        for a, b in pairs
    ]
    lead = interval(
        [[x - y for x, y in zip(a["right"], b["right"], strict=True)] for a, b in pairs],
        [a["cluster"] for a, _ in pairs],
    )
    return table(["seed", names[0].replace("_", " "), names[1].replace("_", " "), "seconds"], lines), lead


def kwise(rows: Sequence[Row]) -> str:
    """K-wise against best and worst."""
    if not of(rows, "kwise", model="best_against_worst"):
        return ""
    shown, lead = _two(rows, "kwise", ("plackett_luce", "best_against_worst"), "accuracy")
    said = f"Pairs of held-out rankings ordered right; K-wise leads by {points(lead)}."
    return "\n".join(["## Whole rankings against best and worst\n", shown, verdict(lead[0] >= 0, said)])


def conditional(rows: Sequence[Row]) -> str:
    """Order by domain, and patches."""
    found = of(rows, "conditional")
    if not found:
        return ""
    mean = interval([r["right"] for r in found], [r["cluster"] for r in found])
    said = (
        f"The same two answers stand in opposite orders in the two domains for {percent(mean[0])} of held-out requests "
        f"[{100 * mean[1]:.1f}, {100 * mean[2]:.1f}]; expected 90 % at least."
    )
    shown = table(["seed", "orders flipped"], [[str(r["seed"]), percent(r["flipped"])] for r in found])
    out = ["## One model, two domains\n", shown, verdict(mean[0] >= 0.9, said)]
    patched = of(rows, "patch")
    if patched:
        moved = interval([r["moved"] for r in patched], [r["cluster"] for r in patched])
        names = ("below_before", "below_after", "accuracy_before", "accuracy_without", "accuracy_after")
        lines = [[str(r["seed"]), *(percent(r[name]) for name in names)] for r in patched]
        before, after = (sum(r[n] for r in patched) / len(patched) for n in names[:2])
        holds = after >= 0.9 and after > before and abs(moved[0]) < 0.01
        said = (
            f"After 50 patch pairs the hacked answer is below the clean one for {percent(after)} of prompts (before: "
            f"{percent(before)}); other accuracy differs from that without patches by {points(moved)}."
        )
        header = ["seed", "hack below clean, before", "after", "accuracy, before", "without patches", "with"]
        out += ["## Fifty patch pairs\n", table(header, lines), verdict(holds, said)]
    return "\n".join(out)


def process(rows: Sequence[Row]) -> str:
    """Best of eight by steps and by outcome."""
    if not of(rows, "process", model="outcome"):
        return ""
    shown, lead = _two(rows, "process", ("steps", "outcome"), "right_of_best")
    chance = [r["at_random"] for r in of(rows, "process", model="steps")]
    said = (
        f"Right results of the best of eight; one at random is right in {percent(sum(chance) / len(chance))}. The process "
        f"model leads by {points(lead)}."
    )
    return "\n".join(["## Labels of steps against labels of outcomes\n", shown, verdict(lead[0] >= 0, said)])


def refine(rows: Sequence[Row]) -> str:
    """Agreement with gold before and after each round."""
    rounds = [of(rows, "refine", round=k) for k in (1, 2, 3)]
    if not rounds[0]:
        return ""
    lines: list[list[str]] = []
    rises: list[float] = []
    for k, found in enumerate(r for r in rounds if r):
        moved = interval([r["moved"] for r in found], [r["cluster"] for r in found])
        rises.append(moved[0])
        by_seed = ", ".join(f"{100 * r['before']:.1f} → {100 * r['after']:.1f}" for r in found)
        lines.append([str(k + 1), by_seed, points(moved)])
    holds = len(rises) == 3 and all(x > 0 for x in rises)
    shown = table(["round", "agreement with gold on fresh pairs, by seed (%)", "change"], lines)
    said = "Each round labels where model and judge disagree, and is measured on the policy's next samples."
    return "\n".join(["## Refined where model and judge disagree\n", shown, verdict(holds, said)])


SECTIONS: list[Callable[[Sequence[Row]], str]] = [kwise, conditional, process, refine]


if __name__ == "__main__":
    main()
