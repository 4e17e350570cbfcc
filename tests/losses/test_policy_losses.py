"""The clipped surrogate and the clipped value loss on numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from posttrain.errors import ConfigError
from posttrain.losses.policy import TokenTerms, policy_losses, ppo_clip, ratio, value_clip


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def terms(logp, old_logp, advantage):
    return TokenTerms(logp=logp, old_logp=old_logp, advantage=advantage, mask=torch.ones(len(logp), dtype=torch.bool))


GIVEN = terms(f64(-0.9, -0.8, -1.9, -0.1), f64(-1, -0.5, -2, -0.3), f64(1.376275, 1.3645, 1.11, 0.8))


def test_ratio_and_loss():
    torch.testing.assert_close(ratio(GIVEN), f64(1.105171, 0.740818, 1.105171, 1.221403), atol=5e-7, rtol=0)
    assert ppo_clip(GIVEN).mean().item() == pytest.approx(-1.1796513, abs=1e-7)


def test_the_loss_is_found_by_name():
    assert policy_losses["ppo_clip"] is ppo_clip


@pytest.mark.parametrize(
    ("gap", "advantage", "slope"),
    [(0.0, 1.5, -1.5), (1.0, 1.5, 0.0), (-1.0, 1.5, -1.5), (1.0, -2.0, 2.0), (-1.0, -2.0, 0.0)],
)
def test_the_gradient_stops_only_where_the_clip_is_pessimistic(gap, advantage, slope):
    """``slope`` is d loss / d logp over the ratio."""
    logp = f64(gap).requires_grad_()
    given = terms(logp, f64(0), f64(advantage))
    ppo_clip(given).sum().backward()
    assert logp.grad.item() == pytest.approx(slope * ratio(given).item(), abs=1e-12)


def test_a_stray_token_cannot_overflow():
    assert ratio(terms(f64(0), f64(-5000), f64(1))).item() == pytest.approx(485165195.40979, rel=1e-12)


def test_value_loss():
    new, old, returns = f64(0.9, 0.7, 0.5, 1.25), f64(0.5, 0.6, 0.9, 1.2), f64(1.876275, 1.9645, 2.01, 2.0)
    assert value_clip(new, old, returns).mean().item() == pytest.approx(0.72814789, abs=1e-8)
    assert value_clip(new, old, returns, clip=100.0).mean().item() == pytest.approx(0.67433414, abs=1e-8)


def test_dual_clip_bounds_the_loss_of_a_negative_advantage():
    given = terms(f64(2, 2, -1), f64(0, 0, 0), f64(-1, 1, -1))
    assert ppo_clip(given).tolist() == pytest.approx([7.3890561, -1.2, 0.8], abs=1e-7)
    assert policy_losses["dual_clip"](given).tolist() == pytest.approx([3.0, -1.2, 0.8], abs=1e-7)


def test_clip_higher_leaves_more_room_above():
    given = terms(f64(0.24, 0.26, -0.3), f64(0, 0, 0), f64(1, 1, -1))
    assert policy_losses["clip_higher"](given).tolist() == pytest.approx([-1.2712492, -1.28, 0.8], abs=1e-7)


def test_a_truncated_weight_keeps_the_gradient_that_a_clip_drops():
    logp = f64(math.log(0.5), 0, math.log(6)).requires_grad_()
    given = terms(logp, f64(0, 0, 0), f64(1, 1, 1))
    clipped = torch.autograd.grad(ppo_clip(given).sum(), logp)[0]
    kept = torch.autograd.grad(policy_losses["cispo"](given).sum(), logp)[0]
    assert kept.tolist() == pytest.approx([-0.5, -1, -5]) and clipped[2] == 0
    assert torch.autograd.grad(policy_losses["p3o"](given).sum(), logp)[0].tolist() == pytest.approx([-0.8, -1, -1.2])
    assert torch.autograd.grad(policy_losses["reinforce"](given).sum(), logp)[0].tolist() == [-1, -1, -1]


def test_regressions_on_the_advantage():
    given = replace(terms(f64(-1), f64(-9), f64(0.02)), ref_logp=f64(-1.3))
    assert policy_losses["apa"](given).item() == pytest.approx(0.01, abs=1e-12)
    with pytest.raises(ConfigError, match="reads the reference's log-probabilities"):
        policy_losses["apa"](replace(given, ref_logp=None))
    many = terms(f64(-1, -1, -1), f64(0, 0, 0), f64(0, 1, 9))
    assert policy_losses["awr"](many).tolist() == pytest.approx([1, math.e, 20])


def test_every_loss_says_where_it_is_from():
    for name, loss in policy_losses.items():
        assert "Source: " in (loss.__doc__ or "") or ":" in name
