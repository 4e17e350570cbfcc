"""Ensembles of reward models, temperatures that stay, and models of other tokens and sizes than the policy, as they are typed."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForSequenceClassification

from caches import own_cache
from data.conftest import smol
from posttrain.cli import main
from posttrain.data.chat import render_prompt, render_response
from posttrain.data.load import read
from posttrain.data.smallworld import rankings
from posttrain.errors import ConfigError
from posttrain.models.load import load_tokenizer, new_reward, save_merged
from posttrain.models.policy import Model
from posttrain.models.small import small_path
from posttrain.rewards.base import Completion
from posttrain.rewards.panel import load_panel
from posttrain.rewards.trained import load_reward, said
from posttrain.stages import Context, TrainEnsemble
from posttrain.types import Example, Message
from posttrain.work.inputs import Start, reward_files
from posttrain.work.reward_ensemble import run as run_ensemble
from posttrain.work.rewarding import reward_of
from posttrain.work.safe import judge_of
from tiny import plain_net

TRAIN = (
    "--data rankings.jsonl --model small --members 2 --prompts-per-step 3 --epochs 1 --dtype float32 --lr 1e-3 --name"
)
SHARED, APART = Path("runs/shared/ensemble"), Path("runs/apart/ensemble")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory with rankings and two ensembles, one on a shared network."""
    folder = tmp_path_factory.mktemp("ensembles")
    rows = [{"prompt": r["prompt"], "completions": r["completions"]} for r in rankings(9, seed=7)]
    (folder / "rankings.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    asked = [{"prompt": row["prompt"]} for row in rows]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in asked))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        own_cache(patch, folder / "cache")
        assert main(["train", "ensemble", *TRAIN.split(), "shared", "--lora-rank", "4", "--rule", "minimum"]) == 0
        apart = ["--lora-rank", "0", "--share", "false", "--kind", "plackett_luce"]
        assert main(["train", "ensemble", *TRAIN.split(), "apart", *apart]) == 0
        yield folder


def scores_of(path: Path | str, **more) -> np.ndarray:
    panel = load_panel(str(path), dtype=torch.float32, **more)
    return np.array([s.scores for s in panel.score(read("rankings.jsonl"))])


@pytest.mark.parametrize("place", [SHARED, APART])
def test_an_ensemble_joins_its_members_by_its_rule(folder, place):
    record = json.loads((place / "reward.json").read_text())
    assert record["form"] == "ensemble" and record["members"] == ["member0", "member1"]
    alone = np.array([scores_of(place / name) for name in record["members"]])
    assert np.abs(alone[0] - alone[1]).max() > 1e-3  # heads and orders of their own
    wanted = alone.min(0) if place == SHARED else alone.mean(0) - 0.5 * alone.var(0)
    assert scores_of(place) == pytest.approx(wanted, abs=2e-5)
    assert scores_of(place, combine=lambda x: x.mean(0)) == pytest.approx(alone.mean(0), abs=2e-5)
    assert (place / "member0/model.safetensors").exists() == (place == APART)
    nets = [m.model.net for m in load_panel(str(place), dtype=torch.float32).members]
    assert (nets[0] is nets[1]) == (place == SHARED)


def test_commands_and_stages_take_the_directory_of_an_ensemble(folder, capsys):
    assert main(["score", str(SHARED), "rankings.jsonl", "--out", "scored.jsonl", "--dtype", "float32"]) == 0
    written = [[r.score for r in e.responses] for e in read("scored.jsonl")]
    assert np.array(written) == pytest.approx(scores_of(SHARED), abs=2e-5)
    assert all("disagreement" in r.attributes for e in read("scored.jsonl") for r in e.responses)
    by_mean = ["score", str(SHARED), "rankings.jsonl", "--out", "mean.jsonl", "--rule", "mean", "--dtype", "float32"]
    assert main(by_mean) == 0
    means = [[r.score for r in e.responses] for e in read("mean.jsonl")]
    assert np.array(means) == pytest.approx(scores_of(SHARED, combine=lambda x: x.mean(0)), abs=2e-5)
    names = {str(p.relative_to(SHARED)) for p in reward_files(str(SHARED), functions=False) if p.is_relative_to(SHARED)}
    assert {"reward.json", "member0/head.safetensors", "member1/adapter_model.safetensors"} <= names
    table = ["eval", "reward", str(SHARED), str(APART), "--data", "rankings.jsonl", "--out", "found"]
    assert main(table) == 0
    models = json.loads(Path("found/results.json").read_text())["models"]
    assert list(models)[:2] == ["shared/ensemble", "apart/ensemble"]
    assert all("disagreement" in models[name] for name in list(models)[:2])


def policy_samples(texts: list[str]) -> list[Completion]:
    """Completions whose ids are the small model's own."""
    tokenizer, example = load_tokenizer(str(small_path())), read("rankings.jsonl")[0]
    prompt = tuple(render_prompt(tokenizer, example.prompt))
    ids = [tuple(render_response(tokenizer, example.prompt, said(t).messages)) for t in texts]
    made = lambda text, own: Completion(  # noqa: E731
        example=replace(example, responses=()), text=text, prompt_ids=prompt, ids=own, truncated=False, group=0
    )
    return [made(*item) for item in zip(texts, ids, strict=True)]


def stage_reward(place: Path, folder: Path):
    ctx = Context(dir=folder, inputs={}, console=Console(file=StringIO()))
    tokenizer = load_tokenizer(str(small_path()))
    return reward_of(str(place), ctx, dtype=torch.float32, max_tokens=512, tokenizer=tokenizer)


def test_reinforcement_learning_reads_an_ensemble_by_its_text(folder):
    example = read("rankings.jsonl")[0]
    found = stage_reward(SHARED, folder)(policy_samples([r.text for r in example.responses]))
    assert [s.value for s in found] == pytest.approx(scores_of(SHARED)[0], abs=2e-5)
    assert all(s.parts["disagreement"] >= 0 for s in found)


def test_a_policy_trains_against_an_ensemble(folder):
    steps = "--steps 1 --updates-per-rollout 1 --prompts-per-step 2 --samples-per-prompt 2 --max-new-tokens 12"
    policy = f"--model small --data prompts.jsonl --lora-rank 0 --dtype float32 {steps}"
    assert main(["train", "rloo", "--reward", str(SHARED), "--name", "rl", *policy.split()]) == 0
    rows = [json.loads(line) for line in Path("runs/rl/rloo/samples.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and all(np.isfinite(r["reward"]) for r in rows)


def test_members_that_are_finished_are_not_trained_again(folder, tmp_path):
    stage = TrainEnsemble(
        model="small", data="rankings.jsonl", members=2, lora_rank=2, epochs=1, prompts_per_step=9, dtype="float32"
    )
    ctx = Context(dir=tmp_path, inputs={}, console=Console(file=StringIO()))
    run_ensemble(stage, ctx)
    before = (tmp_path / "member0/head.safetensors").stat().st_mtime_ns
    wanted = scores_of(tmp_path / "member1")
    for name in ("reward.json", "member1/reward.json"):
        (tmp_path / name).unlink()
    run_ensemble(stage, ctx)
    assert (tmp_path / "member0/head.safetensors").stat().st_mtime_ns == before
    assert scores_of(tmp_path / "member1") == pytest.approx(wanted, abs=0)


@pytest.mark.parametrize(
    ("arguments", "said_of"),
    [
        ("--lora-rank 4 --rule variants", "unknown ensemble rule 'variants'; did you mean 'variance'"),
        ("--lora-rank 4 --rule mean --penalty 1", "'mean' has no option 'penalty'"),
        ("--lora-rank 0", "give lora_rank, or share False"),
        ("--lora-rank 4 --kind attributes", "give share False"),
        ("--lora-rank 4 --kind gated", "members of kind 'gated' can't be an ensemble"),
    ],
)
def test_faults_of_usage_are_one_line(folder, arguments, said_of, capsys):
    assert main(["train", "ensemble", *TRAIN.split(), "fault", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert said_of in error and error.count("\n") == 1


# ---------------------------------------------------------------------------- temperatures


def pairs_of(place: Path) -> str:
    """A file of pairs that a model orders right in four of five."""
    prompts = [Example(prompt=(Message(role="user", content=f"say {k}"),)) for k in range(60)]
    examples = [
        replace(e, responses=(said("the " * (k % 7 + 1)), said("red " * (k % 5 + 1)))) for k, e in enumerate(prompts)
    ]
    rows = []
    for k, (e, found) in enumerate(
        zip(examples, load_panel(str(place), dtype=torch.float32).score(examples), strict=True)
    ):
        texts = [r.text for r in e.responses]
        best = int(found.scores[1] > found.scores[0]) ^ (k % 5 == 0)
        rows.append({"prompt": e.prompt[0].content, "chosen": texts[best], "rejected": texts[1 - best]})
    Path("pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return "pairs.jsonl"


def measured(place: Path, data: str, out: str, *more: str) -> dict:
    assert main(["eval", "reward", str(place), "--data", data, "--dtype", "float32", "--out", out, *more]) == 0
    return next(iter(json.loads(Path(out, "results.json").read_text())["models"].values()))["calibration"]


@pytest.mark.parametrize("place", [APART / "member0", SHARED])
def test_a_temperature_is_kept_and_every_score_is_divided_by_it(folder, capsys, place):
    data, before = pairs_of(place), scores_of(place)
    found = measured(place, data, f"first-{place.name}", "--calibrate")
    printed, record = capsys.readouterr().out, json.loads((place / "reward.json").read_text())
    kept = record["temperature"]
    assert kept == pytest.approx(found["temperature"]) and kept != 1 and f"temperature {kept:.3g}" in printed
    assert record["calibration"]["pairs"] == found["fitted_on"] and record["kind"] in ("plackett_luce", "bradley_terry")
    assert scores_of(place) == pytest.approx(before / kept, abs=1e-4)
    first = read("rankings.jsonl")[0]
    sampled = [s.value for s in stage_reward(place, folder)(policy_samples([r.text for r in first.responses]))]
    assert sampled == pytest.approx(before[0] / kept, abs=1e-4)
    if place != SHARED:
        assert load_reward(place).values([first])[0] == pytest.approx(before[0] / kept, abs=1e-4)
        start, ctx = Start("", "", load_tokenizer(str(small_path()))), Context(dir=folder, inputs={}, console=Console())
        judge = judge_of(str(place), "reward", ctx, start, torch.float32, 512)
        sampled = [s.value for s in judge.score(policy_samples([r.text for r in first.responses]))]
        assert sampled == pytest.approx(before[0] / kept, abs=1e-4)
    again = measured(place, data, f"second-{place.name}")
    assert again["before"]["ece"] == pytest.approx(found["after"]["ece"], abs=1e-4)
    assert again["temperature"] == pytest.approx(1, abs=1e-3)


def test_what_no_temperature_is_kept_of(folder, capsys):
    place = APART / "member1"
    turned = [json.loads(line) for line in Path(pairs_of(place)).read_text().splitlines()]
    for row in turned:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    Path("turned.jsonl").write_text("".join(json.dumps(r) + "\n" for r in turned))
    assert main(["eval", "reward", str(place), "--data", "turned.jsonl", "--calibrate", "--out", "x"]) == 2
    assert "give pairs that it orders better than chance" in capsys.readouterr().err
    assert "temperature" not in json.loads((place / "reward.json").read_text())
    both = f"{APART / 'member0'},{APART / 'member1'}"
    assert main(["eval", "reward", both, "--data", "turned.jsonl", "--calibrate", "--out", "y"]) == 2
    assert "give an ensemble's directory" in capsys.readouterr().err


# ---------------------------------------------------------------------------- other tokens, other sizes


def test_a_model_of_other_tokens_and_ten_times_the_size_reads_the_text(folder, tmp_path):
    shape = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 3, "initializer_range": 0.02}
    net = plain_net(dtype=torch.float32, vocab_size=512, pad_token_id=9, **shape)
    net.save_pretrained(tmp_path / "base")
    smol().save_pretrained(tmp_path / "base")
    model = new_reward(str(tmp_path / "base"), dtype=torch.float32, seed=1)
    save_merged(model, str(tmp_path / "base"), tmp_path / "big", smol())
    (tmp_path / "big/reward.json").write_text('{"mean": 0.5}')
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    policy = Model(AutoModelForSequenceClassification.from_pretrained(small_path()))
    assert count(model.net) > 10 * count(policy.net)
    texts = ["the red box is here.", "no.", "i can't say: naïve ∎"]
    found = stage_reward(tmp_path / "big", folder)(policy_samples(texts))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "big").eval()
    prompt = read("rankings.jsonl")[0].prompt
    for text, score in zip(texts, found, strict=True):
        ids = [*render_prompt(smol(), prompt), *render_response(smol(), prompt, said(text).messages)]
        with torch.no_grad():
            wanted = float(plain(torch.tensor([ids])).logits[0, 0]) - 0.5
        assert score.value == pytest.approx(wanted, abs=1e-4)
    with pytest.raises(ConfigError, match="other tokens than"):
        load_panel(f"{APART / 'member0'},{tmp_path / 'big'}", dtype=torch.float32)
