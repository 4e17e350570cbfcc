"""Stages with ``merging``: what they read, what they refuse, and that steps are merged."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from posttrain.errors import ConfigError
from posttrain.models.load import find_model, model_files
from posttrain.stages import SFT, Context, Prefer, Pretrain, TrainReward

START, BASE = (load_file(Path(find_model(name).path) / "model.safetensors") for name in ("small", "small-base"))
SIZES = {"model": "small", "data": "smallworld", "limit": 4, "prompts_per_step": 4, "warmup_steps": 0, "epochs": 1.0}


def weights(directory, stage):
    directory.mkdir()
    console = Console(file=StringIO(), width=200)
    stage.run(Context(dir=directory, inputs={}, console=console))
    return load_file(directory / "model.safetensors"), console.file.getvalue()


def test_a_step_of_preference_optimisation_is_merged(tmp_path):
    """One step of AdamW at rate r moves every entry by r or less; with alpha 1 it is the task vector's kept entries alone."""
    plain, said = weights(tmp_path / "plain", Prefer(lr=1e-4, **SIZES))
    assert "merging" not in said and max(float((plain[k] - START[k]).abs().max()) for k in START) <= 1.01e-4
    whole = Prefer(lr=1e-4, merging="ondare", merging_base="small-base", merging_alpha=1.0, merging_keep=1.0, **SIZES)
    found, said = weights(tmp_path / "whole", whole)
    assert "ondare: the start is 67.1 from" in said
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, 2 * START[name] - BASE[name], atol=1e-6, rtol=0)
    half = Prefer(lr=1e-4, merging="onties", merging_base="small-base", merging_alpha=0.0, merging_keep=0.25, **SIZES)
    found, _ = weights(tmp_path / "half", half)
    share = {k: float((found[k] != START[k]).double().mean()) for k in START}
    assert (
        0.1 < sum(share.values()) / len(share) < 0.75
    )  # the first step's sizes are nearly equal, and equals stay together
    assert all(torch.equal(found[k][found[k] != START[k]], plain[k][found[k] != START[k]]) for k in START)


def test_the_base_is_one_of_the_files_a_stage_reads():
    stage = SFT(model="small", data="smallworld", merging="ondare", merging_base="small-base")
    assert set(model_files(find_model("small-base").path)) <= set(stage.files())
    stage.check()


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (SFT(model="small", data="smallworld", merging="dare"), "unknown online merging 'dare'"),
        (
            SFT(model="small", data="smallworld", merging="ondare"),
            "merging_base=None in SFT; it merges steps of a policy",
        ),
        (Prefer(model="small", lora_rank=4, merging="ondare", merging_base="small-base"), "lora_rank=4"),
        (
            Prefer(model="small", merging="onties", merging_base="small", merging_keep=0.0),
            "got keep=0; expected more than 0",
        ),
        (TrainReward(model="small", merging="ondare", merging_base="small-base"), "in TrainReward; it merges steps"),
        (Pretrain(merging="ondare", merging_base="small-base"), "in Pretrain; it merges steps"),
    ],
)
def test_what_is_refused_before_anything_runs(stage, message):
    with pytest.raises(ConfigError, match=message):
        stage.check()
