"""The clipped surrogate and the clipped value loss on numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

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
