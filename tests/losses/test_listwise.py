"""Losses of scored responses: K of them to a prompt, pairs with scores, and games; by numbers made apart."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from posttrain.errors import ConfigError
from posttrain.losses import (
    ExploredPairs,
    Scored,
    ScoredPairs,
    explored_losses,
    listwise_losses,
    preference,
    scored_losses,
)
from posttrain.losses.games import geometric_mixture, self_play_reward, win_rates

from .fixtures import H_L, H_W, PAIRS, D, f64, grads, near

loss = listwise_losses


def scored(h, score, group=None) -> Scored:
    """Responses with these log-ratios and scores."""
    ratio = f64(*h)
    ref = torch.full_like(ratio, -9)
    index = torch.zeros(len(ratio), dtype=torch.long) if group is None else torch.tensor(group)
    return Scored(logp=ref + ratio, ref_logp=ref, length=torch.full_like(ratio, 4), score=f64(*score), group=index)


FOUR = scored([0.5, -1.0, 0.3, -0.2], [1, 0.5, 0.2, 0])
THREE = scored([0.5, -1.0, 0.3], [1, 0.5, 0.2])


@pytest.mark.parametrize(
    ("name", "rows", "options", "expected"),
    [
        ("info_nca", FOUR, {"beta": 0.1, "temperature": 1}, 1.379819),
        ("info_nca", FOUR, {"beta": 0.1, "temperature": 0.1}, 1.328963),
        ("nca_k", FOUR, {"beta": 0.1, "temperature": 1}, 1.383130),
        ("nca_k", FOUR, {"beta": 0.1, "temperature": 0.1}, 1.357551),
        ("exo_rw", THREE, {"beta": 0.5, "temperature": 0.5}, 0.205631),
        ("reward_aware_po_k", THREE, {"beta": 0.1, "eta": 1}, 0.049693),
        ("exo_rw", THREE, {"beta": 0.1, "temperature": 1}, 0.051734),
    ],
)
def test_golden(name, rows, options, expected):
    near([expected])(loss[name](rows, **options))


def test_d2o():
    h = [[0.2, -0.1], [0.4, 0.0], [-0.3, 0.1]]
    rows = scored(
        [x for own, bad in zip(h, H_L.tolist(), strict=True) for x in (*own, bad)],
        [0, 0, -1] * 3,
        [0, 0, 0, 1, 1, 1, 2, 2, 2],
    )
    near([0.642025, 0.733947, 0.602653])(loss["d2o"](rows, beta=0.1, alpha=0.1))
    (slope,) = grads(lambda logp: loss["d2o"](replace(rows, logp=logp)), rows.logp)
    assert torch.equal(slope[0], slope[1]) and slope[0] < 0 < slope[2]  # its own samples share one push


def pairs_as_groups(score_w, score_l) -> Scored:
    h = torch.stack([H_W, H_L], 1).flatten().tolist()
    score = torch.stack([f64(*score_w), f64(*score_l)], 1).flatten().tolist()
    return scored(h, score, [0, 0, 1, 1, 2, 2])


def test_games():
    rates = pairs_as_groups((0.8, 0.6, 0.9), (0.3, 0.5, 0.1))
    near([0.34, 0.68, 1.885])(loss["sppo"](rates, eta=1))
    near([64650.625, 5050.625, 158603.125])(loss["sppo"](rates))
    rows = scored(H_W.tolist(), [0.7, 0.4, 0.5], [0, 1, 2])
    (slope,) = grads(lambda logp: loss["nash_md"](replace(rows, logp=logp)), rows.logp)
    near([-0.196, 0.096, 0.012], 1e-12)(slope)
    mixed = geometric_mixture(f64(2, 0, -1).log_softmax(0), f64(0, 1, 0).log_softmax(0), share=0.25)
    near([0.718440, 0.205837, 0.075723])(mixed.exp())
    better = torch.tensor([[0.5, 0.7, 0.4], [0.3, 0.5, 0.6], [0.6, 0.4, 0.5]], dtype=torch.float64)
    near([0.55, 0.45, 0.50])(self_play_reward(better))
    sg = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    found = win_rates(f64(1, 0, 3, 3, 3), torch.tensor([0, 0, 1, 1, 1]))
    near([(0.5 + sg(1)) / 2, (0.5 + sg(-1)) / 2, 0.5, 0.5, 0.5], 1e-12)(found)


def test_hard_win_rates_are_those_of_the_pair_loss():
    hard = loss["sppo"](pairs_as_groups((1, 1, 1), (0, 0, 0)), eta=10)
    near((preference["sppo_hard"](PAIRS, beta=0.1) / 2).tolist(), 1e-9)(hard)


def test_two_responses_with_hard_labels():
    hard = pairs_as_groups((1, 1, 1), (0, 0, 0))
    near(preference["dpo"](PAIRS, beta=0.3).tolist(), 1e-9)(loss["info_nca"](hard, beta=0.3, temperature=1e-2))
    near(preference["nca"](PAIRS, beta=0.3).tolist(), 1e-9)(loss["nca_k"](hard, beta=0.3, temperature=1e-2))
    e = 0.05
    target = math.log((1 - e) / e)
    soft = pairs_as_groups([target] * 3, [0] * 3)
    exo = preference["exo"](PAIRS, beta=0.3, label_smoothing=e)
    near(exo.tolist(), 1e-9)(loss["exo_rw"](soft, beta=0.3, temperature=1))


def test_prompts_do_not_mix_and_may_have_any_number_of_responses():
    joined = scored([0.5, -1.0, 0.3, -0.2, 0.5, -1.0, 0.3], [1, 0.5, 0.2, 0, 1, 0.5, 0.2], [0] * 4 + [1] * 3)
    for name in loss:
        near([*loss[name](FOUR).tolist(), *loss[name](THREE).tolist()], 1e-9)(loss[name](joined))
        order = torch.tensor([5, 2, 0, 6, 1, 4, 3])
        turned = Scored(**{k: v[order] for k, v in vars(joined).items()})
        near(loss[name](joined).tolist(), 1e-9)(loss[name](turned))


# ---------------------------------------------------------------------------- pairs with scores

GAPS = ScoredPairs(pairs=PAIRS, chosen_score=f64(1.5, 0.2, 1.0), rejected_score=f64(0.5, 0.0, -1.0))
RPO = {"beta": 0.1, "eta": 1}


def test_reward_aware_po():
    near([0.079095, 0.015260, 0.209769])(scored_losses["reward_aware_po"](GAPS, **RPO))
    near([0.085489, 0.015282, 0.275627])(scored_losses["reward_aware_po_model_target"](GAPS, **RPO))
    near([0.7225, 0.1225, 2.7225])(scored_losses["reward_aware_po_squared"](GAPS, **RPO))
    both = pairs_as_groups(GAPS.chosen_score.tolist(), GAPS.rejected_score.tolist())
    near(loss["reward_aware_po_k"](both, **RPO).tolist(), 1e-12)(scored_losses["reward_aware_po"](GAPS, **RPO))


def test_targets_of_reward_aware_po():
    def same(name, gap, expected):
        given = replace(GAPS, chosen_score=f64(*[gap] * 3), rejected_score=f64(0, 0, 0))
        near(expected.tolist(), 1e-9)(scored_losses[name](given, beta=0.3, eta=1))

    e = 0.05
    target, entropy = math.log((1 - e) / e), -(1 - e) * math.log(1 - e) - e * math.log(e)
    same("reward_aware_po", target, preference["cdpo"](PAIRS, beta=0.3, label_smoothing=e) - entropy)
    same("reward_aware_po_model_target", target, preference["exo"](PAIRS, beta=0.3, label_smoothing=e))
    same("reward_aware_po", 50.0, preference["dpo"](PAIRS, beta=0.3))
    same("reward_aware_po_squared", 1.0, preference["gpo_squared"](PAIRS, beta=0.3))


def test_dno():
    rates = ScoredPairs(pairs=PAIRS, chosen_score=f64(0.8, 0.8, 0.8), rejected_score=f64(0.3, 0.3, 0.3))
    near([0.677588, 0.714326, 0.665521])(scored_losses["dno"](rates, eta=0.1))
    s, u = 1 / (1 + math.exp(-0.5)), 0.1 * D
    near((s * (1 + (-u).exp()).log() + (1 - s) * (1 + u.exp()).log()).tolist(), 1e-12)(scored_losses["dno"](rates))


def test_xpo():
    given = ExploredPairs(pairs=PAIRS, explored=f64(-9, -11, -10))
    near([0.620867, 0.770847, 0.533282])(explored_losses["xpo"](given))
    near([0.530957, 0.660957, 0.433382])(explored_losses["xpo"](given, beta=0.1, alpha=1e-2))


@pytest.mark.parametrize("name", ["info_nca", "nca_k", "exo_rw"])
def test_a_temperature_of_0_is_refused(name):
    with pytest.raises(ConfigError, match="'temperature': got 0; expected a number above 0"):
        loss[name](FOUR, temperature=0)
