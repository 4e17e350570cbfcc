"""Systems by PPO with something beside it: chatglm_rlhf at the size of the small world, and the papers' numbers in both."""

from __future__ import annotations

import json

import pytest

from caches import own_cache
from posttrain.cli import main
from posttrain.registry import METHODS, RECIPES


def test_chatglm_starts_at_zero_and_keeps_old_answers(tmp_path, monkeypatch):
    """Rewards relative to the start, text beside the samples, the step within the backward pass, up to the stage that trains."""
    monkeypatch.chdir(tmp_path)
    own_cache(monkeypatch, tmp_path / "cache")
    small = "--until reinforce --sft.limit 16 --sft.epochs 1 --reward.epochs 1 --reward_unseen.epochs 0.1 --reinforce.steps 4"
    assert main(["run", "chatglm_rlhf", "--tiny", *small.split()]) == 0
    place = tmp_path / "runs/chatglm_rlhf-tiny/reinforce"
    rows = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    samples = [json.loads(line) for line in (place / "samples.jsonl").read_text().splitlines()]
    base = json.loads((place / "start_scores.json").read_text())
    assert len(rows) == 4 and len(base) == 96 and all(row["loss/ptx"] > 0 for row in rows)
    first = [s for s in samples if s["step"] == 0]
    assert len(first) == 16
    assert all(min(abs(s["parts"]["raw"] - s["reward"] - b) for b in base.values()) < 1e-6 for s in first)
    assert rows[0]["reward/mean"] == pytest.approx(sum(s["reward"] for s in first) / 16, abs=1e-5)
    assert abs(rows[0]["reward/mean"]) < 3 * rows[0]["reward/std"] / 16**0.5  # 0 but for chance
    assert rows[0]["optim/grad_norm"] > 0 and (place / "policy/adapter_model.safetensors").exists()


def test_what_stands_beside_ppo_in_the_recipes():
    chatglm, instruct = (RECIPES[name]().stages["reinforce"] for name in ("chatglm_rlhf", "instructgpt"))
    assert (chatglm.against_start, chatglm.fused, chatglm.ptx, chatglm.cut_score) == (1, True, 0.5, None)
    assert (instruct.ptx, instruct.ptx_share, instruct.against_start, instruct.fused) == (0.1, 0.1, 0, False)
    assert METHODS["ppo"]("a directory").stages["ppo"].ptx == 0  # its prompts need no answers
