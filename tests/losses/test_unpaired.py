"""Losses of single responses with labels or rewards, by numbers made apart."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from posttrain.errors import ConfigError
from posttrain.losses import Labelled, Valued, unpaired_losses, valued_losses

from .fixtures import H_L, H_W, PAIRS, f64, grads, near

loss = unpaired_losses


def rows(good=H_W, bad=H_L, other=()):
    """Good, bad and mismatched responses with these log-ratios."""
    sizes = [len(good), len(bad), len(other)]
    h = torch.cat([good, bad, f64(*other)])
    label = torch.tensor([True] * sizes[0] + [False] * sizes[1] + [True] * sizes[2])
    matched = torch.tensor([True] * (sizes[0] + sizes[1]) + [False] * sizes[2])
    ref = torch.linspace(-9, -13, len(h), dtype=torch.float64)
    return Labelled(logp=ref + h, ref_logp=ref, length=torch.full_like(h, 4), label=label, matched=matched)


KTO = rows(other=(0.2, -0.4, 0.8))
DESIRABLE, UNDESIRABLE = [0.492501, 0.517493, 0.467546], [0.470036, 0.519989, 0.445221]


def test_kto():
    found = loss["kto"](KTO, beta=0.1)
    near([*DESIRABLE, *UNDESIRABLE, 0, 0, 0])(found)
    assert found[:6].mean().item() == pytest.approx(0.485464, abs=5e-7) and torch.equal(found, loss["kto"](KTO))
    scaled = loss["kto"](KTO, desirable=1.5, undesirable=0.5)
    near([*(1.5 * x for x in DESIRABLE), *(0.5 * x for x in UNDESIRABLE), 0, 0, 0], 1e-6)(scaled)
    (slope,) = grads(lambda logp: loss["kto"](replace(KTO, logp=logp)), KTO.logp)
    near([-0.024994, -0.024969, -0.024895])(slope[:3])
    assert (slope[3:6] > 0).all() and not slope[6:].any()  # the shared baseline has no gradient


def test_the_baseline_of_kto_is_at_least_0_and_of_all_that_is_mismatched():
    low = rows(other=(-1.0, -3.0, 0.5))
    none = rows()
    unpaired = loss["apo_zero_unpaired"](none)
    near(unpaired.tolist(), 1e-12)(loss["kto"](none))
    near(unpaired.tolist(), 1e-12)(loss["kto"](low)[:6])
    near(DESIRABLE)(loss["kto"](rows(other=(0.2,)))[:3])


def test_bco():
    found = loss["bco"](rows(), beta=0.1)
    near([1.312770, 1.462978, 1.219010])(found[:3] + found[3:])
    many = rows(bad=torch.cat([H_L, H_L]))  # twice as many bad ones move nothing
    near(found.tolist(), 1e-12)(loss["bco"](many)[:6])
    (slope,) = grads(lambda logp: loss["bco"](replace(rows(), logp=logp)), rows().logp)
    delta = -0.0083333333
    near((-0.1 * (delta - 0.1 * H_W).sigmoid()).tolist(), 1e-9)(slope[:3])


def test_apo_zero_unpaired():
    found = loss["apo_zero_unpaired"](rows())
    near([0.962523, 1.037477, 0.912736])(found[:3] + found[3:])


def test_npo_and_what_is_retained():
    found = loss["npo"](rows(), beta=0.1)
    near([0, 0, 0, 12.887933, 14.887933, 11.962777])(found)
    assert loss["npo"](rows(), beta=0.01)[3].item() == pytest.approx(137.631936, abs=5e-7)
    (slope,) = grads(lambda logp: loss["npo"](replace(rows(), logp=logp)), rows().logp)
    near([0, 0, 0, 0.950042, 1.049958, 0.900332])(slope)
    kept = rows()
    near((-2 * kept.logp[:3] / 4).tolist(), 1e-12)(loss["npo_nll"](kept, retain=2)[:3])
    near(found[3:].tolist(), 1e-12)(loss["npo_nll"](kept)[3:])
    far = replace(kept, kl=f64(0.1, 0.2, 0.3, 9, 9, 9))
    near([0.05, 0.1, 0.15, *found[3:].tolist()], 1e-12)(loss["npo_kl"](far, retain=0.5))
    with pytest.raises(ConfigError, match="npo_kl reads 'kl'"):
        loss["npo_kl"](kept)
    with pytest.raises(ConfigError, match="'beta': got 0"):
        loss["npo"](kept, beta=0)


REWARD, VALUE = f64(1, -0.5, 0.3), f64(0.2, 0.1, -0.1)
VALUED = Valued(logp=PAIRS.chosen, ref_logp=PAIRS.ref_chosen, reward=REWARD, value=VALUE)


def test_dro():
    dro = valued_losses["dro_v"]
    near([0.045, 0.005, 0.605])(dro(VALUED))
    near([0.28125, 0.15125, 0.03125])(dro(VALUED, tau=0.1))
    for tau in (1.0, 0.1):
        policy, value = grads(lambda p, v, t=tau: dro(replace(VALUED, logp=p, value=v), tau=t), PAIRS.chosen, VALUE)
        near((-(REWARD - VALUE) + tau * H_W).tolist(), 1e-12)(policy)
        near((VALUE - REWARD + tau * H_W).tolist(), 1e-12)(value)
        if tau == 1:
            near([-0.3, 0.1, 1.1], 1e-12)(policy)
    with pytest.raises(ConfigError, match="'tau': got 0"):
        dro(VALUED, tau=0)
