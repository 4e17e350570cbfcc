"""Write ``benchmarks/results/systems-rewards.jsonl`` into the systems' pages: ``python -m benchmarks.systems.rewards_page``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks import kept

from posttrain.evals.statistics import Interval, paired_test

ROOT = Path(__file__).parents[2]
START, END = "<!-- results: made by python -m benchmarks.systems.rewards_page -->\n", "<!-- end of results -->"
NAME = "systems-rewards"  # as in benchmarks.systems.rewards, which imports torch
SEEDS = 3
NEW = "It has not been run over its seeds yet: no effect is claimed here.\n"


def windows(kl: Sequence[float]) -> tuple[float, float]:
    """The mean of the last quarter of the first half of a run, and of the last quarter of the same length of the whole."""
    half = len(kl) // 2
    return float(np.mean(kl[half - half // 4 : half])), float(np.mean(kl[-(half // 4) :]))


def starling(rows: Sequence[dict[str, Any]]) -> list[str]:
    """KL at N steps and at 2N."""
    out = [
        "| seed | loss | KL at 40 steps, nats an answer | at 80 | ratio | reward at 80 | gold, held out |",
        "|---|---|---|---|---|---|---|",
    ]
    ratios: dict[str, list[float]] = {"apa": [], "ppo": []}
    for r in rows:
        for arm in ("apa", "ppo"):
            early, late = windows(r[arm]["kl"])
            ratios[arm].append(late / early)
            reward = float(np.mean(r[arm]["reward"][-10:]))
            out.append(
                f"| {r['seed']} | {arm} | {early:.2f} | {late:.2f} | {late / early:.2f} | {reward:+.2f} | {r[arm]['gold']:.3f} |"
            )
    out += [
        "",
        f"APA's KL at twice the steps is at most 1.5 times as large in {sum(x <= 1.5 for x in ratios['apa'])} of {len(rows)} seeds. ",
    ]
    difference = [np.log(b) - np.log(a) for a, b in zip(ratios["apa"], ratios["ppo"], strict=True)]
    return [*out, said("PPO's ratio less APA's, in logarithms,", difference, 0.0)]


def internlm2(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The hack and gold after each round."""
    out = [
        "| seed | found | SFT, share with it | round 1 | round 2 | gold: SFT | round 1 | round 2 | pairs in order: model 1 | model 2 |"
    ]
    out.append("|---" * 10 + "|")
    for r in rows:
        hack = (r["patch"]["hack"] or {}).get("phrase", "nothing")
        shares = " | ".join(f"{r[n]['hacked']:.2f}" for n in ("sft", "policy0", "policy1"))
        golds = " | ".join(f"{r[n]['gold']:.3f}" for n in ("sft", "policy0", "policy1"))
        out.append(f"| {r['seed']} | {hack} | {shares} | {golds} | {r['accuracy'][0]:.3f} | {r['accuracy'][1]:.3f} |")
    out.append("")
    out.append(
        said(
            "The share with the hack, round 1 less SFT,",
            [r["policy0"]["hacked"] - r["sft"]["hacked"] for r in rows],
            0.0,
        )
    )
    out.append(said("Round 1 less round 2,", [r["policy0"]["hacked"] - r["policy1"]["hacked"] for r in rows], 0.0))
    return [*out, said("Gold, round 2 less round 1,", [r["policy1"]["gold"] - r["policy0"]["gold"] for r in rows], 0.0)]


