"""Quark end to end: tokens that a plain model keeps, the stage with its resume, the recipe and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from caches import own_cache
from posttrain.cli import main
from posttrain.errors import ConfigError
from posttrain.registry import METHODS
from posttrain.stages import Context, Quark

GOLD = "posttrain.data.smallworld_gold:gold_total"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quark")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        own_cache(patch, folder / "cache")
        yield folder


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def stage(**changes) -> Quark:
    given = METHODS["quark"](GOLD).stages["quark"]
    small = {"model": "small", "data": "smallworld", "limit": 8, "steps": 6, "explore_every": 3, "rows_per_step": 4, "bins": 3,
             "max_new_tokens": 8, "save_every": 1, "dtype": "float32"}  # fmt: skip
    return replace(given, **(small | changes))


def context(directory):
    directory.mkdir()
    return Context(dir=directory, inputs={}, console=Console(file=StringIO(), width=200))


@pytest.fixture(scope="module")
def whole(folder):
    found = context(folder / "whole")
    stage().run(found)
    return found.dir


def test_a_plain_model_keeps_the_tokens_and_never_writes_them(whole):
    tokenizer, net = AutoTokenizer.from_pretrained(whole), AutoModelForCausalLM.from_pretrained(whole)
    ids = tokenizer.convert_tokens_to_ids([f"<|reward_{k}|>" for k in range(3)])
    assert ids == sorted(ids) and len(set(ids)) == 3 and net.get_input_embeddings().weight.shape[0] == ids[-1] + 1
    assert net.generation_config.suppress_tokens == ids
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "add one and two"}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert asked["input_ids"][0, 0] == ids[0] and not (asked["input_ids"][0, 1:] >= ids[0]).any()
    with torch.no_grad():
        net.get_input_embeddings().weight[ids] *= 50  # now they would win
    written = net.generate(**asked, max_new_tokens=6, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert not (written >= ids[0]).any()
    assert not (whole / "start").exists()


def test_the_pool_and_the_likelihood_are_logged(whole):
    rows = lines(whole / "metrics.jsonl")
    assert [r["pool/size"] for r in rows if "pool/size" in r] == [8, 16]
    assert all(r["loss/quark"] == pytest.approx(r["loss/total"]) and r["kl/full"] >= 0 for r in rows)
    assert len(lines(whole / "samples.jsonl")) == 16


def test_the_stage_goes_on_to_the_bit(folder, whole):
    cut = context(folder / "cut")
    constant = {"schedule": "constant", "warmup_steps": 0}
    straight = context(folder / "straight")
    stage(**constant).run(straight)
    stage(steps=3, **constant).run(cut)
    stage(**constant).run(cut)
    found = [load_file(c.dir / "model.safetensors") for c in (straight, cut)]
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])
    assert lines(straight.dir / "samples.jsonl") == lines(cut.dir / "samples.jsonl")


def test_values_that_cannot_work_are_refused(folder, whole):
    with pytest.raises(ConfigError, match="want a whole network"):
        stage(lora_rank=4)
    with pytest.raises(ConfigError, match="explorations that divide the steps"):
        stage(steps=7)
    with pytest.raises(ConfigError, match="at most as many steps between"):
        stage(limit=2).run(context(folder / "few"))
    with pytest.raises(ConfigError, match="has reward tokens already"):
        stage(model=str(whole)).run(context(folder / "twice"))


def test_the_recipe_runs_end_to_end(folder):
    small = "--sft.limit 8 --sft.epochs 1 --reward.limit 8 --reward.epochs 1 --policy.limit 8 --policy.steps 4 "
    small += "--policy.explore-every 4 --policy.rows-per-step 4 --policy.max-new-tokens 8 --evaluate.prompts 4 --evaluate.samples 1"
    assert main(["run", "quark", "--tiny", *small.split(), "--evaluate.max-new-tokens", "8"]) == 0
    results = json.loads((folder / "runs/quark-tiny/evaluate/results.json").read_text())
    assert list(results["policies"]) == ["start", "bin 4", "bin 3", "bin 2", "bin 1", "bin 0"]
    assert len(results["bin_means"]) == 5 and -1 <= results["rank_correlation"] <= 1
    assert results["bin_means"][0] == pytest.approx(results["policies"]["bin 0"]["reward"]["mean"])
