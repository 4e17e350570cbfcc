"""What stands beside PPO on the small world, over seeds: ``python -m benchmarks.systems.ppo [--seeds 1 2 3] [--what kept parted]``.

``kept``: PPO with rewards relative to the start's answers and old answers learnt on (`chatglm_rlhf`), with old answers alone
(`instructgpt`), with neither, from one start and one reward model a seed. ``parted``: a proxy that pays for a phrase without end,
beside one that is gold with noise of the prompt's own; whether the alarm comes. What is expected was declared before, in
``declared-ppo.md``. Lines of ``benchmarks/results/systems-ppo.jsonl`` that are there are not made again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks import kept
from rich.console import Console

from posttrain.data import smallworld
from posttrain.data.collate import demonstration_rows, prompt_ids
from posttrain.evals.statistics import cluster_bootstrap
from posttrain.machine import deterministic_kernels
from posttrain.models.load import find_model, load_policy, load_reward, load_tokenizer
from posttrain.registry import RECIPES
from posttrain.rewards.base import Completion
from posttrain.rollout.engine import Request, Sampling
from posttrain.rollout.local import LocalEngine
from posttrain.runner import run_recipe
from posttrain.stages import Recipe, Reinforce, TrainReward
from posttrain.train.reference import row_logp
from posttrain.types import Example, Message, Response, stable_hash
from posttrain.work.reinforce import load_trained
from posttrain.work.rewarding import scored_by

NAME = "systems-ppo"
GOLD = "posttrain.data.smallworld_gold:gold_total"
PROMPTS, SAMPLES, PROBE = 64, 4, 96
ARMS: dict[str, dict[str, Any]] = {
    "plain": {"ptx": 0.0, "against_start": 0},
    "ptx": {"against_start": 0},
    "chatglm": {},
}
START: dict[str, Any] = {"model": "small", "data": "smallworld", "dtype": "float32"}
NUMBERS: dict[str, Any] = {
    "lora_rank": 8, "lr": 4e-3, "value_lr": 1e-3, "steps": 30, "prompts_per_step": 12, "samples_per_prompt": 4,
    "updates_per_rollout": 1, "max_new_tokens": 32, "kl": 0.0, "ptx": 1.0, "ptx_share": 0.25,
}  # fmt: skip
HACK: dict[str, Any] = {
    "gold": GOLD, "lora_rank": 8, "lr": 4e-3, "steps": 50, "prompts_per_step": 12,
    "samples_per_prompt": 4, "updates_per_rollout": 1, "max_new_tokens": 32, "kl": 0.0, "warmup_steps": 2,
    "algorithm": "rloo", "fused": False,
}  # fmt: skip


def flawed(prompt: str, answer: str) -> float:
    """Gold, and as much again for every "and": a taste that can be served without end."""
    return smallworld.gold(prompt, answer).total + answer.lower().split().count("and")


def honest(prompt: str, answer: str) -> float:
    """Gold, blurred by what the words of the answer happen to be."""
    return smallworld.gold(prompt, answer).total + int(stable_hash([prompt, answer]), 16) % 1000 / 2000


def quiet() -> Console:
    """A console that prints nowhere."""
    return Console(file=StringIO(), width=160)


def probe_nll(model: Any, tokenizer: Any, seed: int) -> np.ndarray:
    """Nats a token of right answers to held-out requests, one a request ``[PROBE]``: the skill that was taught before."""
    rows = smallworld.rankings(PROBE, seed=100 + seed, split="heldout")
    said = lambda role, text: Message(role=role, content=text)  # noqa: E731
    examples = [
        Example(
            prompt=(said("user", r["prompt"]),),
            responses=(Response(messages=(said("assistant", r["completions"][0]),)),),
        )
        for r in rows
    ]
    forest_rows, _ = demonstration_rows(tokenizer, examples, max_length=256, overlong="error")
    with torch.no_grad():
        found = row_logp(model, forest_rows, max_tokens=2048)
    return np.array([-float(x.double().mean()) for x in found])


def answers(model: Any, tokenizer: Any, seed: int) -> list[Completion]:
    """Samples on held-out prompts, the same draws for every policy."""
    rows = smallworld.task_prompts(PROMPTS, seed=100 + seed, split="heldout")
    examples = [Example(prompt=(Message(role="user", content=r["prompt"]),)) for r in rows]
    ids, _ = prompt_ids(tokenizer, examples, max_length=256)
    requests = [Request(tuple(p), (seed, "held out", i, k)) for i, p in enumerate(ids) for k in range(SAMPLES)]
    engine = LocalEngine(model, frozenset({tokenizer.convert_tokens_to_ids("<|end|>")}), slots=64)
    found = engine.generate(requests, Sampling(max_new_tokens=32))
    return [
        Completion(
            example=examples[i // SAMPLES],
            text=tokenizer.decode(r.ids, skip_special_tokens=True).strip(),
            prompt_ids=r.request.ids,
            ids=r.ids,
            truncated=r.truncated,
            group=i // SAMPLES,
        )
        for i, r in enumerate(found)
    ]


def measured(model: Any, run: Path, seed: int) -> dict[str, Any]:
    """A policy's reward and gold on held-out prompts, and its likelihood of right answers."""
    tokenizer = load_tokenizer(find_model("small").path)
    told = answers(model, tokenizer, seed)
    scorer = scored_by(load_reward(str(run / "reward"), dtype=torch.float32), run / "reward", max_tokens=2048)
    reward = [s.value for s in scorer(told)]
    gold = [smallworld.gold(c.example.prompt[0].content, c.text).total for c in told]
    nll = probe_nll(model, tokenizer, seed)
    return {
        "reward": float(np.mean(reward)),
        "gold": float(np.mean(gold)),
        "nll": float(nll.mean()),
        "rows": nll.tolist(),
    }


