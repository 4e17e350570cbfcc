"""What a session says: seconds, ratios against each column of the peer, bounds, memory, and distance to the machine's limit."""

from __future__ import annotations

from statistics import mean, median
from typing import Any

from benchmarks.compare.counts import Shape, flops, optimiser_bytes, packed, padded
from benchmarks.compare.session import Session

Result = dict[str, Any]

KINDS = {"dpo": ("first-epoch", "later-epochs"), "grpo": ("update", "step")}
"""Timings of a row: with the reference's pass, which later epochs keep; an update, and a whole step with its sampling."""

NUMBERS = {
    "dpo": {
        "loss/total": "loss",
        "optim/grad_norm": "grad_norm",
        "logp/chosen": "logps/chosen",
        "logp/rejected": "logps/rejected",
    },
    "sft": {"loss/total": "loss", "optim/grad_norm": "grad_norm"},
    "reward": {"loss/total": "loss", "optim/grad_norm": "grad_norm"},
    "grpo": {"loss/total": "loss", "optim/grad_norm": "grad_norm", "logp/mean": "logps/mean"},
    "generate": {"tokens": "tokens", "mean id": "mean id"},
}
"""Our names of numbers that both sides log, to the peer's."""

TOLERANCE = 5e-5


def check_lines(row: str, session: Session, peer: str) -> list[str]:
    """The first batch on both sides, before and after one update on it, in fp32.

    Raises:
        SystemExit: a number differs by more than `TOLERANCE`, relative to its size or to 1.
    """
    both = {r["side"]: r["numbers"] for r in session.results if r["part"] == "check"}
    lines: list[str] = []
    worst = 0.0
    for ours, theirs in NUMBERS[row].items():
        pairs = [(a[ours], b[theirs]) for a, b in zip(both["ours"], both[peer], strict=True)]
        worst = max([worst, *(abs(a - b) / max(1.0, abs(a)) for a, b in pairs)])
        lines.append(f"  {theirs}: " + ", then ".join(f"ours {a:.6g} {peer} {b:.6g}" for a, b in pairs))
    if not worst <= TOLERANCE:
        raise SystemExit("\n".join(["the sides do not compute the same numbers on the first batch:", *lines]))
    when = "" if row == "generate" else " and after one update on it"
    return [f"same numbers on the first batch{when} (fp32), within {worst:.1e}:", *lines]


def kinds_of(row: str) -> tuple[str, ...]:
    """Names of the timings of a row."""
    return KINDS.get(row, ("",))


def seconds(result: Result, kind: str) -> float:
    """Seconds of the timed steps, with the reference pass in a first epoch."""
    total = sum(step["total"] for step in result["steps"])
    return total + (result.get("reference", 0.0) if kind == "first-epoch" else 0.0)


def repeats(session: Session, column: str, kind: str = "") -> list[Result]:
    """A column's results, in the order of repeats; whole steps have processes of their own."""
    part = "step" if kind == "step" else "repeat"
    return [r for r in session.results if r["column"] == column and r["part"].startswith(part)]


def rate(result: Result, key: str = "gflops") -> float:
    """The machine's speed around a process."""
    return mean(c[key] for c in result["calibration"])


def operations(session: Session, result: Result, kind: str) -> float:
    """Counted operations of the timed steps of a process."""
    about, row = session.header, session.header["row"]
    shape, mine = Shape(**about["shape"]), packed(about["items"], scored=row != "reward")
    work = drawn = mine
    if result["side"] != "ours":
        work = padded(result["shapes"][1:], scored=row != "reward")
        drawn = work._replace(scored=sum(result.get("scored", [])[1:]))
        if about["device"] == "cuda":  # where its kernels score trained positions only
            work = work._replace(scored=mine.scored)
    total = flops(shape, drawn, train=False) if samples(row, kind) else 0.0
    if row == "generate":
        return total
    defaults = result["column"] == "defaults"
    total += flops(shape, work, train=True, recomputed=defaults)
    if kind == "first-epoch" or (row == "dpo" and defaults):
        total += flops(shape, work, train=False)
    if row == "ppo":  # the reference's pass, and the critic's before and in the update
        critic = work._replace(scored=0)
        total += flops(shape, work, train=False) + flops(shape, critic, train=False) + flops(shape, critic, train=True)
    return total


