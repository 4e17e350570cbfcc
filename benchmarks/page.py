"""Write ``docs/performance.md`` and its plots from the raw results: ``python -m benchmarks.page``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import decode, precision, scaling
from benchmarks.compare import report
from benchmarks.compare.peers import ROOT
from benchmarks.compare.session import RESULTS, Session, read_sessions

PAGE = ROOT / "docs" / "performance.md"
IMAGES = ROOT / "docs" / "images"
LEVERS = Path(__file__).with_name("levers.md")
"""What was tried, written by hand: a measurement that changed the code has no code left to make it again."""

INTRO = """# Performance

Made by `python -m benchmarks.page` from the files in `benchmarks/results`; each row is made again by the command below its
name. Both sides train all weights of one model with AdamW on the same token ids, each through its own training loop, in
processes of their own that take turns. Where responses are sampled (`generate`, `grpo step`, `ppo`) their lengths are drawn
once, skewed, with a mean of 0.35 of the longest, and forced on both sides. `grpo update` trains on given completions with
given advantages and old log-probabilities; a `step` samples them, scores them by length and updates, without a reference;
TRL has no PPO. Before anything is timed, the first batch must give the same loss, gradient norm and log-probabilities
(tokens in `generate`) on both sides in fp32, before and after one update.

A ratio is the peer's seconds over ours, the median over repeats, with the lowest and highest; "corrected" weighs each
process's seconds with the speed of matrix products measured just before and after it; "bound" is what the counted
operations of these very batches, the peer's padding included, allow if both sides ran at one speed. *Defaults* are the
peer's own settings; *tuned* is without activation checkpointing, with the reference's log-probabilities computed
beforehand, and sorted by length; where it samples, with bf16 weights and a static cache.
"Of limit" is the share of a step's time that its counted operations and bytes would take at the measured speed of
products and copies.
"""


def main() -> None:
    """Write the page from the newest complete session of each file."""
    sessions = [s for file in sorted(RESULTS.glob("compare-*.jsonl")) for s in newest(file)]
    if not sessions:
        raise SystemExit(f"no complete session in {RESULTS}; run python -m benchmarks.compare first")
    others = [*decode.sections(), precision.section(), scaling.section(IMAGES)]
    parts = [INTRO, *(section(s) for s in sessions), *others, LEVERS.read_text()]
    PAGE.write_text("\n".join(filter(None, parts)))
    print(f"wrote {PAGE.relative_to(ROOT)} from {len(sessions)} sessions")


def newest(file: Path) -> list[Session]:
    """The last session of each variant of a row that has all its repeats on both sides, the row's usual form first."""
    found = {s.header.get("variant", ""): s for s in read_sessions(file) if complete(s)}
    return [found[variant] for variant in sorted(found)]


def complete(session: Session) -> bool:
    """Whether every column has all repeats."""
    columns = ("ours",) if session.header["peer"] == "none" else ("ours", "defaults", "tuned")
    kinds = report.kinds_of(session.header["row"])
    return all(len(report.repeats(session, c, k)) == session.header["repeats"] for c in columns for k in kinds)


def section(session: Session) -> str:
    """A row's heading, command, ratios, table, memory and plot."""
    h = session.header
    variant = h.get("variant", "")
    name = f"{h['row']}, {h['dtype']}, {h['device']}" + (f", `{variant}`" if variant else "")
    command = f"{h['row']} --dtype {h['dtype']} --device {h['device']} --peer {h['peer']} {variant}".strip()
    versions = ", ".join(f"{k} {v}" for k, v in {**h["versions"], **peer_versions(session)}.items())
    lines = [
        f"## {name}\n",
        f"    python -m benchmarks.compare {command}\n",
        f"{h['date']}, {h['machine']['processor']}, {h['threads']} threads; {h['label']}; {h['data']}, {h['batch']} prompts a step, "
        f"prompt to response {prompt_share(h['items']):.1f}; {h['repeats']} repeats; {versions}.\n",
    ]
    if h["peer"] != "none":
        lines += [f"- {line}" for line in report.ratio_lines(session, h["peer"])]
    lines += [
        f"- {line.strip()}"
        for line in [
            *report.rate_lines(session),
            *report.sync_lines(session),
            *report.memory_lines(session),
            report.drift_line(session),
        ]
    ]
    lines += ["", *markdown(report.table(session)), "", f"![seconds a step, by phase](images/{plot(session)})", ""]
    return "\n".join(lines)


def peer_versions(session: Session) -> dict[str, str]:
    """The peer's own versions, out of its results."""
    found = [r for r in session.results if r["side"] != "ours"]
    return {f"{h} (peer)": found[0][h] for h in ("trl", "transformers", "torch") if found and h in found[0]}


def prompt_share(items: list[dict[str, Any]]) -> float:
    """Prompt tokens over tokens of a response, summed over rows."""
    mean = sum(sum(i["branches"]) / len(i["branches"]) for i in items)
    return sum(i["prompt"] for i in items) / mean


def markdown(table: list[dict[str, Any]]) -> list[str]:
    """The table of columns."""
    head = ["", "s a step", "low to high", *table[0]["shares"], "MB above", "of limit"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in table:
        cells = [row["column"], f"{row['seconds']:.2f}", f"{row['low']:.2f} to {row['high']:.2f}"]
        cells += [f"{share:.0%}" for share in row["shares"].values()]
        cells += [f"{row['above'] / 1e6:.0f}", f"{row['limit']:.0%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def plot(session: Session) -> str:
    """Seconds a step of each column, stacked by phase; returns the file's name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, h = report.table(session)[::-1], session.header
    figure, axes = pyplot.subplots(figsize=(7, 0.5 + 0.4 * len(rows)), layout="constrained")
    left = [0.0] * len(rows)
    for phase in rows[0]["shares"]:
        width = [row["seconds"] * row["shares"][phase] for row in rows]
        axes.barh([row["column"] for row in rows], width, left=left, label=phase)
        left = [a + b for a, b in zip(left, width, strict=True)]
    axes.set_xlabel("seconds a step")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    variant = h.get("variant", "").replace("--", "").replace(" ", "-")
    name = "-".join(filter(None, ["performance", h["row"], h["device"], h["dtype"], variant])) + ".png"
    figure.savefig(IMAGES / name, dpi=120)
    pyplot.close(figure)
    return name


if __name__ == "__main__":
    main()
