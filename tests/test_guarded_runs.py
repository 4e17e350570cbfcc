"""Whole runs that go wrong: a step that is not finite is replayed by command, a KL that grows stops at a good checkpoint."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from caches import own_cache
from posttrain.cli import main
from posttrain.runner import run_recipe
from posttrain.stages import Recipe, Reinforce, TrainReward
from posttrain.train.diagnose import KLLimit

SMALL = {"model": "small", "data": "smallworld", "dtype": "float32"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own_cache(monkeypatch, tmp_path / "cache")
    return tmp_path


def test_a_skipped_step_is_replayed_by_command(folder, capsys):
    """Weights of 1e30 after the first step: the loss is finite, its gradient is not."""
    options = "--model small --data smallworld --limit 8 --epochs 4 --prompts-per-step 4 --lora-rank 0 --lr 1e30"
    assert main(["train", "sft", *options.split()]) == 2
    said = capsys.readouterr().err
    assert re.search(
        r"posttrain: sft: 3 steps in a row were skipped, the last is step 3 \(gradient policy/\S+ is nan", said
    )
    for step in (1, 3):  # the weights of the later ones are in the first one's dump
        assert main(["replay", f"runs/train-sft/sft/faults/step-{step:08d}"]) == 0
        assert re.fullmatch(r"gradient policy/\S+ is nan at entry \d+ \(.*\), as then\n", capsys.readouterr().out)
    assert main(["replay", "runs/train-sft"]) == 2
    assert "is not a run" in capsys.readouterr().err
    assert not (folder / "runs/train-sft/sft/done.json").exists()


def recipe(max_kl):
    scorer = TrainReward(limit=4, prompts_per_step=4, epochs=1.0, lora_rank=0, lr=1e-3, **SMALL)
    stage = Reinforce(
        reward=scorer, prompts_per_step=4, samples_per_prompt=2, updates_per_rollout=4, steps=16, max_new_tokens=12, limit=8,
        lora_rank=4, lr=5e-3, value_lr=1e-3, save_every=1, keep=1, max_kl=max_kl, warmup_steps=0, **SMALL,
    )  # fmt: skip
    return Recipe("r", {"scorer": scorer, "stage": stage})


def test_a_kl_that_grows_stops_the_run_and_a_checkpoint_below_the_limit_is_left(folder):
    """Checkpoints between two rollouts were not measured; as many are kept as lie between, although ``keep`` is 1."""
    console = Console(file=io.StringIO(), width=200)
    with pytest.raises(KLLimit) as caught:
        run_recipe(recipe(0.5), root=folder, console=console)
    said = re.fullmatch(
        r"step (\d+): KL to the reference is (\S+) nats a sequence, above max_kl=0.5: the learning rate is too high \(.*\); lower "
        r"lr or updates_per_rollout. Stopped; checkpoints up to step (\d+) are kept",
        str(caught.value),
    )
    stopped, good = int(said[1]), int(said[3])
    assert good == stopped - 4 > 0 and float(said[2]) > 0.5
    names = sorted(path.name for path in (folder / "r" / "stage" / "checkpoints").iterdir())
    assert names == [f"over-limit-step-{k:08d}" for k in range(good + 1, stopped + 1)] + [f"step-{good:08d}"]
    with pytest.raises(KLLimit):
        run_recipe(recipe(0.5), root=folder, console=console)
    assert f"continuing after step {good} of 16" in console.file.getvalue()
