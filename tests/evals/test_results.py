from __future__ import annotations

import json

import numpy as np
import pytest

from posttrain.errors import ConfigError, DataError
from posttrain.evals.results import (
    compare_rewards,
    policy_section,
    read_results,
    reward_section,
    sample_rows,
    worst_rows,
    write_results,
)
from posttrain.evals.reward import pair_outcomes

SCORES = {
    "sft": {"reward": [[1.0, 3.0]] * 4 + [[0.0, 2.0]] * 4},
    "ppo": {"reward": [[2.0, 4.0]] * 4 + [[1.5, 3.5]] * 4},
}


def test_policy_section_by_hand():
    got = policy_section(
        SCORES,
        kl={"sft": np.zeros((8, 2)), "ppo": np.full((8, 2), 3.0)},
        truncated={"sft": [[True, False]] * 8, "ppo": [[False, False]] * 8},
        seconds={"sft": 1.0, "ppo": 2.0},
    )
    ppo = got["policies"]["ppo"]
    assert ppo["reward"]["mean"] == pytest.approx(2.75) and ppo["reward"]["n"] == 8
    assert 2.5 <= ppo["reward"]["low"] <= 2.75 <= ppo["reward"]["high"] <= 3.0
    assert ppo["kl"] == {"mean": 3.0, "low": 3.0, "high": 3.0, "n": 8} and ppo["seconds"] == 2.0
    assert got["policies"]["sft"]["truncated"]["mean"] == 0.5 and "length" not in ppo
    assert got["rows"]["policies/ppo/reward"] == [3.0] * 4 + [2.5] * 4  # what the mean is over, by prompt
    assert got["rows"]["policies/sft/truncated"] == [0.5] * 8 and len(got["rows"]) == 6
    (difference,) = got["differences"]
    assert (difference["name"], difference["scorer"], difference["n"]) == ("ppo - sft", "reward", 8)
    assert difference["mean"] == pytest.approx(1.25) and difference["excludes_zero"] is True
    assert 1.0 <= difference["low"] <= difference["high"] <= 1.5
    assert (got["prompts"], got["samples_per_prompt"]) == (8, 2)


def test_differences_name_every_later_minus_earlier_policy():
    rng = np.random.default_rng(0)
    same = {p: {"a": rng.normal(size=(30, 2)), "b": rng.normal(size=(30, 1))} for p in ("base", "sft", "ppo")}
    got = policy_section(same)["differences"]
    assert [(d["name"], d["scorer"]) for d in got] == [
        (name, scorer) for scorer in "ab" for name in ("ppo - sft", "ppo - base", "sft - base")
    ]
    assert sum(d["excludes_zero"] for d in got) <= 1  # nothing differs
    assert policy_section(same) == policy_section(same)


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        ({}, {}, "at least one policy"),
        ({"a": {"r": [[1.0]]}, "b": {"q": [[1.0]]}}, {}, "the same scorers"),
        ({"a": {"r": [[1.0]]}, "b": {"r": [[1.0], [2.0]]}}, {}, "the same prompts"),
        ({"a": {"r": [1.0, 2.0]}}, {}, "expected \\[prompts, samples\\]"),
        ({"a": {"length": [[1.0]]}}, {}, "a scorer is called"),
        ({"a": {"r": [[float("inf")]]}}, {}, "expected finite"),
        ({"a": {"r": [[1.0]]}}, {"kl": {"b": [[1.0]]}}, "kl has b but not 'a'"),
        ({"a": {"r": [[1.0]]}}, {"kl": {"a": [[1.0], [2.0]]}}, "has 2 prompts; expected 1"),
    ],
)
def test_policy_refusals(scores, options, message):
    with pytest.raises(ConfigError, match=message):
        policy_section(scores, **options)


def outcomes(rows: list[list[float]]):
    return pair_outcomes(rows, [[0, 1]] * len(rows), [[None, "rude" if i % 2 else "short"] for i in range(len(rows))])


def test_reward_section_and_comparisons_by_hand():
    models = {"reward": outcomes([[1.0, 0.0]] * 8), "length": outcomes([[0.0, 1.0]] * 6 + [[1.0, 0.0]] * 2)}
    section = reward_section(models, length_direction=-1)
    assert section["reward"]["accuracy"] == 1.0 and section["reward"]["pairs"] == section["reward"]["rankings"] == 8
    assert section["length"]["accuracy"] == 0.25 and section["length"]["flipped"] == 0.75
    assert section["length"]["direction"] == "shorter"
    assert section["length"]["by_failure"]["rude"]["pairs"] == 4
    assert section["length"]["by_failure"]["rude"]["accuracy"] == 0.25
    (row,) = compare_rewards(models)
    assert row["name"] == "reward - length" and row["mean"] == 0.75 and row["excludes_zero"]
    with pytest.raises(ConfigError, match="length_direction"):
        reward_section(models)
    with pytest.raises(ConfigError, match="models \\['length'\\]"):
        compare_rewards(models | {"length": models["length"][:5]})


def test_accuracy_by_ranking_is_in_the_order_of_the_data():
    pairs = pair_outcomes([[2.0, 1.0, 0.0], [0.0, 1.0, 1.0]], [[0, 1, 2]] * 2)
    got = reward_section({"reward": pairs})["reward"]
    # first: all three in order; second: 0 above 1 and 2 is wrong twice, and a tie counts half
    assert got["by_ranking"] == pytest.approx([1.0, 0.5 / 3]) and got["rankings"] == 2


def test_a_single_ranking_has_no_bounds_in_json(tmp_path):
    section = reward_section({"reward": outcomes([[1.0, 0.0]])})
    assert (section["reward"]["low"], section["reward"]["high"]) == (None, None)
    path = tmp_path / "results.json"
    write_results({"schema": 1, "machine": {"line": "x"}, "reward_accuracy": section}, path)
    assert read_results(path)["reward_accuracy"] == section and list(tmp_path.iterdir()) == [path]


def test_read_and_write_refusals(tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(ConfigError, match="finite numbers"):
        write_results({"x": float("nan")}, path)
    assert not path.exists()
    path.write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        read_results(path)
    path.write_text(json.dumps({"schema": 99}))
    with pytest.raises(DataError, match="schema 99, expected 1"):
        read_results(path)


def test_samples_are_spread_and_worst_are_the_largest_drops():
    prompts = [f"p{i}" for i in range(20)]
    texts = {p: [[f"{p} {i}.0", f"{p} {i}.1"] for i in range(20)] for p in ("sft", "ppo")}
    old = np.zeros((20, 2))
    new = np.full((20, 2), 0.5)
    new[7], new[3], new[11] = [-3.0, -1.0], [0.0, -2.0], [5.0, -5.0]
    scores = {"sft": {"reward": old}, "ppo": {"reward": new}}
    chosen = sample_rows(prompts, texts, scores, count=6)
    assert [row["prompt"] for row in chosen] == ["p0", "p4", "p8", "p11", "p15", "p19"]
    assert chosen[0]["answers"]["ppo"] == {"text": "ppo 0.0", "scores": {"reward": 0.5}, "truncated": None}
    worst = worst_rows(prompts, texts, scores, before="sft", after="ppo", truncated=dict.fromkeys(texts, old > -1))
    assert [(row["prompt"], row["drop"]) for row in worst] == [
        ("p7", 2.0),
        ("p3", 1.0),
    ]  # p11 stayed the same
    assert [row["answers"]["ppo"]["text"] for row in worst] == ["ppo 7.0", "ppo 3.1"]
    assert worst[0]["answers"]["sft"]["truncated"] is True
    assert len(sample_rows(prompts[:2], texts, scores)) == 2
