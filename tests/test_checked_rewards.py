"""Policies trained against rewards that are no models, by the command line."""

from __future__ import annotations

import json

import pytest

from posttrain.cli import main

ROWS = [{"question": f"What is {k} + 1?", "answer": f"{k} + 1 = {k + 1}\n#### {k + 1}"} for k in range(2, 8)]
SMALL = [
    *("--data", "sums.jsonl", "--model", "small", "--lora-rank", "0", "--dtype", "float32", "--lr", "1e-4"),
    *("--steps", "2", "--updates-per-rollout", "1", "--prompts-per-step", "4", "--samples-per-prompt", "4"),
    *("--max-new-tokens", "8"),
]


@pytest.fixture
def sums(here):
    (here / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (here / "mine.py").write_text(
        "def long(prompt, answer):\n    return len(answer) / 10\n\ndef broken(prompt, answer):\n    return None\n"
    )
    return here


@pytest.mark.parametrize(("method", "reward"), [("grpo", "number"), ("ppo", "mine:long"), ("rloo", "mine:long")])
def test_a_policy_against_a_name_or_a_function(sums, monkeypatch, method, reward):
    monkeypatch.syspath_prepend(str(sums))
    assert main(["train", method, "--reward", reward, *SMALL]) == 0
    folder = sums / f"runs/train-{method}/{method}"
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2 * 4 * 4
    cut = [s for s in samples if s["truncated"]]
    whole = [s for s in samples if not s["truncated"]]
    assert all(s["reward"] == -1.0 for s in cut) and whole
    if reward == "number":
        assert {s["reward"] for s in whole} <= {0.0, 1.0}
    else:
        assert all(s["reward"] == len(s["completion"]) / 10 for s in whole)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert ("loss/value" in lines[0]) == (method == "ppo")


def test_rewards_that_cannot_be_used(sums, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(sums))
    assert main(["train", "grpo", "--reward", "mine:broken", *SMALL]) == 2
    assert "reward 'broken' returned None" in capsys.readouterr().err
    assert main(["train", "grpo", "--name", "b", "--reward", "choice", *SMALL]) == 2
    assert "reward 'choice' checks none of these rows, whose targets are: number" in capsys.readouterr().err
