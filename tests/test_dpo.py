"""DPO from the command line on the small world, as a recipe and as a method on data of one's own."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from caches import own_cache
from posttrain.cli import main
from posttrain.models.load import find_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dpo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        own_cache(patch, folder / "cache")
        yield folder


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def run(folder):
    options = "--tiny --model small --data smallworld --test smallworld --limit 48 --test-limit 24"
    assert main(["run", "dpo", *options.split()]) == 0
    return folder / "runs/dpo-tiny"


def test_the_loss_falls_from_log_2(run):
    rows = lines(run / "dpo/metrics.jsonl")
    assert len(rows) == 6 and rows[0]["loss/preference"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[0]["reward/margin"] == pytest.approx(0, abs=1e-4)
    assert rows[-1]["loss/preference"] < 0.69 and rows[-1]["reward/margin"] > 0.01
    assert rows[-1]["kl/data"] > 0


def test_the_evaluation_compares_the_implicit_reward_with_baselines(run):
    results = json.loads((run / "evaluate/results.json").read_text())
    assert set(results["reward_accuracy"]) == {
        "implicit_reward", "policy_logp", "start_logp", "length", "bag_of_words",
    }  # fmt: skip
    names = [row["name"] for row in results["reward_comparisons"]]
    assert "implicit_reward - start_logp" in names and "implicit_reward - length" in names
    entry = results["reward_accuracy"]["implicit_reward"]
    assert entry["rankings"] == 24 and 0.5 < entry["accuracy"] <= 1
    assert 0.5 < results["training_accuracy"]["implicit_reward"] <= 1
    assert (run / "report.html").exists()


def test_the_model_loads_in_plain_transformers_and_has_moved(run):
    model = AutoModelForCausalLM.from_pretrained(run / "dpo")
    start = AutoModelForCausalLM.from_pretrained(find_model("small").path)
    assert AutoTokenizer.from_pretrained(run / "dpo").chat_template
    moved = [float((a - b).abs().max()) for a, b in zip(model.parameters(), start.parameters(), strict=True)]
    assert 0 < max(moved) < 0.1


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


PAIRS = [
    {"prompt": "what is two plus two?", "chosen": "four.", "rejected": "go away."},
    {"prompt": "repeat the word tree.", "chosen": "tree.", "rejected": "the word is tree."},
    {"prompt": "what is one plus two?", "chosen": "three.", "rejected": "i do not know."},
]


@pytest.mark.parametrize("lora", ["0", "4"])
def test_one_method_on_pairs_of_ones_own(folder, lora):
    data, name = write(folder / f"pairs{lora}.jsonl", PAIRS), f"own{lora}"
    options = f"--data {data} --model small --beta 0.05 --lora-rank {lora} --prompts-per-step 2 --lr 1e-3"
    assert main(["train", "dpo", *options.split(), "--name", name, "--dtype", "float32", "--epochs", "6"]) == 0
    stage = json.loads((folder / "runs" / name / "dpo/stage.json").read_text())
    assert stage["config"]["beta"] == 0.05 and stage["config"]["loss"] == "dpo"
    rows = lines(folder / "runs" / name / "dpo/metrics.jsonl")
    assert rows[0]["loss/preference"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[-1]["loss/preference"] < rows[0]["loss/preference"] and rows[-1]["accuracy/pairs"] == 1
    assert AutoModelForCausalLM.from_pretrained(folder / "runs" / name / "dpo").dtype == torch.float32


def test_a_row_of_weight_0_is_said_and_left_out(folder, capsys):
    rows = [{**row, "weight": weight} for row, weight in zip(PAIRS, (1, 0, 2.5), strict=True)]
    data = write(folder / "weighted.jsonl", rows)
    options = f"--data {data} --model small --lora-rank 0 --prompts-per-step 2 --epochs 1 --dtype float32"
    assert main(["train", "dpo", *options.split(), "--name", "weighted"]) == 0
    assert "1 of 3 rows have weight 0 and are not trained on" in capsys.readouterr().out
    assert len(lines(folder / "runs/weighted/dpo/metrics.jsonl")) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("train dop", "unknown method 'dop'; did you mean 'dpop'?"),
        ("train", "`posttrain train` needs a method: posttrain train METHOD; known: apa, "),
        ("train dpo --bta 0.1 --model small", "stage 'dpo' has no field 'bta'; did you mean 'beta'?"),
        ("train dpo --beta much --model small", "--dpo.beta: got 'much', expected float or none"),
        ("train dpo --loss dpoo --model small", "unknown preference loss 'dpoo'; did you mean 'dpo'?"),
        ("train dpo --options gamma,1 --model small", "preference loss 'dpo' has no option 'gamma'"),
        ("train ppo", "needs --reward"),
        ("train ppo --reward nowhere --model small", "no reward model in 'nowhere' (no reward.json)"),
        ("train dpo --data prompts.jsonl --model small", "has no rankings"),
    ],
)
def test_faults_of_usage_are_one_line(arguments, said, folder, capsys):
    write(folder / "prompts.jsonl", [{"prompt": "what is two plus two?"}])
    assert main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_help_of_a_method_lists_its_fields_without_the_stage(capsys):
    assert main(["train", "dpo", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "  --beta float or none (now 0.1)" in printed and "  --prompts-per-step int (now 8)" in printed
    assert main(["train", "ppo", "--help"]) == 0
    assert "  --reward str (needed)" in capsys.readouterr().out
