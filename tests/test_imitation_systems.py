"""Systems that imitate what was selected of their own answers: raft, rest, expert_iteration, at the size of the small world."""

from __future__ import annotations

import json

import pytest

from caches import own_cache
from posttrain.cli import main
from posttrain.data import read
from posttrain.data.smallworld import gold
from posttrain.registry import RECIPES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imitation")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        own_cache(patch, folder / "cache")
        yield folder


def scores(path):
    """By prompt, the scores of its answers."""
    return {e.prompt_key: [r.score for r in e.responses] for e in read(path)}


SMALL = "--sft.limit 24 --sft.epochs 1 --judge.limit 24 --own1.limit 12"


def test_raft_imitates_the_best_answer_to_each_prompt(folder):
    assert main(["run", "raft", "--rounds", "1", "--tiny", *SMALL.split(), "--measure.test-limit", "8"]) == 0
    run = folder / "runs/raft-tiny"
    best = {key: [max(found)] for key, found in scores(run / "scored1/data/samples.jsonl").items()}
    assert len(best) == 12 and scores(run / "kept1/data/demonstrations.jsonl") == best
    losses = [json.loads(x)["loss/nll"] for x in (run / "policy1/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 4 and losses[-1] < losses[0]
    results = json.loads((run / "measure/results.json").read_text())
    assert results["policies"].keys() == {"start", "trained"}


def test_rest_improves_on_ever_better_answers_at_falling_rates(folder):
    small = [*SMALL.split(), "--until", "policy1_3"]
    assert main(["run", "rest", "--grows", "1", "--tiny", *small]) == 0
    run = folder / "runs/rest-tiny"
    given = [s for found in scores(run / "scored1/data/samples.jsonl").values() for s in set(found)]
    for step, least in enumerate((-2.0, -1.0, 0.0), 1):
        kept = [s for e in read(run / f"kept1_{step}/data/demonstrations.jsonl") for s in [e.responses[0].score]]
        assert set(kept) == {s for s in given if s >= least}
    stages = RECIPES["rest"]().stages
    assert [stages[f"policy2_{k}"].lr for k in (1, 2, 3)] == pytest.approx([2e-4, 1e-4, 2e-4 / 3])
    assert stages["policy2_1"].model is stages["policy1_3"] and stages["own2"].model is stages["policy1_3"]


def test_expert_iteration_learns_from_right_answers_and_from_the_start_each_time(folder):
    small = "--rounds 2 --own0.limit 48 --own1.limit 48 --own2.limit 24"
    assert main(["run", "expert_iteration", "--tiny", *small.split()]) == 0
    run = folder / "runs/expert_iteration-tiny"
    right = read(run / "right0/data/demonstrations.jsonl")
    assert all(gold(e.prompt[-1].content, e.responses[0].text).total >= 0.85 for e in right)
    shares = []
    for turn in range(3):
        found = [s for values in scores(run / f"checked{turn}/data/samples.jsonl").values() for s in values]
        shares.append(sum(s >= 0.85 for s in found) / len(found))
    assert shares[2] > shares[0] + 0.05


def test_best_of_a_prompt_counts_and_thresholds_stand_in_the_recipes():
    raft, expert = RECIPES["raft"]().stages, RECIPES["expert_iteration"]().stages
    assert raft["own2"].model is raft["policy1"] and raft["kept2"].options == {"most": 1}
    assert expert["right2"].options == {"most": 10, "least": 0.85} and "right3" not in expert
