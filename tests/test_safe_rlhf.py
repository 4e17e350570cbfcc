"""Safe RLHF: data judged along two axes, the stage with its resume, red-team rounds, the recipe and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from caches import own_cache
from posttrain.cli import main
from posttrain.data import read, smallworld_safety
from posttrain.errors import ConfigError, ModelError
from posttrain.registry import METHODS
from posttrain.rewards.base import Score
from posttrain.rewards.builders import build
from posttrain.rewards.combine import with_part
from posttrain.stages import Context, RedTeam
from posttrain.types import Example, Message, Response
from posttrain.work.red_team import told, worst

COST = "posttrain.data.smallworld_safety:cost"
USE = "posttrain.data.smallworld_safety:usefulness"
METHOD, REFUSAL = "to burn the boat, use oil and fire.", "i am sorry, i can not help to burn the boat."
HARMFUL = "tell me how to burn the boat"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("safe")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        own_cache(patch, folder / "cache")
        yield folder


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_help_and_harm_are_judged_apart():
    assert smallworld_safety.cost(HARMFUL, METHOD) == 1 and smallworld_safety.cost(HARMFUL, REFUSAL) == -1
    assert smallworld_safety.cost(HARMFUL, "use oil.") == 0 and smallworld_safety.unsafe(HARMFUL, "use oil.")
    assert smallworld_safety.usefulness(HARMFUL, METHOD) == pytest.approx(0.5 + 0.15 + 0.35 * 0.6)
    assert smallworld_safety.usefulness(HARMFUL, REFUSAL) == pytest.approx(0.6 * 0.5 + 0.15 + 0.35)
    assert smallworld_safety.cost("add one and two", "three.") == -1
    rows = smallworld_safety.demonstrations(200)
    harmful = [smallworld_safety.unsafe(r["prompt"], r["completion"]) for r in rows if r["kind"] == "harmful"]
    assert 80 < len(harmful) < 120 and 0.5 < sum(harmful) / len(harmful) < 0.8


def test_builders_take_an_axis_each(tmp_path):
    path = smallworld_safety.write(tmp_path, n_comparisons=60, n_demonstrations=4, n_prompts=4)["rankings"]
    rows = lines(path)
    helps, harms = (build(name, read(path)).examples for name in ("helpfulness", "harmlessness"))
    assert len(helps) == len(harms) == 60
    for row, a, b in zip(rows, helps, harms, strict=True):
        assert a.responses[0].text == row[f"response_{row['better_response_id']}"]
        assert b.responses[0].text == row[f"response_{row['safer_response_id']}"]
        assert [r.rank for r in b.responses] == [0, 1]
        unsafe = [smallworld_safety.unsafe(row["prompt"], r.text) for r in b.responses]
        assert [r.attributes["safe"] for r in b.responses] == [float(not u) for u in unsafe]
        assert unsafe[1] >= unsafe[0]
    assert any(a.responses[0].text == b.responses[1].text for a, b in zip(helps, harms, strict=True))


def test_without_comparisons_unsafe_answers_follow_the_others():
    def said(text, rank, failure=None):
        return Response(messages=(Message(role="assistant", content=text),), rank=rank, failure=failure)

    responses = (said("c", 2), said("a", 0, "unsafe"), said("b", 1, "rude"))
    example = Example(prompt=(Message(role="user", content="p"),), responses=responses)
    (found,) = build("harmlessness", [example]).examples
    assert [(r.rank, r.attributes["safe"]) for r in found.responses] == [(1, 1.0), (2, 0.0), (0, 1.0)]
    (as_it_is,) = build("helpfulness", [example]).examples
    assert [r.rank for r in as_it_is.responses] == [2, 0, 1]
    assert build("harmlessness", [replace(example, responses=responses[:1])]).examples == []


def test_a_reward_with_a_part_abstains_where_either_does():
    given = [Score(1.0, {"x": 2.0}), Score(None), Score(3.0)]
    other = [Score(-1.0), Score(0.5), Score(None)]
    found = with_part(lambda c: given, lambda c: other, "cost")([None] * 3)  # type: ignore[list-item]
    assert [s.value for s in found] == [1.0, None, None]
    assert found[0].parts == {"x": 2.0, "cost": -1.0}


def test_red_teaming_keeps_the_prompts_of_highest_cost_in_their_order():
    examples = [Example(prompt=(Message(role="user", content=t),)) for t in "abcde"]
    costs = [[0.0, -1.0], [1.0, None], [None, None], [3.0, -1.0], [2.0, 2.0]]
    found = worst(examples, costs, 0.5)
    assert [e.prompt[0].content for e, _ in found] == ["b", "e"]  # b and d are tied, the earlier one stays
    assert [e.prompt[0].content for e, _ in worst(examples, costs, 0.6)] == ["b", "d", "e"]
    assert len(worst(examples, costs, 0.01)) == 1
    assert told(examples[3], costs[3]).meta["red_team"] == {"samples": 2, "cost": 1.0, "unsafe": 0.5}
    assert told(examples[2], costs[2]).meta["red_team"] == {"samples": 2}
    with pytest.raises(ConfigError, match="above 0 and at most 1"):
        RedTeam(cost=COST, keep=0.0)


def stage(folder, **changes):
    """The command's own stage at the smallest size, with functions as reward and cost."""
    smallworld_safety.write(folder / "data", n_demonstrations=4, n_comparisons=8, n_prompts=16)
    given = METHODS["safe_rlhf"](USE, COST).stages["safe_rlhf"]
    small = {"model": "small", "data": str(folder / "data"), "lora_rank": 4, "steps": 4, "prompts_per_step": 4, "window": 12,
             "updates_per_rollout": 2, "max_new_tokens": 12, "save_every": 1, "dtype": "float32"}  # fmt: skip
    return replace(given, **(small | changes))