def gemini(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Accuracy on fresh samples, by round."""
    out = [
        "| seed | round | fresh pairs in order: this round's model | the next one | gold of the policy | judge agrees |",
        "|---" * 6 + "|",
    ]
    for r in rows:
        for k, turn in enumerate(r["rounds"], 1):
            out.append(
                f"| {r['seed']} | {k} | {turn['model']:.3f} | {turn['next']:.3f} | {turn['gold']:.3f} | {turn['agreement']:.2f} |"
            )
    out.append("")
    for k in range(3):
        out.append(
            said(
                f"Round {k + 1}, the next model less this one,",
                [r["rounds"][k]["next"] - r["rounds"][k]["model"] for r in rows],
                0.0,
            )
        )
    fell = [r["accuracy"][-1] - r["accuracy"][0] for r in rows]
    return [*out, said("On held-out rankings, the last model less the first,", fell, -0.01)]


def gemma2(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Gold of merged and parts; the auto-rater."""
    names = ("sft", "policy_near", "policy_middle", "policy_far", "model")
    out = [
        "| seed | SFT | near | middle | far | merged | tau, honest data | alarm | tau, planted hack | alarm |",
        "|---" * 10 + "|",
    ]
    for r in rows:
        golds = " | ".join(f"{r[n]:.3f}" for n in names)
        taus = " | ".join(f"{r[a]['tau']:+.2f} | {'yes' if r[a]['hacked'] else 'no'}" for a in ("honest", "planted"))
        out.append(f"| {r['seed']} | {golds} | {taus} |")
    caught, false = (sum(r[a]["hacked"] for r in rows) for a in ("planted", "honest"))
    out += ["", f"The alarm came in {caught} of {len(rows)} seeds with the planted hack, and in {false} without. "]
    return [
        *out,
        said(
            "Gold, merged less the mean of its parts,",
            [r["model"] - np.mean([r[n] for n in names[1:4]]) for r in rows],
            -0.01,
        ),
    ]


def large(r: dict[str, Any]) -> str:
    """The one run with SmolLM2."""
    parts = ", ".join(f"{r[n]:.3f}" for n in ("policy_near", "policy_middle", "policy_far"))
    return (
        f"With SmolLM2 as the reward model (n = 1, seed {r['seed']}, {r['cpu']:.0f} seconds of one core): gold {r['sft']:.3f} "
        f"after SFT, {parts} of the parts, {r['model']:.3f} merged; tau {r['honest']['tau']:+.2f}.\n"
    )


def said(what: str, values: Sequence[float], bound: float) -> str:
    """A difference over seeds in a sentence, and whether it lies above a bound."""
    if len(values) < 2:
        return f"{what} {values[0]:+.3f} (one seed)."
    found: Interval = paired_test(list(values), [0.0] * len(values))[0]
    verdict = "shown" if found.low > bound else "not shown at this scale"
    return f"{what} over {len(values)} seeds {found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}], expected above {bound:g}: {verdict}. "


PAGES: dict[str, Callable[[Sequence[dict[str, Any]]], list[str]]] = {
    "starling": starling, "internlm2": internlm2, "gemini": gemini, "gemma2": gemma2,
}  # fmt: skip


def main() -> None:
    """Fill each page's place for results."""
    for name, make in PAGES.items():
        rows = sorted((r for r in kept.read(NAME) if r["what"] == name), key=lambda r: r["seed"])
        page = ROOT / "docs" / "systems" / f"{name}.md"
        before, rest = page.read_text().split(START)
        left = [f"{len(rows)} of the {SEEDS} declared seeds have been run.", ""] if len(rows) < SEEDS else []
        page_rows = [*left, *make(rows), "", closing(rows)] if rows else [NEW]
        if name == "gemma2":
            page_rows += [large(r) for r in kept.read(NAME) if r["what"] == "gemma2_large"]
        body = "\n".join(line.rstrip(" ") for line in page_rows)
        page.write_text(before + START + body + END + rest.split(END)[1])
    if rows := [r for r in kept.read(NAME) if r["what"] == "starling"]:
        draw(rows, ROOT / "docs" / "images" / "starling-kl.png")


def closing(rows: Sequence[dict[str, Any]]) -> str:
    """Where and when, and what it took."""
    seconds = ", ".join(str(round(r["cpu"])) for r in rows)
    return f"{kept.origin(rows[-1] | {'label': f'seconds of one core a seed: {seconds}'})}.\n"


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The KL of each rollout of both losses, a line a seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    for r in rows:
        for arm, colour in {"apa": "tab:blue", "ppo": "tab:orange"}.items():
            axes.plot(
                r[arm]["kl"],
                color=colour,
                lw=1,
                label={"apa": "APA", "ppo": "PPO without penalty"}[arm] if r is rows[0] else None,
            )
    axes.set(xlabel="step", ylabel="KL to the start, nats an answer")
    axes.axvline(len(rows[0]["apa"]["kl"]) / 2, color="grey", lw=0.5)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