def samples(row: str, kind: str) -> bool:
    """Whether responses are sampled in what is timed."""
    return row in ("generate", "ppo") or kind == "step"


def limit_share(session: Session, result: Result, kind: str) -> float:
    """The share of its time that the counted work would take at the measured speed of products and copies."""
    shape, count, dtype = Shape(**session.header["shape"]), len(result["steps"]), session.header["dtype"]
    row, bytes_moved = session.header["row"], 0.0
    if samples(row, kind):  # the weights are read once for each token of the longest response
        bytes_moved = session.header["longest"] * shape.parameters * (2 if dtype == "bf16" else 4)
    if row != "generate":
        each = optimiser_bytes(shape, dtype if result["side"] == "ours" else "fp32")
        bytes_moved += count * each * (2 if row == "ppo" else 1)
    least = operations(session, result, kind) / (rate(result) * 1e9) + bytes_moved / (rate(result, "gbs") * 1e9)
    return least / seconds(result, kind)


def ratios(session: Session, column: str, kind: str) -> dict[str, Any]:
    """Ratios of the peer's seconds to ours, repeat by repeat; also in units of products the machine would have made."""
    pairs = list(zip(repeats(session, "ours", kind), repeats(session, column, kind), strict=False))
    raw = [seconds(b, kind) / seconds(a, kind) for a, b in pairs]
    corrected = [x * rate(b) / rate(a) for x, (a, b) in zip(raw, pairs, strict=True)]
    bound = operations(session, pairs[0][1], kind) / operations(session, pairs[0][0], kind)
    return {"ratio": median(raw), "low": min(raw), "high": max(raw), "corrected": median(corrected), "bound": bound}


def ratio_lines(session: Session, peer: str) -> list[str]:
    """One line a ratio, the peer's defaults first."""
    row, out = session.header["row"], list[str]()
    for column in ("defaults", "tuned"):
        for kind in kinds_of(row):
            r = ratios(session, column, kind)
            name = f"{row} {kind}".strip()
            out.append(
                f"{name} vs {peer} {column}: {r['ratio']:.2f}x ({r['low']:.2f} to {r['high']:.2f}; corrected for drift "
                f"{r['corrected']:.2f}; bound from token counts {r['bound']:.2f})"
            )
    return out


def table(session: Session) -> list[dict[str, Any]]:
    """A line a column and kind: seconds a step, shares by phase, memory and the share of the machine's limit."""
    out: list[dict[str, Any]] = []
    for column in ("ours", "defaults", "tuned"):
        for kind in kinds_of(session.header["row"]):
            if not (results := repeats(session, column, kind)):
                continue
            times = [seconds(r, kind) / len(r["steps"]) for r in results]
            out.append(
                {
                    "column": f"{column} {kind}".strip(),
                    "seconds": median(times),
                    "low": min(times),
                    "high": max(times),
                    "shares": shares(results, kind),
                    "above": median(r["above"] for r in results),
                    "limit": median(limit_share(session, r, kind) for r in results),
                }
            )
    used = [p for p in PHASES if any(line["shares"][p] for line in out)]
    return [line | {"shares": {p: line["shares"][p] for p in used}} for line in out]