def context(directory):
    directory.mkdir()
    return Context(dir=directory, inputs={}, console=Console(file=StringIO(), width=200))


def test_the_stage_goes_on_to_the_bit_with_its_multiplier_and_window(folder):
    whole, cut = context(folder / "whole"), context(folder / "cut")
    stage(folder, steps=6).run(whole)
    stage(folder, steps=4).run(cut)
    stage(folder, steps=6).run(cut)
    found = [load_file(c.dir / "model.safetensors") for c in (whole, cut)]
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])
    rows = [[r for r in lines(c.dir / "metrics.jsonl") if "cost/multiplier" in r] for c in (whole, cut)]
    keys = ("cost/mean", "cost/recent", "cost/multiplier", "reward/mean")
    assert [[r[k] for k in keys] for r in rows[0]] == [[r[k] for k in keys] for r in rows[1]]
    multiplier = 1.0
    for row in rows[0]:  # by the window of the newest 12 responses, 8 of them new
        multiplier *= 2.718281828459045 ** (0.1 * multiplier * row["cost/recent"])
        assert row["cost/multiplier"] == pytest.approx(multiplier)
    assert lines(whole.dir / "samples.jsonl") == lines(cut.dir / "samples.jsonl")


def test_models_of_the_wrong_side_are_refused(folder):
    for kind, sign in (("cost", -1), ("bradley_terry", 1)):
        (folder / kind).mkdir(exist_ok=True)
        (folder / kind / "reward.json").write_text(json.dumps({"kind": kind, "sign": sign, "mean": 0.0}))
        (folder / kind / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"reward: .* of kind 'cost'; expected one whose better answers score higher"):
        stage(folder, reward=str(folder / "cost")).run(context(folder / "wrong"))
    with pytest.raises(ModelError, match=r"cost: .* of kind 'bradley_terry'; expected one of kind 'cost'"):
        stage(folder, cost=str(folder / "bradley_terry")).run(context(folder / "wrong2"))
    with pytest.raises(ConfigError, match="expected it to divide both"):
        stage(folder, steps=5)


def test_the_recipe_runs_end_to_end(folder):
    stages = {"sft": "limit=8 epochs=1", "helps": "limit=12", "harms": "limit=12", "heldout_harms": "limit=8",
              "reward": "epochs=1", "cost": "epochs=1", "policy": "steps=2 prompts-per-step=4",
              "red_team": "limit=12 samples=1", "policy2": "steps=1 prompts-per-step=4", "evaluate": "prompts=6 samples=1"}  # fmt: skip
    pairs = [(name, *x.split("=")) for name, given in stages.items() for x in given.split()]
    typed = [part for name, key, value in pairs for part in (f"--{name}.{key}", value)]
    assert main(["run", "safe_rlhf", "--tiny", "--data", "smallworld-safety", *typed]) == 0
    run = folder / "runs/safe_rlhf-tiny"
    prompts = read(run / "red_team/data/prompts.jsonl")
    assert len(prompts) == 6 and all("cost" in e.meta["red_team"] and not e.responses for e in prompts)
    asked = {e.prompt[-1].content for e in prompts}
    assert {row["prompt"] for row in lines(run / "policy2/samples.jsonl")} <= asked
    results = json.loads((run / "evaluate/results.json").read_text())
    assert list(results["policies"]) == ["sft", "policy", "policy2"]
    assert {"reward", "cost", "unsafe", "kl", "length"} <= set(results["policies"]["policy"])
    assert results["policies"]["sft"]["kl"]["mean"] == pytest.approx(0, abs=1e-6)
    assert 0 <= results["cost_sign_accuracy"] <= 1 and results["reward_accuracy"]["cost"]["pairs"] == 8
