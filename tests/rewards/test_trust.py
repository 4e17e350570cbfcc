"""How far scores can be trusted: ensembles, distance from what is familiar, length taken out, attribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from posttrain.errors import ConfigError, ModelError
from posttrain.forest import Branch, Row
from posttrain.models.policy import Model
from posttrain.rewards.attribution import attribute
from posttrain.rewards.base import Score
from posttrain.rewards.debias import LengthSlope, fit_length_slope, residual, without_length
from posttrain.rewards.ensemble import disagreement, ensemble, ensemble_rules, rule
from posttrain.rewards.model import features_and_scores, score_rows
from posttrain.rewards.outlier import distance, familiar_reward, fit_familiar, load_familiar, save_familiar
from tiny import ours, plain_net, random_rows

from .test_rewards import completion


@pytest.fixture(scope="module")
def model():
    scalar = nn.Linear(32, 1, bias=False, dtype=torch.float64)
    scalar.weight.data = torch.randn(1, 32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return Model(ours(plain_net()), scalar=scalar.requires_grad_(False))


@pytest.mark.parametrize(
    ("name", "penalty", "wanted"),
    [
        ("mean", None, 1.6),
        ("minimum", None, 1.0),
        ("variance", None, 1.346667),
        ("deviation", None, 0.888195),
        ("variance", 0.1, 1.549333),
        ("deviation", 0.0, 1.6),
    ],
)
def test_rules_of_an_ensemble(name, penalty, wanted):
    scores = np.array([[1.0, 5.0], [1.2, 5.0], [2.6, 5.0]])
    assert rule(name, penalty)(scores) == pytest.approx([wanted, 5.0], abs=1e-6)
    assert disagreement(scores) == pytest.approx([0.711805, 0.0], abs=1e-6)
    alone = np.array([[3.0, -2.0]])
    assert all((ensemble_rules[r](alone) == alone[0]).all() for r in ensemble_rules)


def test_rules_refuse_what_rewards_disagreement():
    with pytest.raises(ConfigError, match="penalty -1"):
        rule("variance", -1)
    with pytest.raises(ConfigError, match="'mean' has no option 'penalty'"):
        rule("mean", 0.5)
    with pytest.raises(ConfigError, match="did you mean 'variance'"):
        rule("varianc")


def test_an_ensemble_abstains_where_a_member_does_and_logs_the_others():
    member = lambda k: lambda cs: [Score(None if c.text == "no" and k == 1 else float(k * len(c.text))) for c in cs]  # noqa: E731
    got = ensemble([member(1), member(2), member(3)], rule("minimum"))([completion(text="yes"), completion(text="no")])
    assert got[0].value == 3.0 and got[0].parts["disagreement"] == pytest.approx(np.std([3, 6, 9]))
    assert got[1] == Score(None, {"member_1": 4.0, "member_2": 6.0})
    with pytest.raises(ConfigError, match="without members"):
        ensemble([])


def test_distance_is_mahalanobis_and_strange_responses_lie_beyond_the_threshold(tmp_path):
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(6, 6))
    known = rng.normal(size=(4000, 6)) @ mixing
    found = fit_familiar(known)
    x = rng.normal(size=(5, 6)) @ mixing
    centre, half = known[::2].mean(0), known[::2] - known[::2].mean(0)
    inverse = np.linalg.inv(0.999 * half.T @ half / 2000 + 1e-3 * np.trace(half.T @ half / 2000) / 6 * np.eye(6))
    wanted = [np.sqrt((r - centre) @ inverse @ (r - centre)) for r in x]
    assert distance(found, x) == pytest.approx(wanted, rel=1e-9)
    fresh = distance(found, rng.normal(size=(4000, 6)) @ mixing)
    assert (fresh > found.threshold).mean() == pytest.approx(0.01, abs=0.006)
    assert (distance(found, 9 * x) > found.threshold).mean() == 1
    save_familiar(found, tmp_path / "familiar.safetensors")
    again = load_familiar(tmp_path / "familiar.safetensors")
    assert (distance(again, x) == distance(found, x)).all() and again.threshold == found.threshold


def test_fewer_responses_than_dimensions_still_leave_familiar_ones_inside():
    rng = np.random.default_rng(1)
    found = fit_familiar(rng.normal(size=(60, 200)))
    assert (distance(found, rng.normal(size=(400, 200))) > found.threshold).mean() < 0.2
    for bad, said in [(np.zeros((4, 3)), r"\(4, 3\)"), (np.zeros((20, 3)), "all features are equal")]:
        with pytest.raises(ConfigError, match=said):
            fit_familiar(bad)


def test_features_and_a_reward_that_falls_with_distance(model):
    rows = random_rows(3, 12)
    features, scores = features_and_scores(model, rows, max_tokens=60)
    assert [f.shape for f in features] == [(len(r.branches), 32) for r in rows]
    for a, b in zip(scores, score_rows(model, rows), strict=True):
        assert a == pytest.approx(b, abs=1e-5)  # features are kept in fp32
    familiar = fit_familiar(np.concatenate(features))
    given = [completion((5, 6), (30, 40)), completion((5, 6), (7,))]
    base = [s.value for s in familiar_reward(model, familiar, penalty=0.0)(given)]
    got = familiar_reward(model, familiar, penalty=2.0, mean=0.5)(given)
    for s, plain in zip(got, base, strict=True):
        assert s.value == pytest.approx(plain - 0.5 - 2 * max(0.0, s.parts["distance"] - familiar.threshold))


def test_length_is_taken_out_within_prompts():
    # prompt 2 asks for long answers, all good: between prompts length and score go together, which must not count
    lengths = [[10, 20, 40], [100, 130]]
    scores = [[0.2 * n + q for n, q in zip(lengths[0], (1, -2, 1), strict=True)], [50.0 + 0.2 * 100, 50.0 + 0.2 * 130]]
    fitted = fit_length_slope(scores, lengths)
    deviations = np.array([-13.333333, -3.333333, 16.666667])
    wanted = 0.2 + (deviations @ [1, -2, 1]) / (deviations @ deviations + 450)
    assert fitted.slope == pytest.approx(wanted, abs=1e-6) and fitted.length == 60
    exact = fit_length_slope([[2.0, 4.0]], [[1, 2]])
    assert residual([2.0, 4.0], [1, 2], exact) == pytest.approx([3.0, 3.0])
    with pytest.raises(ConfigError, match="never vary"):
        fit_length_slope([[1.0, 2.0]], [[3, 3]])
    reward = without_length(lambda cs: [Score(1.0, {"r": 1.0}), Score(None)], LengthSlope(0.5, 4.0))
    assert reward([completion(text="abcdefgh"), completion()]) == [
        Score(-1.0, {"r": 1.0, "length": -2.0}),
        Score(None, {"length": 0.5}),
    ]


@pytest.mark.parametrize("plain", [False, True])
def test_contributions_add_up_to_the_score(model, plain):
    from dataclasses import replace

    role = replace(model, plain=plain)
    prompt, answer = [5, 6, 7], [20, 31, 42, 2]
    got = attribute(role, prompt, answer, blank=0, tolerance=0.005, most=2048)
    ((score, blank),) = score_rows(model, [Row(prompt, [Branch(answer, {}), Branch([0, 0, 0, 2], {})])])
    assert got.score == pytest.approx(score, abs=1e-9) and got.blank == pytest.approx(blank, abs=1e-9)
    assert sum(got.tokens) == pytest.approx(score - blank, rel=0.005)
    assert got.tokens[:3] == [0.0] * 3 and got.tokens[6] == 0.0  # the prompt and the stop token stay
    assert all(abs(t) > 1e-4 for t in got.tokens[3:6])


def test_attribution_of_nothing_and_refusals(model):
    same = attribute(model, [5], [0, 2], blank=0)
    assert same.tokens == [0.0, 0.0, 0.0] and same.score == same.blank
    with pytest.raises(ConfigError, match="'keep' has 1 entries for 2 tokens"):
        attribute(model, [5], [8, 2], blank=0, keep=[True])
    with pytest.raises(ModelError, match="add up to"):
        attribute(model, [5], [8, 9, 2], blank=0, tolerance=1e-12, most=16)
