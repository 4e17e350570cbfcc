"""Every preference loss is a method of the command, with the data it learns from."""

from __future__ import annotations

import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from caches import own_cache
from posttrain.cli import main
from posttrain.losses import find_loss, preference
from posttrain.losses.preference import dpo
from posttrain.registry import METHODS
from posttrain.train.objectives import objectives

EXAMPLE = Path(__file__).parents[1] / "examples" / "new_loss.py"
WORDS = ["tree", "stone", "river", "cloud"]
PAIRS = [
    {"prompt": f"repeat the word {w}.", "chosen": f"{w}.", "rejected": f"the word is {w}.", "chosen_rating": 4.0 + k,
     "rejected_rating": 1.0}
    for k, w in enumerate(WORDS)
]  # fmt: skip
LABELS = [
    {"prompt": f"repeat the word {w}.", "completion": f"{w}." if k % 2 else "go away.", "label": bool(k % 2)}
    for k, w in enumerate(WORDS)
]
RATINGS = [{"prompt": r["prompt"], "completion": r["completion"], "score": 1.0 + k} for k, r in enumerate(LABELS)]
PROMPTS = [{"prompt": row["prompt"]} for row in PAIRS]
ROWS = {"pairs": PAIRS, "labels": LABELS, "ratings": RATINGS, "prompts": PROMPTS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    for name, rows in ROWS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        own_cache(patch, folder / "cache")
        yield folder


def data_of(name):
    kind = find_loss(name).kind
    return {"unpaired loss": "labels", "valued loss": "ratings"}.get(kind, "pairs")


def trained(folder, name, *more, run=None):
    run = run or f"train-{name}"
    options = (
        f"--data {data_of(name)}.jsonl --model small --lora-rank 0 --prompts-per-step 2 --epochs 1 --dtype float32"
        f" --name {run}"
    )
    assert main(["train", name, *options.split(), *more]) == 0
    return [json.loads(line) for line in (folder / f"runs/{run}/{name}/metrics.jsonl").read_text().splitlines()]


OTHERS = ("policy_gradient", "reward_ranked")  # losses of algorithms and of reward models
ALL = sorted(loss for name in objectives for loss in objectives.facts(name).get("losses", ()) if name not in OTHERS)
FEW = ["simpo", "reward_aware_po", "dno", "tdpo2", "mallows", "dpo_nll_masked", "d2o", "kto", "dro_v", "beta_dpo"]
"""One of each kind of what a loss reads."""


@pytest.mark.parametrize("name", FEW)
def test_a_loss_is_a_method(folder, name, capsys):
    rows = trained(folder, name)
    assert len(rows) == 2 and all(math.isfinite(v) for row in rows for v in row.values())
    printed = capsys.readouterr().out
    assert "FAILED" not in printed and (" at the " in printed) == (name != "simpo")
    if name == "kto":
        assert "answers to other prompts: 4 rows have one" in printed and "logratio/mismatched" in rows[0]
    if name == "dro_v":  # of rewards with mean 0 and variance 1, before the value network knows anything
        assert "value/error" in rows[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ALL if name not in (*FEW, "xpo", "dpo")])
def test_every_loss_is_a_method(folder, name):
    assert len(trained(folder, name)) == 2


def test_options_of_a_loss(folder):
    first = trained(folder, "cpo", "--loss.beta", "0.5", "--loss.lam", "0", run="options")[0]
    margin = first["logp/chosen"] - first["logp/rejected"]
    assert first["reward/margin"] == pytest.approx(0.5 * margin, rel=1e-4)
    config = json.loads((folder / "runs/options/cpo/stage.json").read_text())["config"]
    assert config["options"] == {"lam": 0.0} and config["beta"] == 0.5 and config["loss"] == "cpo"


def test_the_scale_of_dpo_is_the_one_that_was_typed(folder):
    one, two = (trained(folder, "dpo", option, "0.5", run=f"scale{option}")[1] for option in ("--beta", "--loss.beta"))
    assert one["reward/margin"] == two["reward/margin"] != 0
    config = json.loads((folder / "runs/scale--loss.beta/dpo/stage.json").read_text())["config"]
    assert config["beta"] == 0.5 and config["options"] == {}


