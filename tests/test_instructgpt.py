"""The main job on the small world: every stage, its outputs in plain transformers and peft, skipping, and bad input."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from caches import own_cache
from posttrain.cli import main
from posttrain.data import render_branch, render_prompt
from posttrain.forest import Branch, Row
from posttrain.models.load import load_reward
from posttrain.rewards.model import score_rows
from posttrain.types import Message

STAGES = ["sft", "reward", "reward_unseen", "reinforce", "evaluate", "model"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("main")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        own_cache(patch, folder / "cache")
        assert main(["run", "instructgpt", "--tiny"]) == 0
        times = {s: (folder / "runs/instructgpt-tiny" / s / "done.json").stat().st_mtime_ns for s in STAGES}
        assert main(["run", "instructgpt", "--tiny"]) == 0
        again = {s: (folder / "runs/instructgpt-tiny" / s / "done.json").stat().st_mtime_ns for s in STAGES}
    assert times == again  # a second run skips what is finished
    return folder / "runs/instructgpt-tiny"


def test_every_stage_is_done_and_the_model_is_written_last(run):
    ends = [(run / stage / "done.json").stat().st_mtime_ns for stage in STAGES]
    assert ends == sorted(ends)
    assert (run / "report.html").stat().st_size > 10_000
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_results_hold_every_table(run):
    results = json.loads((run / "evaluate/results.json").read_text())
    accuracy = results["reward_accuracy"]
    assert set(accuracy) == {"reward", "reward_unseen", "length", "bag_of_words", "frozen_base"}
    assert all(0 <= entry["low"] <= entry["accuracy"] <= entry["high"] <= 1 for entry in accuracy.values())
    assert set(results["policies"]) == {"base", "sft", "ppo"}
    names = {(row["name"], row["scorer"]) for row in results["differences"]}
    assert {("ppo - sft", "reward"), ("ppo - sft", "reward_unseen")} <= names
    assert len(results["samples"]) == 6


def test_supervised_training_lowers_the_loss(run):
    losses = [json.loads(line)["loss/nll"] for line in (run / "sft/metrics.jsonl").read_text().splitlines()]
    third = len(losses) // 3
    assert sum(losses[-third:]) < 0.9 * sum(losses[:third])


def test_the_aligned_policy_loads_and_answers_in_plain_transformers(run):
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "what is two plus two?"}], add_generation_prompt=True, return_tensors="pt"
    )
    out = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    assert out[0, -1] == tokenizer.eos_token_id or out.shape[1] == prompt["input_ids"].shape[1] + 24
    before = AutoModelForCausalLM.from_pretrained(run / "sft")
    moved = [(a - b).abs().max() for a, b in zip(model.parameters(), before.parameters(), strict=True)]
    assert max(moved) > 0  # reinforcement learning changed the weights that were written


def test_the_reward_model_scores_the_same_in_plain_transformers(run):
    ours = load_reward(str(run / "reward"), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(run / "reward")
    prompt = (Message(role="user", content="what is two plus two?"),)
    answers = ["four.", "go away, what a dumb question."]
    policy_tokenizer = AutoTokenizer.from_pretrained(run / "sft")
    branches = [
        Branch(render_branch(policy_tokenizer, prompt, (Message(role="assistant", content=a),)).ids, {})
        for a in answers
    ]
    (scores,) = score_rows(ours, [Row(render_prompt(policy_tokenizer, prompt), branches)])
    plain = AutoModelForSequenceClassification.from_pretrained(run / "reward")
    chats = [[{"role": "user", "content": prompt[0].content}, {"role": "assistant", "content": a}] for a in answers]
    texts = tokenizer.apply_chat_template(chats, tokenize=False)
    batch = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    assert batch["attention_mask"].sum(1)[0] != batch["attention_mask"].sum(1)[1]  # one row is padded
    torch.testing.assert_close(plain(**batch).logits[:, 0].detach(), torch.tensor(scores), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "instructgpt", "--model", "smollm3"], "smollm2"),
        (["run", "instructgpt", "--data", "defualt"], "did you mean 'default'?"),
        (["run", "instructgtp"], "did you mean 'instructgpt'?"),
        (["run", "instructgpt", "--reinforce.kll", "0.1"], "did you mean"),
        (["run", "instructgpt", "--reinforce.kl", "much"], "float"),
    ],
)
def test_bad_input_is_one_line_with_a_suggestion(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("posttrain: ")
    assert error.count("\n") == 1
    assert said in error
