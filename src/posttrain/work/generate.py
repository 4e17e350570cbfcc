"""Sampling a policy on a set of prompts, for data that is trained on later."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from posttrain.data.collate import prompt_ids
from posttrain.data.write import write_jsonl
from posttrain.models.load import load_policy
from posttrain.rewards.builders import SAMPLED
from posttrain.rollout.engine import Request, Sampling
from posttrain.rollout.local import LocalEngine
from posttrain.stages import Context, Generate
from posttrain.train.journal import Journal
from posttrain.train.progress import progress
from posttrain.types import Example, Message, Response, stable_hash
from posttrain.work.inputs import Start, choose_dtype, load_examples, start_from


def run(stage: Generate, ctx: Context) -> None:
    """Sample lot by lot, each on disk before the next, then write them all."""
    start = start_from(stage.model, ctx)
    examples = load_examples(stage, ctx, stage.part)
    examples = examples if stage.rows is None else examples[stage.rows[0] : stage.rows[1]]
    ids, report = prompt_ids(start.tokenizer, examples, max_length=stage.max_length, overlong=stage.overlong)
    ctx.console.print(f"prompts: {report}", highlight=False)
    policy = load_policy(start.path, dtype=choose_dtype(stage.dtype, start.path))
    engine = LocalEngine(policy, start.stop_ids, stage.slots)
    kept = [examples[i] for i in report.index]
    write_part(ctx, "samples", sampled(stage, ctx, start, engine, kept, ids))


def write_part(ctx: Context, part: str, examples: Iterable[Example]) -> Path:
    """Write a part of the data that a stage makes, and say where it is."""
    path = ctx.dir / "data" / f"{part}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    count = write_jsonl(path, (replace(e, file="", row=0) for e in examples))
    ctx.console.print(f"{count} examples in {path}", highlight=False, soft_wrap=True)
    return path


def sampled(
    stage: Generate,
    ctx: Context,
    start: Start,
    engine: LocalEngine,
    examples: Sequence[Example],
    ids: Sequence[Sequence[int]],
) -> Iterator[Example]:
    """Each example with its samples after the answers that it had; draws depend on (seed, prompt, occurrence, sample)."""
    sampling = Sampling(
        max_new_tokens=stage.max_new_tokens, temperature=stage.temperature, top_k=stage.top_k, top_p=stage.top_p
    )
    journal, seen = Journal(ctx.dir / "journal"), dict[str, int]()
    requests: list[list[Request]] = []
    for example, prompt in zip(examples, ids, strict=True):
        occurrence = seen[example.prompt_key] = seen.get(example.prompt_key, -1) + 1
        key = (ctx.seed, "generate", example.prompt_key, occurrence)
        requests.append([Request(tuple(prompt), (*key, k)) for k in range(stage.samples)])
    with progress(ctx.console, "generate", len(examples) * stage.samples) as update:
        for first in range(0, len(examples), stage.at_once):
            lot = [r for row in requests[first : first + stage.at_once] for r in row]
            name = f"samples {stable_hash([[r.ids, r.key] for r in lot] + [vars(sampling)])}"

            def make(lot: Sequence[Request] = lot) -> list[Any]:
                return [(r.ids, r.logp, r.stopped) for r in engine.generate(lot, sampling)]

            found = iter(journal.once(first, name, make))
            update(first * stage.samples + len(lot), "")
            for example in examples[first : first + stage.at_once]:
                own = tuple(response(start, *next(found)) for _ in range(stage.samples))
                yield replace(example, responses=(*example.responses, *own))


def response(start: Start, ids: Sequence[int], logp: Sequence[float], stopped: bool) -> Response:
    """A sample as a response."""
    made = {"ids": list(ids), "logp": list(logp), "stopped": stopped}
    return Response(messages=(Message(role="assistant", content=start.decode(ids)),), meta={SAMPLED: made})