def first_rollout(place: Path) -> dict[str, Any]:
    """Of the samples before any update: the mean relative reward with its interval, and variances of it and of the reward itself."""
    rows = [json.loads(line) for line in (place / "samples.jsonl").read_text().splitlines()]
    rows = [r for r in rows if r["step"] == 0]
    relative, raw = (np.array([f(r) for r in rows]) for f in (lambda r: r["reward"], lambda r: r["parts"]["raw"]))
    found = cluster_bootstrap(relative, np.array([r["prompt"] for r in rows]))
    first = {"mean": found.mean, "low": found.low, "high": found.high, "raw_mean": float(raw.mean())}
    return {"first": first, "variance": float(relative.var()), "raw_variance": float(raw.var())}


def kept_run(seed: int, folder: Path) -> dict[str, Any]:
    """One start, one reward model, three policies."""
    reward = TrainReward(epochs=3.0, prompts_per_step=8, lora_rank=0, lr=1e-3, **START)
    stage = replace(RECIPES["chatglm_rlhf"]().stages["reinforce"], reward=reward, **START, **NUMBERS)
    stages = {"reward": reward} | {name: replace(stage, **changes) for name, changes in ARMS.items()}
    run = run_recipe(Recipe("kept", stages), root=folder, console=quiet(), seed=seed)
    start = find_model("small").path
    found: dict[str, Any] = {"start": measured(load_policy(start, dtype=torch.float32), run, seed)}
    for name in ARMS:
        found[name] = measured(load_trained(run / name / "policy", start, torch.float32), run, seed)
        rows = [json.loads(line) for line in (run / name / "metrics.jsonl").read_text().splitlines()]
        found[name] |= {"kl": rows[-1]["kl/mean"], "std": [r["reward/std"] for r in rows]}
    return found | first_rollout(run / "chatglm")


def parted_run(seed: int, folder: Path) -> dict[str, Any]:
    """Two proxies from one start; the alarms of each, and where proxy and gold went."""
    found: dict[str, Any] = {}
    for proxy in ("flawed", "honest"):
        stage = Reinforce(reward=f"benchmarks.systems.ppo:{proxy}", **START, **HACK)
        run = run_recipe(Recipe("parted", {proxy: stage}), root=folder, console=quiet(), seed=seed) / proxy
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        columns = {k: [r[k] for r in rows] for k in ("reward/mean", "gold/reward", "kl/mean")}
        alarms = [json.loads(line)["step"] for line in (run / "alarms.jsonl").read_text().splitlines()]
        found[proxy] = columns | {"alarms": alarms}
        if proxy == "flawed":
            (Path(tempfile.gettempdir()) / f"overoptimisation-{seed}.png").write_bytes(
                (run / "overoptimisation.png").read_bytes()
            )
    return found


