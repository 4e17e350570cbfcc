"""What stands beside the samples of a policy-gradient stage: text that is kept, a critic's warm-up, the start's own answers, gold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from posttrain.data.collate import demonstration_rows
from posttrain.errors import ConfigError
from posttrain.evals.overoptimisation import parted
from posttrain.models.policy import Model
from posttrain.rewards.base import Completion, Reward
from posttrain.rewards.gold import GOLD, Relative, WithGold, mean_scores
from posttrain.rollout.engine import Request, Sampling
from posttrain.rollout.local import LocalEngine
from posttrain.stages import Context, Reinforce, Stage
from posttrain.train.checkpoint import write_json
from posttrain.train.critic_first import CriticFirst, CriticFirstSource
from posttrain.train.distributed import world
from posttrain.train.guard import read_rows
from posttrain.train.log import JsonLines
from posttrain.train.ptx import Ptx, PtxSource, ptx_rows
from posttrain.train.sources import Source
from posttrain.types import Example
from posttrain.work.inputs import Start, load_examples, reward_files, row_weights, stage_files
from posttrain.work.rewarding import reward_of


def beside_files(stage: Reinforce) -> list[Path]:
    """Files of the text that is kept and of the gold reward."""
    found: list[Path] = []
    if stage.ptx and not isinstance(_ptx_data(stage), Stage):
        found += stage_files(_Text(data=str(_ptx_data(stage)), model=stage.model))[:1]  # the model's are there already
    if isinstance(stage.gold, str):
        found += reward_files(stage.gold, functions=True)
    return found


@dataclass(frozen=True, kw_only=True)
class _Text(Stage):
    """A reader of demonstrations, in the place of the stage."""

    data: str | Stage
    model: str | Stage = ""
    limit: int | None = None
    skip_bad: int = 0
    DATA = ("demonstrations",)


def _ptx_data(stage: Reinforce) -> str | Stage:
    return stage.data if stage.ptx_data is None else stage.ptx_data


def around(stage: Reinforce, ctx: Context, start: Start, source: Source, objective: Any) -> tuple[Source, Any]:
    """The source and the objective with the text that is kept and the critic's warm-up, where the stage has them."""
    if stage.ptx:
        data = _ptx_data(stage)
        which = "data" if stage.ptx_data is None else "ptx_data"
        inputs = {**ctx.inputs, "data": ctx.inputs[which]} if isinstance(data, Stage) else ctx.inputs
        reader = _Text(data=data, model=stage.model, skip_bad=stage.skip_bad)
        examples = load_examples(reader, replace(ctx, inputs=inputs), "demonstrations")
        rows, report = demonstration_rows(
            start.tokenizer, examples, max_length=stage.max_length, overlong=stage.overlong, history="each"
        )
        ctx.console.print(f"ptx: {report}", highlight=False)
        weights = row_weights([examples[i] for i in report.index], ctx)
        responses = stage.prompts_per_step // stage.updates_per_rollout * stage.samples_per_prompt
        kept = ptx_rows(rows, weights, responses=responses, share=stage.ptx_share, seed=ctx.seed)
        source, objective = PtxSource(source, kept), Ptx(inner=objective, coefficient=stage.ptx)
    if stage.value_warmup:
        source = CriticFirstSource(source, stage.value_warmup * stage.updates_per_rollout)
        objective = CriticFirst(inner=objective)
    return source, objective


# ---------------------------------------------------------------------------- the start's own answers


