"""``docs/results/preference.md`` from the runs: what each loss targets and what it did, then the effects declared beforehand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.preference.effects import EFFECTS, FILE, SEEDS, Claim
from benchmarks.preference.lab import finished
from benchmarks.preference.table import PLANS, Plan
from benchmarks.preference.targets import losses, target_of

from posttrain.evals.statistics import Interval, paired_test
from posttrain.losses import find_loss

PAGE = Path(__file__).parents[2] / "docs" / "results" / "preference.md"
NOT_SHOWN = "not shown at this scale"
FEWEST = 3

HEAD = """# Preference objectives: what each one did

Made by `python -m benchmarks.preference page` from `benchmarks/results/preference-*.jsonl`; every run is in the tables. What a
loss targets is declared in `benchmarks/preference/targets.py`, effects in `benchmarks/preference/effects.py`, both before the
runs; settings were chosen on other seeds (from 100). Intervals are 95 % over seeds 0, 1, 2: the paired bootstrap's, widened
as Student's t widens a normal interval (`posttrain.evals.statistics.paired_test`). A seed is other training rows, another
order and other draws; held-out rows are the same for all. With three seeds only large or steady effects can be shown; an
interval that contains the bound is *not shown at this scale*, which says nothing against a method. Verdicts are not
corrected for their number.

    python -m benchmarks.preference run small       # the first table; goes on where it was stopped
    python -m benchmarks.preference run smollm2     # the second
    python -m benchmarks.preference effects         # the effects
    python -m benchmarks.preference page
