"""What stands beside the samples of a policy-gradient stage, in whole runs on the small world."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console

from caches import own_cache
from posttrain.errors import ConfigError
from posttrain.models.load import find_model
from posttrain.models.lora import parameters
from posttrain.runner import run_recipe
from posttrain.stages import Recipe, Reinforce, TrainReward
from posttrain.train.checkpoint import newest_checkpoint
from posttrain.work.beside import GoldWatch
from posttrain.work.reinforce import load_trained

SMALL = {"model": "small", "data": "smallworld", "dtype": "float32"}
GOLD = "posttrain.data.smallworld_gold:gold_total"
NUMBERS = {
    "prompts_per_step": 4, "samples_per_prompt": 2, "updates_per_rollout": 2, "steps": 6, "max_new_tokens": 12, "limit": 8,
    "lora_rank": 4, "lr": 5e-3, "value_lr": 1e-3, "warmup_steps": 0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own_cache(monkeypatch, tmp_path / "cache")
    return tmp_path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_everything_beside_the_samples_at_once(folder):
    """Text, a critic that learns first, an average that is written, rewards against the start's own, gold in every second rollout."""
    scorer = TrainReward(limit=4, prompts_per_step=4, epochs=1.0, lora_rank=0, lr=1e-3, **SMALL)
    stage = Reinforce(
        reward=scorer, gold=GOLD, gold_every=2, ptx=0.5, ptx_share=0.5, value_warmup=1, ema=0.5, against_start=2, save_every=2,
        **SMALL, **NUMBERS,
    )  # fmt: skip
    console = Console(file=io.StringIO(), width=200)
    place = run_recipe(Recipe("r", {"scorer": scorer, "stage": stage}), root=folder, console=console) / "stage"
    said, rows = console.file.getvalue(), lines(place / "metrics.jsonl")
    assert "ptx: kept 96 of 96" in said and "ptx tokens" in said and "the start's answers to 8 prompts score" in said
    assert all("loss/ptx" in row for row in rows) and [("gold/reward" in row) for row in rows] == [
        True,
        *[False] * 3,
        True,
        False,
    ]
    assert rows[0]["loss/total"] == pytest.approx(rows[0]["loss/value"], rel=1e-6)
    assert rows[2]["kl/mean"] == pytest.approx(0, abs=1e-4) and rows[4]["kl/mean"] != 0
    base = json.loads((place / "start_scores.json").read_text())
    samples = lines(place / "samples.jsonl")
    assert len(base) == 8 and len(samples) == 24
    for sample in samples:
        assert min(abs(sample["parts"]["raw"] - sample["reward"] - b) for b in base.values()) < 1e-9
    assert (place / "overoptimisation.png").read_bytes().startswith(b"\x89PNG") and lines(place / "alarms.jsonl") == []
    found, _ = newest_checkpoint(place / "checkpoints")
    written = load_trained(place / "policy", find_model("small").path, torch.float32)
    own = parameters(written.net, "policy")
    assert own and all(torch.equal(p, found.tensors[f"policy/average/{name}"]) for name, p in own.items())
    assert any(not torch.equal(p, found.tensors[f"policy/master/{name}"]) for name, p in own.items())


def test_the_step_within_the_backward_pass(folder):
    """Runs whole, with a critic and adapters."""
    stage = Reinforce(reward=GOLD, fused=True, **SMALL, **NUMBERS | {"steps": 2, "value_lr": 1e-4})
    place = run_recipe(Recipe("r", {"stage": stage}), root=folder, console=Console(file=io.StringIO())) / "stage"
    rows = lines(place / "metrics.jsonl")
    assert len(rows) == 2 and all(row["optim/grad_norm"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ptx": 1.0, "temperature": 0.7}, "with ptx temperature 1: text and samples go through one pass"),
        ({"ptx": -1.0}, "expected a weight of at least 0"),
        ({"ema": 1.0}, "expected a decay from 0 to below 1"),
        (
            {"value_warmup": 1, "algorithm": "grpo", "samples_per_prompt": 2},
            "an algorithm with a critic, which grpo has not",
        ),
        ({"against_start": 1, "cut_score": -1.0}, "a cut response's score would be no difference"),
        ({"fused": True, "merging": "online_dare"}, "got fused with merging"),
        ({"gold_every": 0}, "gold_every=0"),
    ],
)
def test_what_can_not_stand_beside_the_samples_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        Reinforce(model="small", reward="nowhere", **changes)


def test_files_of_text_and_gold_are_part_of_the_stage(folder):
    """So that a change of them makes the stage run again; a gold that is not there is refused before anything runs."""
    plain, full = (Reinforce(reward=GOLD, **SMALL, **more) for more in ({}, {"ptx": 1.0, "gold": GOLD}))
    more = [path.name for path in full.files()]
    for path in plain.files():
        more.remove(path.name)
    assert more == ["demonstrations.jsonl", "smallworld_gold.py"]
    with pytest.raises(ConfigError, match="no reward model in 'nowhere'"):
        Reinforce(reward=GOLD, gold="nowhere", **SMALL).check()


def test_an_alarm_is_printed_and_kept_once_and_a_resumed_run_repeats_none(folder):
    """Thirty measurements: both rise, then gold falls while the proxy goes on."""
    gold = [*range(10), *range(10, -10, -1)]
    rows = [
        {"step": 2 * k, "reward/mean": float(k), "gold/reward": float(g), "kl/mean": 0.1 * k}
        for k, g in enumerate(gold)
    ]
    (folder / "metrics.jsonl").write_text("")

    def watch(some):
        console = Console(file=io.StringIO(), width=400)
        with GoldWatch(folder, console, 20) as hook:
            for row in some:
                hook(row["step"], {k: v for k, v in row.items() if k != "step"})
                hook(row["step"] + 1, {"loss/total": 1.0})
                with (folder / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps(row) + "\n")
        return console.file.getvalue()

    said = watch(rows)
    (event,) = lines(folder / "alarms.jsonl")
    assert said.count("parted") == 1 and f"step {event['step']}: {event['text']}" in said
    assert event["kind"] == "parted" and 40 < event["step"] < 58 and event["text"].startswith(
        "proxy and gold have parted: over 20 measured rollouts the reward rose from"
    )  # fmt: skip
    assert (folder / "overoptimisation.png").stat().st_size > 5000
    kept = (folder / "alarms.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:28]))
    assert watch(rows[28:]) == "" and (folder / "alarms.jsonl").read_bytes() == kept  # it came before
    at = event["step"] // 2
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[: at - 1]))
    assert watch(rows[at - 1 :]).count("parted") == 1 and (folder / "alarms.jsonl").read_bytes() == kept
