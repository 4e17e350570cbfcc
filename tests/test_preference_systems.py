"""Systems that need pairs only: hermes3, zephyr_orpo, phi3, each at the size of the small world."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from caches import own_cache
from posttrain.cli import main
from posttrain.forest import Branch, Row
from posttrain.models.load import find_model, load_policy
from posttrain.models.lora import Lora, parameters
from posttrain.registry import RECIPES
from posttrain.train.reference import row_logp


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("systems")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        own_cache(patch, folder / "cache")
        yield folder


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_reference_with_its_adapter_off_is_the_base_to_the_bit():
    path = find_model("small").path
    rows = [Row([1, 2, 40, 5, 3], [Branch([50, 51, 5], {"loss": [True] * 3}), Branch([60, 5], {"loss": [True] * 2})])]
    policy = load_policy(path, dtype=torch.float32, lora=Lora(rank=4, alpha=16), train=True)
    with torch.no_grad():
        for parameter in parameters(policy.net, "policy").values():
            parameter.add_(0.3)
    base = row_logp(load_policy(path, dtype=torch.float32), rows, max_tokens=100)
    off = row_logp(replace(policy, adapter=None, trained=False), rows, max_tokens=100)
    on = row_logp(policy, rows, max_tokens=100)
    assert torch.equal(off[0], base[0]) and not torch.allclose(on[0], base[0])


def test_hermes3_trains_an_adapter_with_noise_against_its_base(folder):
    small = "--sft.limit 16 --dpo.limit 16 --evaluate.limit 8 --evaluate.test-limit 8 --sft.epochs 1 --dpo.lora-rank 4 --dpo.lr 1e-3"
    assert main(["run", "hermes3", "--tiny", *small.split()]) == 0
    rows = lines(folder / "runs/hermes3-tiny/dpo/metrics.jsonl")
    assert abs(rows[0]["reward/margin"]) < 0.5 and rows[0]["kl/data"] > 0  # noise moves the policy, not the reference
    results = json.loads((folder / "runs/hermes3-tiny/evaluate/results.json").read_text())
    assert results["reward_accuracy"]["implicit_reward"]["rankings"] == 8


def test_zephyr_orpo_starts_from_the_base_also_when_tiny(folder):
    assert main(["run", "zephyr_orpo", "--tiny", "--orpo.limit", "24", "--measure.test-limit", "12"]) == 0
    run = json.loads((folder / "runs/zephyr_orpo-tiny/run.json").read_text())
    assert (
        run["stages"]["orpo"]["resolved"]["model"] == "small-base" and run["stages"]["orpo"]["resolved"]["lr"] == 1e-3
    )
    results = json.loads((folder / "runs/zephyr_orpo-tiny/measure/results.json").read_text())
    gaps = {name: found["gap_token"] for name, found in results["rankings"].items()}
    assert gaps["trained"] > gaps["start"] + 0.05
    assert results["policies"]["trained"]["chosen"]["mean"] > results["policies"]["start"]["chosen"]["mean"] + 0.5


def test_phi3_rejects_what_the_data_calls_a_failure(folder):
    small = "--sft.limit 16 --sft.epochs 1 --pairs.limit 16 --measure.test-limit 8 --dpo.lr 1e-3"
    assert main(["run", "phi3", "--tiny", *small.split()]) == 0
    rows = lines(folder / "runs/phi3-tiny/pairs/data/rankings.jsonl")
    assert len(rows) == 48  # each of sixteen prompts has three answers that fail
    policies = json.loads((folder / "runs/phi3-tiny/measure/results.json").read_text())["policies"]
    assert policies["trained"]["rejected"]["mean"] < policies["start"]["rejected"]["mean"]


def test_the_papers_numbers_stand_in_the_recipes():
    hermes, zephyr = RECIPES["hermes3"]().stages["dpo"], RECIPES["zephyr_orpo"]().stages["orpo"]
    assert (hermes.lora_rank, hermes.lora_alpha, hermes.noise, hermes.schedule) == (32, 16, 5.0, "linear")
    assert (zephyr.loss, zephyr.options, zephyr.epochs) == ("orpo", {"lam": 0.05}, 3)


def test_the_page_of_self_made_pairs_holds_what_was_measured():
    from benchmarks.systems.__main__ import PAGE, SEEDS, kept, page, verdict

    lines = kept()
    assert page(lines) == PAGE.read_text(), "run: python -m benchmarks.systems"
    assert {x["seed"] for x in lines} <= set(SEEDS) and len({(x["recipe"], x["seed"]) for x in lines}) == len(lines)
    assert verdict(True, [{}]) == "1 of 3 seeds so far" and verdict(False, [{}] * 3) == "not shown at this scale"