"""

NUMBERS = {
    "accuracy": "share of held-out pairs whose better answer gained more log-probability over the start",
    "accuracy_token": "the same of log-probabilities a token",
    "accuracy_gap": "share of held-out pairs whose better answer is the more probable one",
    "accuracy_gap_token": "the same a token",
    "margin": "by how much more the better answer gained, nats",
    "chosen": "log-probability of the best held-out answer, nats; in the table its change from the start",
    "rejected": "the same of the others",
    "kl": "KL of the policy from the start on the policy's own answers, nats an answer",
    "length": "tokens of the policy's own answers",
    "gold": "change of their gold score (0 to 1), on held-out prompts",
}


def main() -> None:
    """Write the page."""
    parts = [HEAD, *(table_section(plan) for plan in PLANS.values()), effects_section()]
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text("\n".join(part for part in parts if part))
    print(f"wrote {PAGE}")


# ---------------------------------------------------------------------------- tables of losses


def table_section(plan: Plan) -> str:
    """A table of losses: target, its change with interval and verdict, and the numbers that all share."""
    runs = {(row["loss"], row["seed"]): row for row in finished(plan.file)}
    title = f"## Every loss on {plan.about.partition(' (')[0]}" if plan.world else "## On SmolLM2 with LoRA"
    if not runs:
        return f"{title}\n\nNot run yet.\n"
    s = plan.setting
    lines = [title, ""]
    lines += [
        f"{plan.about[0].upper()}{plan.about[1:]}; learning rate {s.lr:g}, {s.epochs:g} epoch{'s' * (s.epochs != 1)}; "
        "every loss at its own default options."
    ]
    if not plan.world:
        others = len(losses()) - len(plan.losses)
        lines[-1] += f" The other {others} losses were not run here."
    spent = [row["cpu"] for row in runs.values() if row["loss"] != "start"]
    lines[-1] += f" {len(spent)} runs, {max(spent):.0f} s of one core at most and {sum(spent) / 60:.0f} min together."
    if plan.world:
        lines[-1] += " `xpo` is not here: its samples are made while it runs."
    lines += ["", "| number | what it is |", "|---|---|"]
    lines += [f"| {name} | {text} |" for name, text in NUMBERS.items() if plan.world or name != "gold"]
    gold = ["gold"] if plan.world else []
    columns = ["accuracy", "margin", "chosen", "rejected", "kl", "length", *gold]
    lines += ["", f"| loss | family | targets | effect | verdict | {' | '.join(columns)} | s |"]
    lines += ["|---|---|---|---|---|" + "--:|" * (len(columns) + 1)]
    for loss in plan.losses:
        lines.append(table_row(loss, runs, columns))
    if plan.world:
        lines += [
            "",
            "Those not shown ask for a difference from another loss, in length, KL or likelihood, at default options in 16 steps.",
        ]
    return "\n".join([*lines, ""])


def table_row(loss: str, runs: Mapping[Any, Any], columns: Sequence[str]) -> str:
    """A line of a table; a loss that is not finished says so."""
    family = find_loss(loss).kind.removesuffix(" loss")
    target = target_of(loss)
    seeds = [seed for seed in SEEDS if (loss, seed) in runs]
    if not seeds:
        return f"| `{loss}` | {family} | {target.number} | not run | | {'| ' * (len(columns) + 1)}|"
    paired = [seed for seed in seeds if (target.against, seed) in runs]
    gaps = [number(runs, loss, s, target.number) - number(runs, target.against, s, target.number) for s in paired]
    found = interval(gaps)
    arrow = "up" if target.up else "down"
    against = "" if target.against == "start" else f" from `{target.against}`"
    verdict = shown(found, above=target.up, bound=0.0) if len(gaps) >= FEWEST else f"{len(gaps)} seeds"
    cells = [cell(runs, loss, seeds, column) for column in columns]
    seconds = sum(runs[loss, s]["cpu"] for s in seeds) / len(seeds)
    effect = text(found)
    return f"| `{loss}` | {family} | {target.number} {arrow}{against} | {effect} | {verdict} | {' | '.join(cells)} | {seconds:.1f} |"


def number(runs: Mapping[Any, Any], loss: str, seed: int, name: str) -> float:
    """A number of a run."""
    return float(runs[loss, seed]["numbers"][name])


def cell(runs: Mapping[Any, Any], loss: str, seeds: Sequence[int], column: str) -> str:
    """The mean over seeds; of ``chosen``, ``rejected`` and ``gold`` the change from the start."""
    name = "gold_total" if column == "gold" else column
    values = [number(runs, loss, s, name) for s in seeds]
    if column in ("chosen", "rejected", "gold"):
        values = [v - number(runs, "start", s, name) for v, s in zip(values, seeds, strict=True)]
        return f"{sum(values) / len(values):+.3g}"
    return f"{sum(values) / len(values):.3g}"


def interval(values: Sequence[float]) -> Interval:
    """The mean over seeds with its interval; without bounds where seeds are too few."""
    if not values:
        return Interval(math.nan, -math.inf, math.inf, 0)
    if len(values) < FEWEST:
        return Interval(sum(values) / len(values), -math.inf, math.inf, len(values))
    return paired_test(list(values), [0.0] * len(values))[0]


def text(found: Interval) -> str:
    """``+1.2 [0.8, 1.6]``."""
    if not math.isfinite(found.low):
        return f"{found.mean:+.3g}"
    return f"{found.mean:+.3g} [{found.low:.3g}, {found.high:.3g}]"


def shown(found: Interval, *, above: bool, bound: float) -> str:
    """Whether the interval lies where it was declared to, or on the other side."""
    if not math.isfinite(found.low):
        same = found.low == found.high
        return NOT_SHOWN if not same else "shown"
    if found.low > bound:
        return "shown" if above else "the other way"
    if found.high < bound:
        return "the other way" if above else "shown"
    return NOT_SHOWN


# ---------------------------------------------------------------------------- effects

REASONS = {
    "`dpo`: fewer answers end": "every answer of every arm ended, the start's too: answers of this world are short, and 36 steps "
    "don't unlearn their stop token; the harm is reported of long answers",
    "`dpo`: the chosen log-probability falls": "of pairs that differ in a word it falls at every seed, by 1.4 to 3.5 nats, "
    "too unevenly for three seeds",
    "`dpop` keeps more of it than `dpo`": "it does at every seed, and stays within 0.12 nats of the start; by how much more is as "
    "uneven as `dpo` is",
    "`tdpo2` has less sequential KL there than `dpo`": "it has at every seed, 10 to 15 % less; the interval just holds 0",
    "clear pairs: accuracy within 0.05": "equal at two seeds, two pairs of 48 fewer at the third; one pair is 0.021",
    "`npo` keeps more of the other kinds than gradient ascent": "gradient ascent did not collapse in 25 steps of this size, and both "
    "went as deep; NPO's gradient fades only past some tens of nats at its beta of 0.1",
    "`robust_dpo` orders more held-out pairs right than `dpo`": "it does at every seed, by 0.03 to 0.08",
    "its answers score higher": "of `robust_dpo` they score lower on average: its gradient never vanishes, and it ends 22 to 84 nats "
    "from the start; of `cdpo` they score higher at every seed, by 0.02 to 0.08",
    "`cdpo` orders more held-out pairs right than `dpo`": "no direction: one seed up, two down; it moves less than half as far",
    "accuracy within two points": "one to two pairs of 96 fewer at every seed; the bound lies inside the interval",
}
"""What the runs say of a claim that was not shown, in words; written after them."""


def reasons_section(verdicts: Mapping[str, str]) -> list[str]:
    """A line on each claim that was not shown.

    Raises:
        KeyError: one without a reason.
    """
    open_ones = [says for says, verdict in verdicts.items() if verdict in (NOT_SHOWN, "the other way")]
    lines = [f"- {says}: {REASONS[says]}." for says in open_ones]
    return ["", "What the runs say of those not shown:", "", *lines] if lines else []


def effects_section() -> str:
    """Every effect: question, sizes, claims with intervals and verdicts, and every run."""
    rows = finished(FILE)
    lines = ["## Effects declared beforehand", "", "| effect | claim | found | verdict |", "|---|---|---|---|"]
    verdicts: dict[str, str] = {}
    for name, effect in EFFECTS.items():
        runs = {(row["arm"], row["seed"]): row["numbers"] for row in rows if row["effect"] == name}
        for claim in effect.claims:
            found, verdict = judged(claim, runs)
            verdicts[claim.says] = verdict if verdicts.get(claim.says) != NOT_SHOWN else NOT_SHOWN
            lines.append(f"| [{name}](#{name.replace('_', '-')}) | {claim.says} | {found} | {verdict} |")
    lines += reasons_section(verdicts)
    for name, effect in EFFECTS.items():
        found = [row for row in rows if row["effect"] == name]
        lines += ["", f"### {name.replace('_', '-')}", "", f"{effect.question} {effect.sizes}", ""]
        if not found:
            lines.append("Not run yet.")
            continue
        names = list(dict.fromkeys(claim.number for claim in effect.claims))
        lines += [f"| arm | seed | {' | '.join(names)} | s |", "|---|--:|" + "--:|" * (len(names) + 1)]
        for row in sorted(found, key=lambda r: (effect.arms.index(r["arm"]), r["seed"])):
            values = " | ".join(f"{row['numbers'][n]:.4g}" for n in names)
            lines.append(f"| `{row['arm']}` | {row['seed']} | {values} | {row['cpu']:.1f} |")
    return "\n".join([*lines, ""])


def judged(claim: Claim, runs: Mapping[Any, Mapping[str, float]]) -> tuple[str, str]:
    """A claim's difference with its interval over seeds, and what that shows."""
    sides = [claim.arm, *([claim.against] if claim.against else [])]
    seeds = [seed for seed in SEEDS if all((arm, seed) in runs for arm in sides)]
    values = [runs[claim.arm, s][claim.number] for s in seeds]
    if claim.against:
        values = [v - runs[claim.against, s][claim.number] for v, s in zip(values, seeds, strict=True)]
    if len(values) < FEWEST:
        return "–", f"{len(values)} seeds"
    if max(values) == min(values):  # no spread: three equal numbers, such as a share that stays 1
        holds = values[0] > claim.bound if claim.above else values[0] < claim.bound
        return f"{values[0]:+.3g} at every seed", "shown" if holds else NOT_SHOWN
    found = interval(values)
    return text(found), shown(found, above=claim.above, bound=claim.bound)
