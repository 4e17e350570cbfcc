"""``posttrain merge`` and the stage `Merge`, on the small models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from posttrain.cli import main
from posttrain.errors import ConfigError
from posttrain.models.load import find_model, load_policy
from posttrain.models.lora import Lora, save_adapter
from posttrain.stages import SFT, Context, Merge

SMALL, BASE = (Path(find_model(name).path) for name in ("small", "small-base"))


def test_merging_two_models(here, capsys):
    assert main(["merge", "average", "small", "small-base", "--weights", "0.75,0.25", "--out", "mix"]) == 0
    printed = capsys.readouterr().out
    assert "Merged by average into mix" in printed and "0.75" in printed and "38 tensors, float32" in printed
    found, one, two = (load_file(p / "model.safetensors") for p in (Path("mix"), SMALL, BASE))
    assert found.keys() == one.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, 0.75 * one[name] + 0.25 * two[name], atol=1e-6, rtol=0)
    assert AutoModelForCausalLM.from_pretrained("mix").config.tie_word_embeddings
    record = json.loads(Path("mix/merge.json").read_text())
    assert record["method"] == "average" and record["base"] is None
    assert main(["merge", "warp", "small", "--base", "small-base", "--eta", "0", "--out", "start"]) == 0
    assert "base" in capsys.readouterr().out
    assert all(torch.equal(v, two[k]) for k, v in load_file("start/model.safetensors").items())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["average"],
            "`posttrain merge` needs a method and the models: posttrain merge METHOD MODEL MODEL ... --out DIR",
        ),
        (["average", "small"], "`posttrain merge` needs --out DIR"),
        (["avrage", "small", "--out", "x"], "unknown merge method 'avrage'; did you mean 'average'?"),
        (
            ["average", "small", "--out", "x", "--density", "1"],
            "unknown option '--density' of `posttrain merge average`",
        ),
        (["ties", "small", "--out", "x", "--density", "half"], "--density: got 'half', expected float"),
        (["ties", "small", "--out", "x"], "'ties' merges what models learnt since a base; name it (--base MODEL)"),
        (["average", "small", "--out", "x", "--base", "small"], "'average' reads no base, got 'small'; leave it out"),
        (
            ["average", "small", "small-base", "--out", "x", "--weights", "1"],
            "got 1 weight for 2 models; give one a model",
        ),
        (["average", "small", "nowhere", "--out", "x"], "unknown model 'nowhere'"),
        (["average", "small", "--out", str(SMALL)], "holds a model; choose another directory"),
    ],
)
def test_errors(here, capsys, args, message):
    assert main(["merge", *args]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("posttrain: ") and message in printed and printed.count("\n") == 1
    assert not Path("x").exists() and list(here.iterdir()) == []


def test_help(capsys):
    assert main(["merge", "--help"]) == 0
    printed = capsys.readouterr().out
    assert (
        printed.startswith("usage: posttrain merge METHOD MODEL MODEL ... --out DIR") and "--density (ties)" in printed
    )


def context(tmp_path, **inputs):
    return Context(dir=tmp_path / "merge", inputs=inputs, console=Console(quiet=True))


def test_the_stage_adds_adapters_to_their_base_and_merges(tmp_path):
    """An adapter as reinforcement learning leaves it, in ``policy`` below its stage's directory, whatever base it names."""
    model = load_policy(str(BASE), dtype=torch.float32, lora=Lora(rank=2, alpha=4), train=True)
    for parameter in model.parameters().values():
        parameter.data.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    save_adapter(model.net, "policy", tmp_path / "tuned" / "policy", "moved since", Lora(rank=2, alpha=4))
    (tmp_path / "merge").mkdir()
    start = SFT(model="small-base")
    places = {"policy": tmp_path / "tuned", "base": BASE, "others.0": SMALL}
    Merge(policy=start, base=start, others=(start,), weights=(0.5, 0.5)).run(context(tmp_path, **places))
    found, other = (load_file(p / "model.safetensors") for p in (tmp_path / "merge", SMALL))
    with torch.no_grad():
        from posttrain.models.lora import merged

        with merged(model.net, "policy"):
            adapted = {k.replace(".base_layer", ""): v.clone() for k, v in model.net.state_dict().items()}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, (adapted[name] + other[name]) / 2, atol=1e-6, rtol=0)
    Merge(policy=start, base="small-base", method="ties", options={"density": 0.5}).run(
        context(tmp_path, policy=tmp_path / "tuned")
    )
    record = json.loads((tmp_path / "merge" / "merge.json").read_text())
    assert record["method"] == "ties" and record["base"]["path"] == str(BASE)


def test_the_stage_refuses_before_anything_runs():
    start = SFT(model="small-base")
    for given, message in [
        ({"method": "tied"}, "unknown merge method 'tied'"),
        ({"options": {"density": 0.1}}, "merge method 'average' has no option 'density'"),
        ({"weights": (0.5, 0.5)}, "got 2 weights for 1 models"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Merge(policy=start, base=start, **given).check()
