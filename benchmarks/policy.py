"""Every policy-gradient algorithm on the small world with equal samples: ``python -m benchmarks.policy`` runs what is missing.

A seed's reward model learns from rankings once; then every algorithm starts from the small base model and draws 768 answers,
64 a rollout, each rollout serving two updates. Learning rate and sizes are the same for all and were chosen on seeds 10 and 11
with ``ppo``, ``grpo``, ``apa`` and ``raft`` at 3e-4 and 1e-3; all else is as the algorithm's row has it, its KL coefficient too. Gold
scores are measured and never trained on. ``--page`` writes ``docs/results/policy.md`` (`benchmarks.policy_page`).
"""

from __future__ import annotations

import argparse
import copy
import io
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.kept import append, read, threads
from rich.console import Console

from posttrain.data import parse_row, smallworld, stop_ids
from posttrain.data.collate import prompt_ids, ranking_rows
from posttrain.evals.reward import accuracy, pair_outcomes, ranking_ranks
from posttrain.forest import Branch, Row
from posttrain.losses.shaping import overlong_penalty
from posttrain.models.load import (
    find_model,
    load_generation_config,
    load_policy,
    load_tokenizer,
    new_reward,
    role,
    value_role,
)
from posttrain.models.policy import Model
from posttrain.rewards.base import Completion, Score
from posttrain.rewards.model import reward_model, score_rows
from posttrain.rewards.selection import best_of_n_kl, kept
from posttrain.rollout.engine import Request, Rollout, Sampling
from posttrain.rollout.local import LocalEngine
from posttrain.train.algorithms import ALGORITHMS
from posttrain.train.loop import Run, fit
from posttrain.train.objectives import RewardModel, Supervised
from posttrain.train.optim import Optim
from posttrain.train.policy_gradient import estimator, policy_gradient
from posttrain.train.rollouts import Plan, RolloutSource
from posttrain.train.sources import demonstration_source, ranking_source
from posttrain.types import Example, Message
from posttrain.work.measure import answers, divergence

NAME, SEEDS = "policy", (0, 1, 2)
ROLLOUTS, SAMPLES, UPDATES, GROUP = 12, 64, 2, 8
LR, VALUE_LR, WARMUP, LONGEST, CUT = 5e-4, 1e-3, 4, 32, -2.0
RANKINGS, REWARD_EPOCHS, REWARD_LR = 320, 2, 1e-3
PROMPTS, HELD, TOKENS = 256, 64, 4096
SELECTING = ("best_of_n", "raft", "rest")
NOT_RUN = {"grpo_process": "its reward scores steps of reasoning, which these answers do not have"}
Numbers = dict[str, float]


@dataclass
class World:
    """What all runs of a seed share: the start, prompts and a reward model whose scores are in deviations of the start's own."""

    seed: int

    def __post_init__(self) -> None:
        found = find_model("small-base")
        self.path, self.tokenizer = found.path, load_tokenizer(found.path)
        self.stops = stop_ids(self.tokenizer, load_generation_config(found.path))
        self.start = load_policy(found.path, dtype=torch.float32)
        self.examples, self.ids = self.prompts(PROMPTS, self.seed, "train")
        self.held, self.held_ids = self.prompts(HELD, 0, "heldout")

    def prompts(self, count: int, seed: int, split: str) -> tuple[list[Example], list[list[int]]]:
        """Requests of the small world, and their ids."""
        rows = smallworld.task_prompts(count, seed=seed, split=split)
        examples = [Example(prompt=(Message(role="user", content=row["prompt"]),)) for row in rows]
        return examples, prompt_ids(self.tokenizer, examples, max_length=256)[0]

    @cached_property
    def judge(self) -> Model:
        """The reward model."""
        rankings = [parse_row(row) for row in smallworld.rankings(RANKINGS, seed=1000 + self.seed)]
        rows, report = ranking_rows(self.tokenizer, rankings, max_length=256)
        ranks = [[r.rank or 0 for r in rankings[i].responses] for i in report.index]
        model = new_reward(self.path, dtype=torch.float32, seed=self.seed)
        source = ranking_source(rows, ranks, per_step=16, seed=self.seed)
        steps = REWARD_EPOCHS * source.steps_per_epoch
        train({"reward": model}, RewardModel(), source, steps, Optim(lr=REWARD_LR, schedule="cosine", warmup_steps=4))
        model.net.requires_grad_(False)
        return model

    @cached_property
    def scale(self) -> tuple[float, float]:
        """Mean and deviation of the reward model's scores of the start's own answers to the training prompts."""
        written = answers(self.start, self.ids, self.stops, seed=self.seed, max_new_tokens=LONGEST)
        scores = [s for row in self.scores(written) for s in row]
        return float(np.mean(scores)), float(np.std(scores))

    def scores(self, written: Sequence[Sequence[Rollout]]) -> list[list[float]]:
        """The reward model's raw scores of answers, by prompt."""
        rows = [Row(row[0].request.ids, [Branch(r.ids, {}) for r in row]) for row in written]
        return score_rows(self.judge, rows, max_tokens=TOKENS)

    def reward(self, completions: Sequence[Completion]) -> list[Score]:
        """Scores in deviations from the start's mean; `CUT` for an answer that did not end."""
        mean, deviation = self.scale
        found = reward_model(self.judge, mean=mean, max_tokens=TOKENS)(completions)
        return [
            Score(CUT) if c.truncated else replace(s, value=(s.value or 0.0) / deviation)
            for s, c in zip(found, completions, strict=True)
        ]

    def gold(self, prompt: str, text: str) -> float:
        """The small world's own score; an empty answer's is 0."""
        return smallworld.gold(prompt, text).total if text.strip() else 0.0

    def decode(self, ids: Sequence[int]) -> str:
        """An answer's text."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def judge_accuracy(self) -> float:
        """The share of held-out pairs that the reward model puts in order."""
        held = [parse_row(row) for row in smallworld.rankings(128, seed=0, split="heldout")]
        rows, _ = ranking_rows(self.tokenizer, held, max_length=256)
        outcomes = pair_outcomes(score_rows(self.judge, rows, max_tokens=TOKENS), ranking_ranks(held))
        return accuracy(outcomes).mean


def train(models: dict[str, Model], objective: Any, source: Any, steps: int, optim: Optim) -> None:
    """The library's loop, without checkpoints."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(
            directory=Path(folder),
            steps=steps,
            max_tokens=TOKENS,
            save_every=10**9,
            console=Console(file=io.StringIO()),
        )
        fit(models, objective, source, optim=optim, run=run)


