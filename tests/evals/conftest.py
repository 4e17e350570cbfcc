"""A run directory as the runner leaves it, with numbers from a seeded generator."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from posttrain.evals.results import (
    closing_results,
    compare_rewards,
    machine_section,
    policy_section,
    reward_section,
    sample_rows,
    worst_rows,
    write_results,
)
from posttrain.evals.reward import pair_outcomes

POLICIES = ("base", "sft", "ppo")
LABELS = (None, "too short", "wrong answer", "ignores the format")


def reward_outcomes(rankings: int = 60) -> dict:
    rng = np.random.default_rng(3)
    ranks = [[0, 1, 2, 3]] * rankings
    skill = {"reward": 1.2, "reward_unseen": 1.0, "length": 0.1, "bag_of_words": 0.5, "frozen_base": 0.9}
    return {
        name: pair_outcomes(
            [rng.normal(size=4) - s * np.arange(4) for _ in range(rankings)], ranks, [list(LABELS)] * rankings
        )
        for name, s in skill.items()
    }


def policy_numbers(prompts: int = 40, samples: int = 2) -> tuple[dict, dict]:
    rng = np.random.default_rng(4)
    shape = (prompts, samples)
    ease = rng.normal(size=(prompts, 1))
    lift = {"base": -1.0, "sft": 0.0, "ppo": 0.8}
    scores = {
        policy: {
            "reward": ease + up + 0.5 * rng.normal(size=shape),
            "reward_unseen": ease + (0.0 if policy == "ppo" else up) + 0.5 * rng.normal(size=shape),
        }
        for policy, up in lift.items()
    }
    measures = {
        "kl": {p: np.abs(rng.normal(size=shape)) * k for p, k in (("base", 9.0), ("sft", 0.0), ("ppo", 4.0))},
        "length": {p: rng.integers(20, 90, size=shape) for p in POLICIES},
        "truncated": {p: rng.random(shape) < 0.1 for p in POLICIES},
        "seconds": {"base": 12.5, "sft": 11.0, "ppo": 13.25},
    }
    return scores, measures


def results(answer: str = "A polite answer about the {i}th thing, in two or three sentences. " * 3) -> dict:
    scores, measures = policy_numbers()
    prompts = [f"Please describe thing number {i} to someone who has never seen one." for i in range(40)]
    answers = {p: [[f"[{p}] " + answer.replace("{i}", str(i))] * 2 for i in range(40)] for p in POLICIES}
    outcomes = reward_outcomes()
    return closing_results(
        machine=machine_section(device="cpu", threads=2, fp32_gflops=96.24, bf16_gflops=41.0),
        reward_accuracy=reward_section(outcomes, length_direction=1),
        reward_comparisons=compare_rewards(outcomes),
        policy=policy_section(scores, **measures),
        samples=sample_rows(prompts, answers, scores, truncated=measures["truncated"]),
        worst=worst_rows(prompts, answers, scores, before="sft", after="ppo", truncated=measures["truncated"]),
        stages={"sft": 61.0, "reward": 75.5, "ppo": 480.25},
    )


def write_run(
    run: Path, answer: str | None = None, finished: bool = True, logged: tuple[str, ...] = ("reward",)
) -> Path:
    rng = np.random.default_rng(5)
    stages = {
        "sft": {"class": "SFT", "config": {"model": "smollm2", "lr": 1e-5, "epochs": 2}, "inputs": {}},
        "reward": {"class": "TrainReward", "config": {"lr": 1e-5}, "inputs": {"base": "sft"}},
        "ppo": {"class": "Reinforce", "config": {"beta": 0.02, "clip": 0.2}, "inputs": {"policy": "sft"}},
        "evaluate": {"class": "Evaluate", "config": {"prompts": 40}, "inputs": {"policy": "ppo"}},
    }
    manifest = {
        "name": run.name,
        "recipe": "instructgpt",
        "summary": "supervised, reward model, PPO",
        "command": "posttrain run instructgpt --tiny",
        "seed": 0,
        "tiny": True,
        "stages": stages,
        "versions": {"python": "3.11", "torch": "2.13.0", "missing": None},
        "hardware": {"cpu": "a processor", "cores": 2, "threads": 2, "memory": 15.5, "accelerators": []},
        "created": "2026-11-23T09:00:00+00:00",
    }
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps(manifest))
    logs = {
        "sft": lambda t: {"loss/total": 2 + 2 / (1 + t) + 0.1 * rng.normal(), "optim/lr": 1e-5},
        "reward": lambda t: {"loss/total": 0.69 - 0.002 * t, "accuracy/pairs": 0.5 + 0.002 * t},
        "ppo": lambda t: {
            "loss/total": 1 / (1 + t) + 0.05 * rng.normal(),
            "loss/policy": 0.02 * rng.normal(),
            "loss/value": 1 / (1 + t / 9),
            "reward/mean": 0.02 * t + 0.2 * rng.normal(),
            "kl/mean": 0.06 * t + 0.1 * rng.normal(),
            "length/mean": 60 - 0.1 * t + 3 * rng.normal(),
            "truncated/share": float(rng.random() < 0.2) / 8,
            "entropy/mean": None if t == 5 else 2.0 - 0.005 * t,
        },
    }
    for name in stages if finished else ["sft"]:
        directory = run / name
        directory.mkdir()
        (directory / "stage.json").write_text(json.dumps({"key": "k1", **stages[name]}))
        if name in logged:
            rows = [{"step": t, **logs[name](t)} for t in range(9 if name == "reward" else 120)]
            (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if finished:
            done = {"key": "k1", "seconds": 61.5, "outputs": {}}
            (directory / "done.json").write_text(json.dumps(done))
    if finished:
        write_results(results(answer) if answer is not None else results(), run / "evaluate" / "results.json")
    return run


@pytest.fixture(scope="session")
def closing() -> dict:
    """Results of a finished evaluation."""
    return results()


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Path]:
    """Write a run: path, answer text (None = a harmless one), finished or not, stages with a log."""
    return write_run


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "demo", logged=("sft", "reward", "ppo"))