@pytest.mark.parametrize("name", ["kto", "dro_v"])
def test_losses_of_single_answers_learn_from_pairs_too(folder, name, capsys):
    options = f"--data pairs.jsonl --model small --lora-rank 0 --prompts-per-step 4 --epochs 1 --name {name}-of-pairs"
    assert main(["train", name, *options.split()]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "the best answer as a good one, the worst as a bad one: 8 answers" in told
    rows = (folder / f"runs/{name}-of-pairs/{name}/metrics.jsonl").read_text().splitlines()
    assert len(rows) == 2


def test_help_of_a_loss_lists_its_options(capsys):
    assert main(["train", "simpo", "--help"]) == 0
    told = capsys.readouterr().out.split("\nloss simpo:\n")[1].splitlines()
    assert told[0].startswith("  SimPO: -log sigmoid(beta") and told[1] == "  learns from pairs"
    assert told[-2:] == ["  --loss.beta float (now 2.0)", "  --loss.gamma float (now 1.0)"]
    assert main(["train", "dpo", "--help"]) == 0
    assert capsys.readouterr().out.endswith("  --loss.beta float (now 0.1)\n")
    assert main(["train", "sft", "--help"]) == 0
    assert "--loss." not in capsys.readouterr().out.partition("stage sft")[2]


def test_an_adapter_is_asked_for_in_a_word(folder):
    options = "--tiny --lora --limit 8 --epochs 1 --dtype float32 --name adapter"
    assert main(["train", "ipo", *options.split()]) == 0
    config = json.loads((folder / "runs/adapter/ipo/stage.json").read_text())["config"]
    assert config["lora_rank"] == 16


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("rpo", "method 'rpo' may be several methods; say which: iterative_rpo"),
        ("dro", "say which: dro_v"),
        ("spo --data pairs.jsonl", "say which: sppo or sppo_hard (win rates as targets), or the self-play scores that"),
        ("simpoo", "unknown method 'simpoo'; did you mean 'simpo'?"),
        ("zzz", "sft, or a preference loss (`posttrain list losses`)"),
        ("dpo --beta 0.2 --loss.beta 0.1", "--beta and --loss.beta are the same; give one of them"),
        ("simpo --options gamma,1 --loss.gamma 1", "--options and --loss.OPTION set the same"),
        ("simpo --loss.gamma", "--loss.gamma needs a value: float"),
        ("simpo --options beta,1 --beta 2 --model small", "got beta=2 and beta=1 among the loss's options"),
        ("ipo --loss.beta 0.1 --model small", "has no option 'beta'; did you mean 'tau'?"),
        ("simpo --loss.gama 1 --data pairs.jsonl --model small", "has no option 'gama'; did you mean 'gamma'?"),
        ("kto --data prompts.jsonl --model small", "has no labelled"),
        (
            "dpo --loss kto --data pairs.jsonl --model small",
            "'kto' does not learn from rankings; use `posttrain train kto`, the stage PreferLabelled",
        ),
        (
            "kto --loss dpo --data labels.jsonl --model small",
            "'dpo' does not learn from labelled; use `posttrain train dpo`, the stage Prefer",
        ),
        ("xpo --data pairs.jsonl --model small", "needs --reward STR"),
        ("dpo --loss xpo --data pairs.jsonl --model small", "'xpo' learns from samples made while it runs"),
        ("online_dpo --reward nothing --model small", "no reward model in 'nothing'"),
        ("dpo --loss dpoo --data pairs.jsonl --model small", "unknown preference loss 'dpoo'; did you mean 'dpo'?"),
    ],
)
def test_faults_of_usage_are_one_line(folder, arguments, said, capsys):
    assert main(["train", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_score_that_is_missing_is_named(folder, capsys):
    rows = [{k: v for k, v in row.items() if not k.endswith("rating")} for row in PAIRS]
    (folder / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--name", "plain", "--data", "plain.jsonl", "--lora-rank", "0", "--dtype", "float32"]
    assert main(["train", "nca_k", "--model", "small", *options]) == 2
    assert (
        "plain.jsonl row 1, field 'score': response 0 (from 0) has none, which this loss reads"
        in capsys.readouterr().err
    )


def test_losses_are_found_by_name_module_or_function(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    assert find_loss("dpo") is preference and find_loss(dpo) is preference and find_loss("kto").kind == "unpaired loss"
    assert find_loss("posttrain.losses.unpaired:kto") is find_loss("kto")
    assert find_loss(lambda pairs: pairs.chosen) is preference
    assert set(METHODS) & set(ALL) == {"dpo"}  # the others need no entry


def test_a_loss_from_outside_the_package_in_few_lines(folder):
    assert len(EXAMPLE.read_text().splitlines()) < 25
    options = (
        "--data pairs.jsonl --model small --lora-rank 0 --prompts-per-step 2 --epochs 1 --dtype float32 --loss.limit 2"
    )
    done = subprocess.run([sys.executable, EXAMPLE, *options.split()], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = (folder / "runs/train-cautious/cautious/metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[0])["loss/preference"] == pytest.approx(math.log(2), abs=1e-5)
    assert "0.693147 at the" in done.stdout


def test_the_example_leaves_nothing_behind():
    before = dict(preference)
    names = runpy.run_path(str(EXAMPLE))
    assert names["cautious"] is preference["cautious"]
    preference._items.pop("cautious")
    preference._facts.pop("cautious")
    assert dict(preference) == before