def rate_lines(session: Session) -> list[str]:
    """Tokens that are sampled a second, where any are."""
    row, tokens = session.header["row"], sum(sum(i["branches"]) for i in session.header["items"])
    kind = kinds_of(row)[-1]
    if not samples(row, kind):
        return []
    phase = "total" if row == "generate" else "rollout"
    found = [
        (c, [tokens / sum(step[phase] for step in r["steps"]) for r in repeats(session, c, kind)])
        for c in ("ours", "defaults", "tuned")
    ]
    return [f"sampling, {c}: {median(x):.1f} tokens/s ({min(x):.1f} to {max(x):.1f})" for c, x in found if x]


def sync_lines(session: Session) -> list[str]:
    """What it takes to give the in-process engine new weights, beside the seconds of a whole step."""
    results = [r for r in repeats(session, "ours", "step") if "sync" in r]
    if not results:
        return []
    spent = median(r["sync"] for r in results)
    share = median(r["sync"] / (seconds(r, "step") / len(r["steps"])) for r in results)
    return [
        "weights to the engine: 0 s where all are trained, it reads the trainer's own; "
        f"an adapter of rank 16 merged and taken out again {spent:.3f} s, {share:.2%} of a step"
    ]


def shares(results: list[Result], kind: str) -> dict[str, float]:
    """Each phase's share of the time, all repeats together."""
    spent = {p: sum(s.get(p, 0.0) for r in results for s in r["steps"]) for p in PHASES}
    if kind == "first-epoch":
        spent["reference"] += sum(r.get("reference", 0.0) for r in results)
    return {phase: x / sum(spent.values()) for phase, x in spent.items()}


PHASES = ("rollout", "reference", "forward", "backward", "optimiser")


def table_lines(session: Session) -> list[str]:
    """The table as text."""
    found = table(session)
    head = f"{'column':<24}{'s a step':>9}{'low':>8}{'high':>8}" + "".join(f"{p:>11}" for p in found[0]["shares"])
    lines = [head + f"{'MB above':>10}{'of limit':>10}"]
    for line in found:
        parts = "".join(f"{share:>11.0%}" for share in line["shares"].values())
        lines.append(
            f"{line['column']:<24}{line['seconds']:>9.2f}{line['low']:>8.2f}{line['high']:>8.2f}{parts}"
            f"{line['above'] / 1e6:>10.0f}{line['limit']:>10.0%}"
        )
    return lines


def drift_line(session: Session) -> str:
    """How far the machine's own speed moved over the session."""
    found = [c for r in session.results if r["part"].startswith(("repeat", "step")) for c in r["calibration"]]
    rates, copies = [c["gflops"] for c in found], [c["gbs"] for c in found]
    return (
        f"the machine: products at {median(rates):.0f} GFLOP/s ({min(rates):.0f} to {max(rates):.0f}), "
        f"copies at {median(copies):.1f} GB/s ({min(copies):.1f} to {max(copies):.1f})"
    )


CHECKPOINTING = {"on": ("ours checkpointed", "defaults"), "off": ("ours", "tuned")}
"""Columns whose memory is compared: those with activation checkpointing, and those without."""


def memory_lines(session: Session) -> list[str]:
    """Peak memory of one long pair a step, above weights, masters, moments and libraries, and the seconds of that step."""
    found = {r["column"]: r for r in session.results if r["part"] == "memory"}
    lines: list[str] = []
    for setting, columns in CHECKPOINTING.items():
        mine, theirs = (found.get(c) for c in columns)
        for column, result in zip(columns, (mine, theirs), strict=True):
            if result is not None:
                copy = f", {result['copy'] / 1e6:.0f} of them the reference's weights" if result.get("copy") else ""
                times = median(step["total"] for step in result["steps"])
                lines.append(
                    f"memory, one pair a step of {session.header['long']} tokens, checkpointing {setting}, {column}: "
                    f"{result['above'] / 1e6:.0f} MB{copy}; {times:.1f} s a step"
                )
        if mine and theirs:
            share = mine["above"] / theirs["above"]
            lines.append(f"  checkpointing {setting}, both sides: ours takes {share:.0%} of the peer's memory")
    return lines
