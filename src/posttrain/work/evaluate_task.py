"""What policies score on held-out prompts whose answers a reward can judge."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from posttrain.data.collate import prompt_ids
from posttrain.errors import RewardError
from posttrain.evals import results as sections
from posttrain.models.load import load_policy
from posttrain.rewards.base import Completion, Score, require_finite
from posttrain.rollout.engine import Engine, Request, Sampling
from posttrain.rollout.environment import find_environment
from posttrain.rollout.local import LocalEngine
from posttrain.stages import Context
from posttrain.stages.checked import EvaluateTask
from posttrain.work.conversing import conversing, offered
from posttrain.work.heldout import machine, stage_seconds
from posttrain.work.inputs import choose_dtype, load_examples, start_from
from posttrain.work.rewarding import reward_of

WHOLE = "reward"
"""The column of a score itself, beside those of its parts."""


def run(stage: EvaluateTask, ctx: Context) -> None:
    """Sample and score every policy on the same prompts with the same draws; write ``results.json``."""
    given = load_examples(stage, ctx, "heldout_prompts")[: stage.prompts]
    environment = None if stage.environment is None else find_environment(stage.environment)
    examples = offered([replace(e, responses=(), preferences=()) for e in given], environment)
    names = [ctx.inputs[f"policies.{k}"].name for k in range(len(stage.policies))]
    first = start_from(stage.policies[0], ctx, "policies.0")
    ids, report = prompt_ids(first.tokenizer, examples, max_length=stage.max_length, overlong=stage.overlong)
    ctx.console.print(f"held-out prompts: {report}", highlight=False)
    kept = [examples[i] for i in report.index]
    dtype = choose_dtype(stage.dtype, first.path)
    reward = reward_of(stage.reward, ctx, dtype=dtype, max_tokens=stage.max_tokens, tokenizer=first.tokenizer)
    requests = [Request(tuple(p), (ctx.seed, "task", i, k)) for i, p in enumerate(ids) for k in range(stage.samples)]
    sampling = Sampling(max_new_tokens=stage.max_new_tokens, temperature=stage.temperature)
    scores: dict[str, dict[str, Any]] = {}
    length: dict[str, Any] = {}
    truncated: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    for k, name in enumerate(names):
        start = start_from(stage.policies[k], ctx, f"policies.{k}")
        began = time.perf_counter()
        policy = load_policy(start.path, dtype=dtype)
        engine: Engine = LocalEngine(policy, start.stop_ids, stage.slots)
        engine = conversing(engine, environment, start, kept, ids, stage.max_length)
        found = engine.generate(requests, sampling)
        seconds[name] = time.perf_counter() - began
        completions = [
            Completion(
                example=kept[i // stage.samples],
                text=r.turns[-1].content if r.turns else start.decode(r.ids),
                prompt_ids=r.request.ids,
                ids=r.ids,
                truncated=r.truncated,
                group=i // stage.samples,
                turns=r.turns,
            )
            for i, r in enumerate(found)
        ]
        scores[name] = columns(reward(completions), completions, stage.samples)
        length[name] = by_prompt([sum(r.own) for r in found], stage.samples)
        truncated[name] = by_prompt([r.truncated for r in found], stage.samples)
    section = sections.policy_section(scores, length=length, truncated=truncated, seconds=seconds)
    results = sections.closing_results(machine=machine(), policy=section, stages=stage_seconds(ctx))
    sections.write_results(results, ctx.dir / "results.json")


def columns(found: list[Score], completions: list[Completion], samples: int) -> dict[str, list[list[float]]]:
    """Scores and those of their parts that every response has, each ``[prompts, samples]``.

    Raises:
        RewardError: a response has no score.
    """
    require_finite(completions, found)
    values = [s.value for s in found if s.value is not None]
    if len(values) < len(found):
        raise RewardError(
            f"the reward gave {len(found) - len(values)} of {len(found)} held-out responses no score; evaluate on prompts that "
            "it can judge"
        )
    names = sorted(set.intersection(*(set(s.parts) for s in found)))
    return {WHOLE: by_prompt(values, samples)} | {n: by_prompt([s.parts[n] for s in found], samples) for n in names}


def by_prompt(values: list[Any], samples: int) -> list[list[Any]]:
    """Values as ``[prompts, samples]``."""
    return [values[i : i + samples] for i in range(0, len(values), samples)]
