"""Rating policies side by side with a baseline, and seeing whether what rises is only the reward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from posttrain.data.collate import prompt_ids
from posttrain.evals.statistics import cluster_bootstrap, kendall
from posttrain.models.load import load_policy
from posttrain.rewards.base import Completion
from posttrain.rewards.comparing import Comparison
from posttrain.rollout.engine import Request, Sampling
from posttrain.rollout.local import LocalEngine
from posttrain.stages import Context
from posttrain.stages.refining import AutoRate
from posttrain.train.checkpoint import write_json
from posttrain.types import Example
from posttrain.work.inputs import Start, choose_dtype, load_examples, start_from
from posttrain.work.merge import trained
from posttrain.work.refining import judge_of
from posttrain.work.reinforce import load_trained
from posttrain.work.rewarding import reward_of


def run(stage: AutoRate, ctx: Context) -> None:
    """Sample all with the same draws, score, compare, and write ``results.json``."""
    start = start_from(stage.baseline, ctx, "baseline")
    dtype = choose_dtype(stage.dtype, start.path)
    examples = [
        replace(e, responses=(), preferences=()) for e in load_examples(stage, ctx, "heldout_prompts")[: stage.prompts]
    ]
    ids, report = prompt_ids(start.tokenizer, examples, max_length=stage.max_length, overlong=stage.overlong)
    examples = [examples[i] for i in report.index]
    reward = reward_of(stage.reward, ctx, dtype=dtype, max_tokens=stage.max_tokens, tokenizer=start.tokenizer)
    judge = judge_of(stage.judge, ctx, dtype=stage.dtype, max_tokens=stage.max_tokens)
    models = {"baseline": load_policy(start.path, dtype=dtype)}
    for k in range(len(stage.policies)):
        place = ctx.inputs[f"policies.{k}"]
        models[place.name] = load_trained(trained(place), start.path, dtype)
    answers = {name: sampled(stage, ctx, start, model, examples, ids) for name, model in models.items()}
    rates = {
        n: win_rates(judge, answers["baseline"], own, stage.samples) for n, own in answers.items() if n != "baseline"
    }
    rewards = {
        name: float(np.mean([s.value for s in reward(own) if s.value is not None])) for name, own in answers.items()
    }
    record = verdict(rewards, rates)
    write_json(ctx.dir / "results.json", record)
    for name, row in record["policies"].items():
        ctx.console.print(f"{name}: reward {row['reward']:+.3f}, preferred {row['win_rate']:.0%}", highlight=False)
    if record["hacked"]:
        ctx.console.print(
            f"[red]the reward is being hacked: the judge prefers policies less the more reward they get (tau {record['tau']:+.2f})[/]"
        )
    ctx.console.print(f"picked: {record['picked']}", highlight=False)


def verdict(rewards: dict[str, float], rates: dict[str, np.ndarray]) -> dict[str, Any]:
    """What the auto-rater says, from mean rewards and the win rates by prompt over the baseline.

    ``tau`` is Kendall's of reward and win rate over the policies and the baseline, whose rate is 1/2; below 0 the reward is
    being hacked. Picked is the highest win rate, the baseline where none is above 1/2.
    """
    policies: dict[str, dict[str, float]] = {"baseline": {"reward": rewards["baseline"], "win_rate": 0.5}}
    for name, found in rates.items():
        interval = cluster_bootstrap(found, np.arange(len(found)))
        policies[name] = {
            "reward": rewards[name],
            "win_rate": interval.mean,
            "low": interval.low,
            "high": interval.high,
        }
    tau = kendall([p["reward"] for p in policies.values()], [p["win_rate"] for p in policies.values()])
    picked = max(policies, key=lambda name: policies[name]["win_rate"])
    return {"policies": policies, "picked": picked, "tau": None if math.isnan(tau) else tau, "hacked": tau < 0}


def sampled(
    stage: AutoRate, ctx: Context, start: Start, model: Any, examples: Sequence[Example], ids: Sequence[Sequence[int]]
) -> list[Completion]:
    """``stage.samples`` answers of a policy to each prompt; every policy gets the same draws."""
    requests = [
        Request(tuple(prompt), (ctx.seed, "autorate", e.prompt_key, k))
        for e, prompt in zip(examples, ids, strict=True)
        for k in range(stage.samples)
    ]
    sampling = Sampling(max_new_tokens=stage.max_new_tokens, temperature=stage.temperature)
    found = LocalEngine(model, start.stop_ids, stage.slots).generate(requests, sampling)
    return [
        Completion(
            example=examples[i // stage.samples],
            text=start.decode(r.ids),
            prompt_ids=r.request.ids,
            ids=r.ids,
            truncated=r.truncated,
            group=i // stage.samples,
        )
        for i, r in enumerate(found)
    ]


def win_rates(judge: Comparison, baseline: Sequence[Completion], own: Sequence[Completion], samples: int) -> np.ndarray:
    """The probability by prompt that an answer beats the baseline's of the same draw, both orders asked, ``[prompts]``."""

    def beats(a: Completion, b: Completion) -> float:
        prompt = a.example.prompt[-1].content
        return 0.5 if a.text == b.text else (judge(prompt, a.text, b.text) + 1 - judge(prompt, b.text, a.text)) / 2

    found = np.array([beats(a, b) for a, b in zip(own, baseline, strict=True)])
    return found.reshape(-1, samples).mean(1)