def against_start(
    stage: Reinforce,
    ctx: Context,
    start: Start,
    reference: Model,
    reward: Reward,
    examples: Sequence[Example],
    ids: Sequence[Sequence[int]],
) -> Reward:
    """The reward less what it gives the start's own answers to each prompt, which are sampled once, kept in ``start_scores.json``."""
    if not stage.against_start:
        return reward
    kept = ctx.dir / "start_scores.json"
    if kept.exists():
        return Relative(reward, json.loads(kept.read_text()))
    k = stage.against_start
    requests = [Request(tuple(p), (ctx.seed, "start", i, j)) for i, p in enumerate(ids) for j in range(k)]
    engine = LocalEngine(reference, start.stop_ids, stage.slots)
    found = engine.generate(requests, Sampling(max_new_tokens=stage.max_new_tokens, temperature=stage.temperature))
    completions = [
        Completion(
            example=examples[i // k],
            text=start.decode(r.ids),
            prompt_ids=r.request.ids,
            ids=r.ids,
            truncated=r.truncated,
            group=i // k,
        )
        for i, r in enumerate(found)
    ]
    base = mean_scores(completions, reward(completions))
    known = [value for value in base.values() if value is not None]
    if not known:
        raise ConfigError(
            "the reward abstained on every answer of the start; expected scores to compare later ones with"
        )
    mean = sum(known) / len(known)
    ctx.console.print(f"the start's answers to {len(base)} prompts score {mean:+.3f} on average", highlight=False)
    if world().writes:
        write_json(kept, base)
    return Relative(reward, base)


# ---------------------------------------------------------------------------- gold


def with_gold(
    stage: Reinforce, ctx: Context, start: Start, reward: Reward, dtype: torch.dtype
) -> tuple[Reward, GoldWatch | None]:
    """The reward with the stage's gold measured beside it, and the hook that watches both; itself and None without gold."""
    if stage.gold is None:
        return reward, None
    inputs = {**ctx.inputs, "reward": ctx.inputs["gold"]} if isinstance(stage.gold, Stage) else ctx.inputs
    most = 2 * stage.max_tokens
    gold = reward_of(stage.gold, replace(ctx, inputs=inputs), dtype=dtype, max_tokens=most, tokenizer=start.tokenizer)
    measured = WithGold(reward, gold, stage.updates_per_rollout, stage.gold_every)
    return measured, GoldWatch(ctx.dir, ctx.console, stage.gold_window)


@dataclass
class GoldWatch:
    """A hook of `posttrain.train.loop.fit` that says when proxy and gold part, and draws both at the end, however that comes.

    Each time they part (`posttrain.evals.overoptimisation.parted`) is a line of ``alarms.jsonl`` and one on the console.
    """

    directory: Path
    console: Console
    window: int
    _pairs: list[tuple[float, float]] | None = None
    _lines: JsonLines | None = field(default=None)

    def __call__(self, step: int, metrics: Any) -> None:
        """Take in a step; one without a measurement is passed over."""
        if self._pairs is None:
            self._pairs = [_pair(row) for row in read_rows(self.directory) if row["step"] < step and GOLD in row]
        if GOLD not in metrics or not world().writes:
            return
        before = self._parted()
        self._pairs.append(_pair(metrics))
        self._lines = self._lines or JsonLines(self.directory / "alarms.jsonl", step)
        if before or not self._parted():
            return
        (proxy, gold), (proxy_now, gold_now) = self._pairs[-self.window], self._pairs[-1]
        text = (
            f"proxy and gold have parted: over {self.window} measured rollouts the reward rose from {proxy:.3f} to {proxy_now:.3f} "
            f"while gold fell from {gold:.3f} to {gold_now:.3f}; the policy follows the reward's faults: stop here, raise kl, give "
            "max_kl, or train the reward on these samples"
        )
        self._lines.write(step, {"kind": "parted", "window": self.window, "text": text})
        self.console.print(f"step {step}: {text}", style="yellow", highlight=False, markup=False, soft_wrap=True)

    def _parted(self) -> bool:
        pairs = self._pairs or []
        return parted([p for p, _ in pairs], [g for _, g in pairs], self.window)

    def __enter__(self) -> GoldWatch:
        """Nothing is held."""
        return self

    def __exit__(self, *error: object) -> None:
        """Draw what was measured."""
        if self._lines is not None:
            self._lines.close()
        from posttrain.evals.plots import gold_png

        image = gold_png(read_rows(self.directory)) if world().writes else None
        if image is not None:
            (self.directory / "overoptimisation.png").write_bytes(image)


def _pair(row: Any) -> tuple[float, float]:
    """Proxy and gold of a row of metrics."""
    return row["reward/mean"], row[GOLD]