WHAT = {"kept": kept_run, "parted": parted_run}


def over_prompts(lines: list[dict[str, Any]], value: Any) -> str:
    """A mean over the probe's requests of all seeds, with its 95 % interval by request and seed."""
    rows = np.concatenate([value(line) for line in lines])
    found = cluster_bootstrap(rows, np.arange(len(rows)))
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def table(lines: list[dict[str, Any]]) -> str:
    """What was measured, as a page's tables."""
    mine = [line for line in lines if line["what"] == "kept"]
    out = [
        "| seed | relative reward before any update [95 %] | reward there | variance, relative | variance of the reward |",
        "|---|---|---|---|---|",
    ]
    for x in mine:
        s = x["first"]
        out.append(
            f"| {x['seed']} | {s['mean']:+.3f} [{s['low']:+.3f}, {s['high']:+.3f}] | {s['raw_mean']:+.3f} | {x['variance']:.3f} "
            f"| {x['raw_variance']:.3f} |"
        )
    out += [
        "",
        "| seed | policy | reward, held out | gold | nats a token of right answers | KL |",
        "|---|---|---|---|---|---|",
    ]
    for x in mine:
        for name in ("start", *ARMS):
            a = x[name]
            kl = f"{a['kl']:.1f}" if "kl" in a else ""
            out.append(f"| {x['seed']} | {name} | {a['reward']:+.3f} | {a['gold']:.3f} | {a['nll']:.3f} | {kl} |")
    if mine:
        rises = lambda name: lambda x: np.array(x[name]["rows"]) - np.array(x["start"]["rows"])  # noqa: E731
        out += ["", "| rise of nats a token over the start, all seeds | |", "|---|---|"]
        out += [f"| {name} | {over_prompts(mine, rises(name))} |" for name in ARMS]
        for name in ("ptx", "chatglm"):
            spared = lambda x, name=name: np.array(x["plain"]["rows"]) - np.array(x[name]["rows"])  # noqa: E731
            half = lambda x, name=name: rises("plain")(x) / 2 - rises(name)(x)  # noqa: E731
            out.append(f"| plain less {name} | {over_prompts(mine, spared)} |")
            out.append(f"| half of plain's less {name} | {over_prompts(mine, half)} |")
            gains = [np.mean([x[k]["reward"] - x["start"]["reward"] for x in mine]) for k in (name, "plain")]
            out.append(f"| {name}: share of plain's gain in reward | {gains[0] / gains[1]:.2f} |")
    out += [
        "",
        "| seed | proxy | first and last 5: proxy | gold | KL at the end | alarms at steps |",
        "|---|---|---|---|---|---|",
    ]
    for x in (line for line in lines if line["what"] == "parted"):
        for proxy in ("flawed", "honest"):
            ends = [
                f"{np.mean(x[proxy][k][:5]):.2f} to {np.mean(x[proxy][k][-5:]):.2f}"
                for k in ("reward/mean", "gold/reward")
            ]
            kl, alarms = x[proxy]["kl/mean"][-1], ", ".join(map(str, x[proxy]["alarms"])) or "none"
            out.append(f"| {x['seed']} | {proxy} | {ends[0]} | {ends[1]} | {kl:.1f} | {alarms} |")
    return "\n".join(out)


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--what", nargs="+", default=list(WHAT), choices=list(WHAT))
    parser.add_argument("--pilot", action="store_true", help="print and keep nothing")
    given = parser.parse_args()
    deterministic_kernels()
    known = set[Any]() if given.pilot else {(r["what"], r["seed"]) for r in kept.read(NAME)}
    for seed in given.seeds:
        for what in given.what:
            if (what, seed) in known:
                continue
            began = time.process_time()
            with tempfile.TemporaryDirectory() as folder:
                found = WHAT[what](seed, Path(folder))
            record = {
                "what": what,
                "seed": seed,
                "cpu": time.process_time() - began,
                "threads": kept.threads(),
                **found,
            }
            print(table([record])) if given.pilot else kept.append(NAME, record)
    if not given.pilot:
        print(table(kept.read(NAME)))


if __name__ == "__main__":
    main()