def reinforced(world: World, name: str, lr: float) -> tuple[Model, list[Numbers]]:
    """The policy of a row of the table, and of each rollout reward, gold, KL and length."""
    row = ALGORITHMS[name]
    groups, greedy = bool(row.needs & {"groups", "pairs"}), "greedy" in row.needs
    each = 2 if "pairs" in row.needs else GROUP if groups else 1
    plan = Plan(
        prompts=SAMPLES // (2 if greedy else each),  # the greedy answer is one of the two drawn
        samples=each,
        updates=UPDATES,
        sampling=Sampling(max_new_tokens=LONGEST),
        kl=row.numbers["kl"] if row.penalty.startswith("reward") else 0.0,
        least=2 if groups else 1,
        greedy=greedy,
        rounds=row.numbers.get("rounds", 1),
        overlong_share=row.numbers.get("overlong_share", 0.0),
        seed=world.seed,
        max_tokens=TOKENS,
    )
    policy = role(Model(copy.deepcopy(world.start.net)), "policy", lora=None, seed=world.seed)
    models = {"policy": policy}
    if "critic" in row.needs:
        models["value"] = value_role(copy.deepcopy(world.judge), lora=None, seed=world.seed)
    curve: list[Numbers] = []

    def seen(step: int, lines: list[dict[str, Any]]) -> None:
        del step
        soft = plan.overlong_share * LONGEST  # what a row takes for length is no part of the reward that is compared
        lost = [
            0.0 if not soft else float(overlong_penalty(torch.tensor(float(x["length"])), longest=LONGEST, buffer=soft))
            for x in lines
        ]
        gold = [world.gold(x["prompt"], x["completion"]) for x in lines]
        found = {"reward": [x["reward"] - y for x, y in zip(lines, lost, strict=True)], "gold": gold}
        found |= {key: [float(x[key]) for x in lines] for key in ("kl", "length")}
        curve.append({key: float(np.mean(values)) for key, values in found.items()})

    source = RolloutSource(
        plan=plan,
        examples=world.examples,
        prompt_ids=world.ids,
        engine=LocalEngine(policy, world.stops, slots=SAMPLES),
        reward=world.reward,
        reference=world.start,
        value=models.get("value"),
        decode=world.decode,
        advantage=estimator(row),
        policy=policy,
        on_samples=seen,
    )
    optim = Optim(lr=lr, role_lr={"value": VALUE_LR} if "value" in models else {}, warmup_steps=WARMUP)
    train(models, policy_gradient(row, longest=LONGEST), source, ROLLOUTS * UPDATES, optim)
    return policy, curve


def sampled(world: World, policy: Model, first: int, prompts: int) -> tuple[list[list[Rollout]], list[list[float]]]:
    """`GROUP` answers to each of the training prompts from ``first`` on, and their rewards."""
    ids = [world.ids[i % PROMPTS] for i in range(first, first + prompts)]
    engine = LocalEngine(policy, world.stops, slots=SAMPLES)
    requests = [Request(tuple(p), (world.seed, first, i, k)) for i, p in enumerate(ids) for k in range(GROUP)]
    flat = engine.generate(requests, Sampling(max_new_tokens=LONGEST))
    written = [flat[i : i + GROUP] for i in range(0, len(flat), GROUP)]
    mean, deviation = world.scale
    scores = world.scores(written)
    return written, [
        [CUT if r.truncated else (s - mean) / deviation for r, s in zip(row, some, strict=True)]
        for row, some in zip(written, scores, strict=True)
    ]


