"""Systems that go in rounds, at their smallest: graphs, references, data of each round; killed in round 2 and resumed to the bit."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from caches import own_cache
from posttrain.data import read
from posttrain.errors import ConfigError, ModelError
from posttrain.graph import ordered, override
from posttrain.models.load import find_model, load_tokenizer
from posttrain.registry import RECIPES
from posttrain.rewards.judges import noisy_gold, true_gold
from posttrain.runner import run_recipe
from posttrain.stages import Context, MakePrompts, PreferOnline
from posttrain.work.make_prompts import user_begins

JUDGE = "posttrain.rewards.judges:noisy_gold"
SIZES = {
    "limit": 8,
    "samples": 3,
    "steps": 2,
    "count": 8,
    "max_new_tokens": 12,
    "test_limit": 4,
    "epochs": 1.0,
    "save_every": 1,
}
ROUNDS = {
    "llama3": {"judge": JUDGE, "rounds": 2},
    "qwen2": {},
    "sppo": {"model": "small-base", "data": "smallworld", "judge": JUDGE, "rounds": 2},
    "dno": {"model": "small-base", "data": "smallworld", "judge": JUDGE, "rounds": 2},
    "nemotron4": {"iterations": 1, "rounds": 1},
}


def smallest(name):
    """The recipe with little data; rules of selection take what there is."""
    recipe = RECIPES[name](**ROUNDS[name])
    changes = {}
    for stage_name, stage in recipe.stages.items():
        fields = {f.name for f in dataclasses.fields(stage)}
        changes[stage_name] = {k: v for k, v in SIZES.items() if k in fields}
        if "lora_rank" in fields:
            changes[stage_name]["lora_rank"] = 0
        if "prompts_per_step" in fields:
            changes[stage_name]["prompts_per_step"] = 4
        if getattr(stage, "builder", "") in ("best_worst", "dno"):
            changes[stage_name]["options"] = {}
        if getattr(stage, "builder", "") == "dno":
            changes[stage_name]["options"] = {"least": 0.5, "gap": 0.1, "own_gap": 0.1}
        if getattr(stage, "builder", "") == "best":
            changes[stage_name]["options"] = {}
    return override(recipe, changes)


def run(recipe, root, name=None):
    console = Console(file=StringIO(), width=200)
    return run_recipe(recipe, root=root, name=name, console=console, tiny=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rounds")
    with pytest.MonkeyPatch.context() as patch:
        own_cache(patch, folder / "cache")
        yield folder / "runs"


@pytest.mark.parametrize("name", ["qwen2", "sppo", "dno", "nemotron4", pytest.param("llama3", marks=pytest.mark.slow)])
def test_a_system_runs_in_the_small_world(root, name):
    done = run(smallest(name), root)
    results = json.loads((done / "measure/results.json").read_text())
    assert results["policies"]["trained"]["kl"]["mean"] > 0


def test_a_comparison_wins_the_data_of_a_round(root):
    """SPPO trains on two of three samples with their win rates against all three; DNO has the teacher's answer first."""
    pairs = list(read(run(smallest("sppo"), root) / "pairs2/data/rankings.jsonl"))
    rates = [[r.attributes["win_rate"] for r in e.responses] for e in pairs]
    assert all(len(row) == 2 and row[0] > row[1] for row in rates)
    assert {round(6 * x) for row in rates for x in row} <= set(
        range(7)
    )  # sixths: 1/2 for itself, 0, 1/2 or 1 for each other
    rated = list(read(run(smallest("dno"), root) / "rated2/data/samples.jsonl"))
    assert all(len(e.responses) == 4 and "sampled" not in e.responses[0].meta for e in rated)
    teacher = [e.responses[0].score for e in rated]
    assert sum(teacher) / len(teacher) > 0.6


def test_each_round_starts_from_and_refers_to_the_round_before():
    for name, chain in {
        "sppo": {"policy2": "policy1", "samples2": "policy1", "policy3": "policy2"},
        "dno": {"policy2": "policy1", "answers3": "policy2"},
        "nemotron4": {"rpo1": "dpo2", "rpo2": "rpo1", "asked2": "dpo1", "answers_rpo3": "rpo2"},
        "llama3": {"asked2": "model1", "own6": "model5", "reward3": "model2", "dpo_a4": "sft4", "dpo_b4": "sft4"},
        "qwen2": {"offline": "sft", "online": "offline"},
    }.items():
        stages = ordered(RECIPES[name]())
        assert all(stages[stage].model is stages[before] for stage, before in chain.items()), name


def test_llama3s_averages_are_of_what_was_trained_beside(root):
    recipe = RECIPES["llama3"]()
    stages = recipe.stages
    for turn in range(1, 7):
        assert stages[f"sft_a{turn}"].model == stages[f"sft_b{turn}"].model == "small-base"  # anew each round
        for merged, parts in ((f"sft{turn}", ("sft_a", "sft_b")), (f"model{turn}", ("dpo_a", "dpo_b"))):
            stage = stages[merged]
            assert [stage.policy, *stage.others] == [stages[f"{part}{turn}"] for part in parts]
            assert stage.method == "average"
    assert stages["pairs6"].data == (stages["compared5"], stages["compared6"])
    assert len(stages["ranked6"].data) == 6


