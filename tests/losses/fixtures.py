"""Three pairs of responses, and what the tests of losses compare with."""

from __future__ import annotations

import torch

from posttrain.losses import PairLogps


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


PAIRS = PairLogps(
    chosen=f64(-10, -12.5, -8),
    rejected=f64(-11, -12, -15),
    ref_chosen=f64(-10.5, -12, -9.5),
    ref_rejected=f64(-10, -13, -13),
    chosen_len=f64(5, 8, 4),
    rejected_len=f64(6, 5, 10),
)
H_W, H_L, D = f64(0.5, -0.5, 1.5), f64(-1.0, 1.0, -2.0), f64(1.5, -1.5, 3.5)


def near(values, atol=5e-7):
    return lambda found: torch.testing.assert_close(found, f64(*values), atol=atol, rtol=0)


def grads(function, *given):
    """Gradients of the sum of what a function returns."""
    leaves = [x.clone().requires_grad_() for x in given]
    return torch.autograd.grad(function(*leaves).sum(), leaves, allow_unused=True)
