"""Seconds and memory of a DPO step as its sizes grow: ``python -m benchmarks.scaling [responses context pairs vocabulary]``.

Each point is one size in a process of its own: a warm-up and two timed steps over random tokens, the reference's pass (a
step's share of it) beside them. Tokens that are random cost what others cost. ``vocabulary`` varies the output layer of a
small random network; the others train ``--model``.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from benchmarks import kept
from benchmarks.compare.counts import Shape, flops, kept_bytes, optimiser_bytes, packed, shape_of, step_bytes
from benchmarks.compare.session import Task, run_task
from benchmarks.compare.workload import lengths

from posttrain.machine import fast_bf16
from posttrain.models.load import find_model

NAME = "scaling"
STEPS = 3
"""The first warms up."""

SMALL = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 9,
    "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
"""The network whose vocabulary varies."""


class Size(NamedTuple):
    """One step: prompts, tokens of each, responses to each, tokens of each; and the vocabulary, 0 = the model's own."""

    prompts: int = 1
    prompt: int = 256
    responses: int = 2
    response: int = 64
    vocabulary: int = 0


PANELS: dict[str, tuple[str, dict[int, Size]]] = {
    "responses": ("responses to a prompt (256 tokens, responses of 64)", {k: Size(responses=k) for k in (2, 4, 8, 16)}),
    "context": (
        "tokens of a response with its prompt, one pair, half of it prompt",
        {n: Size(prompt=n // 2, response=n // 2) for n in (256, 512, 1024, 2048)},
    ),
    "pairs": (
        "pairs a step (64 tokens, responses of 64)",
        {n: Size(prompts=n, prompt=64) for n in (1, 2, 4, 8, 16)},
    ),
    "vocabulary": (
        "vocabulary of a network of four layers (2 pairs, 256 tokens, responses of 64)",
        {1024 * k: Size(prompts=2, vocabulary=1024 * k) for k in (8, 16, 32, 64, 128)},
    ),
}
"""By what grows: what it is, and the sizes."""


def main() -> None:
    """Measure each point of each panel and keep it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("panels", nargs="*", choices=[*PANELS, []], default=[], metavar="PANEL", help="; ".join(PANELS))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16" if fast_bf16() else "fp32")
    parser.add_argument("--points", type=int, default=99, help="the first so many of each panel")
    options = parser.parse_args()
    found = find_model(options.model)
    for panel in options.panels or list(PANELS):
        for x, size in list(PANELS[panel][1].items())[: options.points]:
            with tempfile.TemporaryDirectory() as folder:
                model = random_network(Path(folder), size.vocabulary) if size.vocabulary else found.path
                label = "random weights" if size.vocabulary else found.label
                measured = point(model, size, options.dtype)
            about = {"panel": panel, "x": x, "label": label, "dtype": options.dtype, "threads": kept.threads()}
            record = kept.append(NAME, about | measured)
            print(
                f"{panel} {x}: {record['seconds']:.2f} s a step ({limit(record):.2f} at the machine's speed), "
                f"{record['above'] / 1e6:.0f} MB ({held(record) / 1e6:.0f} counted)",
                flush=True,
            )


def random_network(folder: Path, vocabulary: int) -> str:
    """A network of `SMALL` with random weights, saved."""
    from transformers import AutoModelForCausalLM, LlamaConfig, set_seed
    from transformers.utils import logging

    logging.disable_progress_bar()
    set_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, vocab_size=vocabulary)).save_pretrained(folder)
    return str(folder)


def rows_of(size: Size, vocabulary: int, steps: int) -> list[dict[str, Any]]:
    """Random rows of ``steps`` steps, the same for the same size."""
    draw = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(vocabulary) for _ in range(count)]

    return [
        {"prompt": tokens(size.prompt), "branches": [tokens(size.response) for _ in range(size.responses)]}
        for _ in range(steps * size.prompts)
    ]


def point(model: str, size: Size, dtype: str) -> dict[str, Any]:
    """Seconds a step, bytes above weights and optimiser, and what counts are made from."""
    vocabulary = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
    rows = rows_of(size, vocabulary, STEPS)
    job = {"row": "dpo", "device": "cpu", "dtype": dtype, "threads": kept.threads(), "lr": 1e-6, "model": model}
    result = run_task(Task(NAME, "ours", "ours", job | {"rows": rows, "per_step": size.prompts}), "none")
    return {
        "seconds": median(step["total"] for step in result["steps"]) + result["reference"] / len(result["steps"]),
        "above": result["above"],
        "calibration": {k: fmean(c[k] for c in result["calibration"]) for k in ("gflops", "gbs")},
        "items": lengths(rows[: size.prompts]),
        "shape": shape_of(model)._asdict(),
        "kept": kept_bytes(model, dtype),
        "vocabulary": vocabulary,
    }


def limit(record: kept.Record) -> float:
    """Seconds that the counted work of a step and of its reference would take at the speed of products and copies."""
    shape, work = Shape(**record["shape"]), packed(record["items"])
    operations = flops(shape, work, train=True) + flops(shape, work, train=False)
    speed = record["calibration"]
    return operations / (speed["gflops"] * 1e9) + optimiser_bytes(shape, record["dtype"]) / (speed["gbs"] * 1e9)


MAX_TOKENS = 1024
"""The memory knob of these runs: a step's tokens are cut into passes of so many, or of one prompt with its responses."""


def held(record: kept.Record) -> float:
    """Bytes that the step must hold, as counted."""
    items = record["items"]  # all alike
    scored = sum(items[0]["branches"])
    tree = items[0]["prompt"] + scored
    trees = min(len(items), max(1, MAX_TOKENS // tree))
    logits = trees * scored * record["vocabulary"]
    return step_bytes(Shape(**record["shape"]), record["kept"], trees * tree, logits, record["dtype"])


def section(images: Path) -> str:
    """The page's part with its plot, from the newest record of each point; "" where there is none."""
    newest = {(r["panel"], r["x"]): r for r in kept.read(NAME)}
    if not newest:
        return ""
    panels = {p: [newest[p, x] for x in sizes if (p, x) in newest] for p, (_, sizes) in PANELS.items()}
    panels = {p: records for p, records in panels.items() if records}
    lines = [
        "## Growth\n",
        "    python -m benchmarks.scaling\n",
        "Seconds of a DPO step with its reference pass, and its peak memory above weights, masters and moments. Dashed: counted "
        "operations and bytes at the measured speed of products and copies, divided by one share for the whole panel (the "
        "median of its points); counted bytes as they are. Measured points that rise no faster than the dashed line grow no "
        "faster than they must. Passes hold at most 1,024 tokens, or one prompt with its responses.\n",
        f"![seconds and memory against sizes](images/{plot(panels, images)})\n",
        "| what grows | | s a step | counted s at the machine's speed | share | MB | counted MB |",
        "|" + "---|" * 7,
    ]
    for panel, records in panels.items():
        lines += [
            f"| {panel} | {r['x']:,} | {r['seconds']:.2f} | {limit(r):.2f} | {limit(r) / r['seconds']:.0%} | "
            f"{r['above'] / 1e6:.0f} | {held(r) / 1e6:.0f} |"
            for r in records
        ]
    first = next(iter(panels.values()))[0]
    return "\n".join([*lines, "", f"{kept.origin(first)}; {first['dtype']}.\n"])


def plot(panels: dict[str, list[kept.Record]], images: Path) -> str:
    """A column a panel, seconds above memory, both axes logarithmic; returns the file's name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(
        2, len(panels), figsize=(3.4 * len(panels), 5.4), layout="constrained", squeeze=False
    )
    for k, (panel, records) in enumerate(panels.items()):
        x, share = [r["x"] for r in records], median(limit(r) / r["seconds"] for r in records)
        above, below = grid[0][k], grid[1][k]
        above.plot(x, [r["seconds"] for r in records], "o-", color="#1f6feb", label="measured")
        above.plot(x, [limit(r) / share for r in records], "--", color="#bc4c00", label=f"counted, at {share:.0%}")
        below.plot(x, [r["above"] / 1e6 for r in records], "o-", color="#1f6feb", label="measured")
        below.plot(x, [held(r) / 1e6 for r in records], "--", color="#bc4c00", label="counted")
        above.set_title(panel, fontsize=10)
        for axes, name in ((above, "seconds a step"), (below, "MB above weights and optimiser")):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter("{x:g}")
            axes.set_xticks(x, [f"{n // 1024}k" if n >= 4096 else str(n) for n in x])
            axes.minorticks_off()
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, fontsize=8)
            if k == 0:
                axes.set_ylabel(name)
    name = f"performance-{NAME}.png"
    figure.savefig(images / name, dpi=120)
    pyplot.close(figure)
    return name


if __name__ == "__main__":
    main()