def test_a_step_on_fresh_samples_is_merged(tmp_path):
    """With alpha 1 and everything kept a step is the task vector alone; with alpha 0 and everything kept it is AdamW's."""
    start, base = (load_file(Path(find_model(n).path) / "model.safetensors") for n in ("small", "small-base"))
    sizes = {"model": "small", "data": "smallworld", "limit": 4, "prompts_per_step": 4, "steps": 1, "warmup_steps": 0}
    sizes |= {
        "max_new_tokens": 8,
        "reward": "posttrain.data.smallworld_gold:gold_total",
        "lr": 1e-4,
        "dtype": "float32",
    }

    def weights(name, **more):
        (tmp_path / name).mkdir()
        context = Context(dir=tmp_path / name, inputs={}, console=Console(file=StringIO()))
        PreferOnline(**sizes, **more).run(context)
        return load_file(tmp_path / name / "model.safetensors")

    plain = weights("plain")
    merging = {"merging": "ondare", "merging_base": "small-base", "merging_keep": 1.0}
    whole, none = (weights(f"alpha{a:g}", **merging, merging_alpha=a) for a in (1.0, 0.0))
    assert all(torch.equal(none[k], plain[k]) for k in start) and any(
        not torch.equal(plain[k], start[k]) for k in start
    )
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor, 2 * start[name] - base[name], atol=1e-6, rtol=0)


def test_prompts_are_the_models_own_as_a_user(root):
    def make(name, **fields):
        folder = root / name
        folder.mkdir(parents=True)
        console = Console(file=StringIO(), width=200)
        context = Context(dir=folder, inputs={}, console=console, seed=3)
        MakePrompts(model="small-base", max_new_tokens=24, **fields).run(context)
        return [e.prompt[-1].content for e in read(folder / "data/prompts.jsonl")], console.file.getvalue()

    prompts, said = make("prompts", count=12, at_once=8)
    assert len(set(prompts)) == 12 and "draws: " in said
    assert (
        sum(p.split()[0] in ("please", "what", "how", "tell", "describe", "list", "is", "rewrite") for p in prompts)
        >= 4
    )
    assert make("same", count=12, at_once=12)[0] == prompts  # whatever the lots
    with pytest.raises(ConfigError, match=r"4 draws gave 1 different prompts .*, expected 2; ask for fewer"):
        make("few", count=2, tries=2, at_once=4, temperature=0.0)


def test_where_a_user_begins():
    tokenizer = load_tokenizer(find_model("small").path)
    assert tokenizer.convert_ids_to_tokens(user_begins(tokenizer)) == ["<|bos|>", "<|user|>"]
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(ModelError, match="does not write a user's words once, as they are"):
        user_begins(tokenizer)


def test_a_noisy_judge_errs_on_the_same_tenth_of_pairs():
    prompt = "what is two plus three?"
    answers = [f"{word}." for word in ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")]
    pairs = [(a, b) for a in answers for b in [x + " sure" for x in answers] if true_gold(prompt, a, b) != 0.5]
    wrong = [noisy_gold(prompt, a, b) != true_gold(prompt, a, b) for a, b in pairs]
    assert len(pairs) > 20 and 0.02 < sum(wrong) / len(wrong) < 0.2
    assert all(noisy_gold(prompt, a, b) == 1 - noisy_gold(prompt, b, a) for a, b in pairs)


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import test_rounds as t
def strike(event, args):
    if event == "os.rename" and {stage!r} + "/checkpoints" in str(args[0]) and "/.step-" not in str(args[1]):
        strike.seen += 1
        if strike.seen == 2:
            os.kill(os.getpid(), signal.SIGKILL)
strike.seen = 0
sys.addaudithook(strike)
t.run(t.smallest({name!r}), Path({root!r}), "killed")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stage", "last"), [("llama3", "dpo_a2", "model2"), ("qwen2", "online", "online")])
def test_killed_in_round_two_and_resumed_to_the_bit(root, name, stage, last):
    """The process kills itself once the second checkpoint of a stage of round 2 is about to be seen; the same call goes on."""
    folder = root / name
    command = KILLED.format(tests=str(Path(__file__).parent), stage=stage, name=name, root=str(folder))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    assert not (folder / "killed" / stage / "done.json").exists()
    assert list((folder / "killed" / stage / "checkpoints").glob("step-*"))
    resumed, whole = run(smallest(name), folder, "killed"), run(smallest(name), folder, "whole")
    for stage_name in (stage, last):
        one, two = ((place / stage_name / "model.safetensors").read_bytes() for place in (resumed, whole))
        assert one == two