def imitated(world: World, policy: Model, rows: Sequence[Row], lr: float, seed: int) -> None:
    """Two epochs of supervised learning from answers that were kept."""
    source = demonstration_source(rows, per_step=min(16, len(rows)), seed=seed)
    train({"policy": policy}, Supervised(), source, 2 * source.steps_per_epoch, Optim(lr=lr, warmup_steps=2))


def demonstrations(
    written: Sequence[Sequence[Rollout]], scores: Sequence[Sequence[float]], least: float, most: int
) -> list[Row]:
    """A row for each answer that is kept."""
    return [
        Row(row[0].request.ids, [Branch(row[i].ids, {"loss": [True] * len(row[i].ids)})])
        for row, some in zip(written, scores, strict=True)
        for i in kept([r.ids for r in row], some, least=least, most=most)
    ]


def raft(world: World, lr: float) -> Model:
    """Four rounds: 24 prompts, the best of 8 answers each is learnt from."""
    policy = role(Model(copy.deepcopy(world.start.net)), "policy", lora=None, seed=world.seed)
    prompts = ROLLOUTS * SAMPLES // GROUP // 4
    for turn in range(4):
        written, scores = sampled(world, policy, turn * prompts, prompts)
        imitated(world, policy, demonstrations(written, scores, CUT + 1e-9, 1), lr, turn)
    return policy


def rest(world: World, lr: float) -> Model:
    """Two growths of 48 prompts by 8 answers, three improvements on each: from rewards 0, 0.5 and 1 on, at falling rates."""
    policy = role(Model(copy.deepcopy(world.start.net)), "policy", lora=None, seed=world.seed)
    prompts = ROLLOUTS * SAMPLES // GROUP // 2
    for turn in range(2):
        written, scores = sampled(world, policy, turn * prompts, prompts)
        for k, least in enumerate((0.0, 0.5, 1.0)):
            if rows := demonstrations(written, scores, least, GROUP):
                imitated(world, policy, rows, lr / (k + 1), 10 * turn + k)
    return policy


def measured(world: World, policy: Model, *, best_of: int = 1) -> Numbers:
    """Means over answers to held-out prompts; with ``best_of``, of the one that the reward model likes best."""
    written = answers(
        policy, world.held_ids, world.stops, seed=world.seed, samples=max(2, best_of), max_new_tokens=LONGEST
    )
    raw, (mean, deviation) = world.scores(written), world.scale
    if best_of > 1:
        places = [[int(np.argmax(row))] for row in raw]
        written = [[row[k] for k in some] for row, some in zip(written, places, strict=True)]
        raw = [[row[k] for k in some] for row, some in zip(raw, places, strict=True)]
    flat = [(e, r) for e, row in zip(world.held, written, strict=True) for r in row]
    return {
        "reward": (float(np.mean(raw)) - mean) / deviation,
        "gold": float(np.mean([world.gold(e.prompt[-1].content, world.decode(r.ids)) for e, r in flat])),
        "kl": best_of_n_kl(best_of) if best_of > 1 else float(divergence(policy, world.start, written, TOKENS).mean()),
        "length": float(np.mean([len(r.ids) for _, r in flat])),
        "ended": float(np.mean([r.stopped for _, r in flat])),
    }


def one(world: World, name: str, lr: float = LR) -> dict[str, Any]:
    """A run: its numbers, its curve and the seconds of a processor that training took."""
    _ = world.scale
    began, curve = time.process_time(), list[Numbers]()
    if name in ALGORITHMS:
        policy, curve = reinforced(world, name, lr)
    else:
        policy = {"raft": raft, "rest": rest}[name](world, lr) if name in ("raft", "rest") else world.start
    spent = time.process_time() - began
    numbers = measured(world, policy, best_of=GROUP if name == "best_of_n" else 1)
    return {"algorithm": name, "seed": world.seed, "numbers": numbers, "curve": curve, "cpu": spent}


def main() -> None:
    """Run what is not there yet, seed by seed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.policy", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument(
        "--algorithms", nargs="+", default=["start", *sorted(set(ALGORITHMS) - set(NOT_RUN)), *SELECTING]
    )
    parser.add_argument("--try", type=float, nargs="+", dest="rates", help="these learning rates, printed and not kept")
    parser.add_argument("--page", action="store_true", help="write the page")
    given = parser.parse_args()
    if given.page:
        from benchmarks.policy_page import write

        return write()
    done = {(row["algorithm"], row["seed"]) for row in read(NAME)}
    for seed in given.seeds:
        names = [n for n in given.algorithms if given.rates or (n, seed) not in done]
        if not names:
            continue
        world = World(seed)
        print(f"seed {seed}: the reward model orders {world.judge_accuracy():.3f} of held-out pairs", flush=True)
        for name in names:
            for lr in given.rates or [LR]:
                row = one(world, name, lr)
                print(
                    name,
                    f"{lr:g}",
                    {k: round(v, 3) for k, v in row["numbers"].items()},
                    f"{row['cpu']:.1f} s",
                    flush=True,
                )
                if not given.rates:
                    append(NAME, row | {"threads": threads(), "label": "small base model, fp32"})


if __name__ == "__main__":
    main()
