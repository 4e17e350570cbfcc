"""Masked sums, whitening and padding against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from posttrain.ops.kl import k1, k2, k3
from posttrain.ops.masked import masked_mean, masked_sum, segment_sum, to_padded, whiten

NAN = float("nan")


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_masked_values_may_be_nan_and_an_empty_mask_gives_zero():
    values, mask = f64(1, NAN, 3), torch.tensor([True, False, True])
    assert masked_sum(values, mask).item() == 4 and masked_mean(values, mask).item() == 2
    assert masked_mean(values, torch.zeros(3, dtype=torch.bool)).item() == 0


def test_whitening_has_population_variance():
    advantage = f64(1.376275, 1.3645, 1.11, 0.8)
    expected = f64(0.909338, 0.859205, -0.224348, -1.544195)
    torch.testing.assert_close(whiten(advantage, torch.ones(4, dtype=torch.bool)), expected, atol=2e-6, rtol=0)


def test_whitening_without_shift_keeps_the_mean():
    reward = f64(-0.02, 0.01, 0.05, 2)
    white = whiten(reward, torch.ones(4, dtype=torch.bool), shift=False)
    torch.testing.assert_close(white, f64(-0.105842, -0.070983, -0.024504, 2.24133), atol=2e-6, rtol=0)
    assert white.mean().item() == pytest.approx(0.51, abs=1e-12)


@pytest.mark.parametrize("shift", [True, False])
def test_whitening_reads_and_writes_nothing_outside_the_mask(shift):
    mask = torch.tensor([True, False, True, True])
    got = whiten(f64(1, NAN, 2, 4), mask, shift=shift)
    alone = whiten(f64(1, 2, 4), torch.ones(3, dtype=torch.bool), shift=shift)
    assert got.tolist() == [alone[0], 0, alone[1], alone[2]]


def test_segments_are_summed_and_padded():
    values, segment = f64(1, 2, 3, 4), torch.tensor([0, 0, 2, 3])
    assert segment_sum(values, segment, 5).tolist() == [3, 0, 3, 4, 0]
    padded, mask = to_padded(values, segment, 5)
    assert padded.tolist() == [[1, 2], [0, 0], [3, 0], [4, 0], [0, 0]]
    assert mask.tolist() == [[True, True], [False, False], [True, False], [True, False], [False, False]]


def test_kl_estimators():
    logp, ref = f64(-1), f64(-1.5)
    assert k1(logp, ref).item() == 0.5 and k2(logp, ref).item() == 0.125
    assert k3(logp, ref).item() == pytest.approx(0.10653066, abs=1e-8)
    assert k3(f64(-100), f64(0)).isfinite().all()


def test_kl_estimators_over_a_whole_distribution():
    """Under p, k1 and k3 average the exact KL; the gradient of mean k2 is that of KL(p||q), of k3 that of KL(q||p)."""
    logits, q = f64(0.3, -0.2, 1.0).requires_grad_(), f64(0.1, 0.7, 0.2).log()
    logp = logits.log_softmax(0)
    p = logp.exp().detach()
    exact = (logp.exp() * (logp - q)).sum()
    for estimator in (k1, k3):
        assert (p * estimator(logp, q)).sum().item() == pytest.approx(exact.item(), abs=1e-12)
    reverse = (q.exp() * (q - logp)).sum()
    for estimator, kl in ((k2, exact), (k3, reverse)):
        got = torch.autograd.grad((p * estimator(logp, q)).sum(), logits, retain_graph=True)[0]
        want = torch.autograd.grad(kl, logits, retain_graph=True)[0]
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
