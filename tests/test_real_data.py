"""On public data that users bring; skipped unless POSTTRAIN_REAL_DATA names a directory that holds it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from rich.console import Console

from posttrain.data import ReadReport, read
from posttrain.data.collate import ranking_rows
from posttrain.models.load import find_model, load_tokenizer, new_reward, weights_package
from posttrain.models.lora import Lora
from posttrain.rewards.model import score_rows
from posttrain.train.loop import Run, fit
from posttrain.train.objectives import RewardModel
from posttrain.train.optim import Optim
from posttrain.train.sources import ranking_source
from posttrain.work.inputs import choose_dtype

FOLDER = os.environ.get("POSTTRAIN_REAL_DATA", "")
pytestmark = [pytest.mark.real_data, pytest.mark.skipif(not FOLDER, reason="POSTTRAIN_REAL_DATA is not set")]


@pytest.mark.parametrize("name", ["pairs__hh-helpful-base__train", "pairs__hh-harmless-base__test"])
def test_hh_rlhf_is_read_with_few_faults_each_named(name):
    report = ReadReport()
    examples = read(Path(FOLDER) / f"{name}.jsonl.gz", skip_bad=40, report=report)
    assert len(examples) > 400
    assert report.faulty + report.useless.total() <= 0.02 * len(examples)
    assert all(f"{name}.jsonl.gz row " in fault for fault in report.bad)
    assert all([r.rank for r in e.responses] == [0, 1] for e in examples)
    assert any(len(e.prompt) > 1 for e in examples)


@pytest.mark.slow
@pytest.mark.skipif(weights_package() is None, reason="needs the SmolLM2 weights package")
def test_a_reward_model_fits_64_pairs(tmp_path):
    path = find_model("smollm2").path
    tokenizer = load_tokenizer(path)
    examples = read(Path(FOLDER) / "pairs__hh-helpful-base__train.jsonl.gz", skip_bad=100)
    rows, _ = ranking_rows(tokenizer, examples, max_length=120, overlong="drop")
    rows = rows[:64]
    assert len(rows) == 64
    model = new_reward(path, dtype=choose_dtype("auto", path), lora=Lora(rank=16), seed=0)
    source = ranking_source(rows, [[0, 1]] * 64, per_step=8, seed=0)
    run = Run(directory=tmp_path, steps=64, max_tokens=1024, save_every=1000, console=Console(quiet=True))
    fit({"reward": model}, RewardModel(), source, optim=Optim(lr=1e-3, schedule="cosine", warmup_steps=4), run=run)
    scores = torch.tensor(score_rows(model, rows))
    assert (scores[:, 0] > scores[:, 1]).float().mean() >= 0.99
