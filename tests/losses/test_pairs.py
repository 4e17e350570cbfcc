"""Every loss of pairs on three of them, by numbers made apart, and the identities between methods."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from posttrain.errors import ConfigError
from posttrain.losses import preference
from posttrain.losses.preference import margin
from posttrain.losses.reference_free import log1mexp

from .fixtures import PAIRS, f64, near

GOLDEN = [
    ("dpo", {"beta": 0.1}, [0.620957, 0.770957, 0.533382]),
    ("cdpo", {"beta": 0.1, "label_smoothing": 0.1}, [0.635957, 0.755957, 0.568382]),
    ("robust_dpo", {"beta": 0.1, "label_smoothing": 0.1}, [0.602207, 0.789707, 0.489632]),
    ("ipo_sum", {"tau": 0.1}, [12.25, 42.25, 2.25]),
    ("ipo", {"tau": 0.1}, [22.404444, 27.693906, 19.580625]),
    ("dpo_norm", {"beta": 5}, [0.233963, 1.550845, 0.054882]),
    ("gpo_logistic", {"beta": 0.1}, [0.620957, 0.770957, 0.533382]),
    ("gpo_exponential", {"beta": 0.1}, [0.860708, 1.161834, 0.704688]),
    ("gpo_squared", {"beta": 0.1}, [0.7225, 1.3225, 0.4225]),
    ("gpo_truncated_quadratic", {"beta": 0.1}, [0.7225, 1.3225, 0.4225]),
    ("gpo_savage", {"beta": 0.1}, [0.213971, 0.288831, 0.170885]),
    ("gpo_hinge", {"beta": 0.1}, [0.85, 1.15, 0.65]),
    ("rso_hinge", {"gamma": 0.05}, [0.925, 1.075, 0.825]),
    ("rso_hinge", {"gamma": 0.5}, [0.25, 1.75, 0.0]),
    ("rso_sigmoid", {"gamma": 0.05}, [0.656350, 0.731350, 0.609470]),
    ("exo", {"beta": 0.1, "label_smoothing": 1e-3}, [2.505517, 3.022554, 2.178066]),
    ("r_dpo", {"beta": 0.1, "alpha": 0.01}, [0.625595, 0.754946, 0.558623]),
    ("r_dpo", {"beta": 0.1, "alpha": 0.1}, [0.668460, 0.620957, 0.825939]),
    ("dpop", {"beta": 0.3, "lam": 5}, [0.493249, 1.463282, 0.300058]),
    ("dpop", {"beta": 0.3, "lam": 50}, [0.493249, 7.950353, 0.300058]),
    ("fdpo_forward_kl", {"beta": 0.1}, [0.593124, 0.759239, 0.397711]),
    ("fdpo_js", {"beta": 0.1}, [0.652068, 0.726734, 0.601499]),
    ("fdpo_alpha", {"beta": 0.1, "alpha": 0.5}, [0.609934, 0.763190, 0.493567]),
    ("fdpo_alpha", {"beta": 0.1, "alpha": 0.3}, [0.614942, 0.765776, 0.515093]),
    ("fdpo_alpha", {"beta": 0.1, "alpha": 0.7}, [0.604008, 0.761208, 0.463107]),
    ("dpo_nll", {"beta": 0.1, "weight": 0.2}, [1.020957, 1.083457, 0.933382]),
    ("iterative_rpo", {"beta": 0.1, "alpha": 1}, [2.620957, 2.333457, 2.533382]),
    ("con_j", {"beta": 0.1, "weight": 1e-3}, [0.622957, 0.772520, 0.535382]),
    ("apo_zero", {"beta": 0.1}, [0.962523, 1.037477, 0.912736]),
    ("apo_down", {"beta": 0.1}, [0.975068, 1.024932, 0.950812]),
    ("nca", {"beta": 0.1}, [1.349888, 1.424888, 1.305505]),
    ("sppo_hard", {"beta": 0.1}, [36.25, 66.25, 21.25]),
    ("cal_dpo", {"beta": 0.1, "lam": 1}, [36.451413, 67.951413, 21.279750]),
    ("cal_dpo", {"beta": 0.1, "lam": 0.5}, [18.326413, 34.826413, 10.654750]),
    ("slic", {"delta": 1, "lam": 0.1}, [1.0, 2.75, 0.8]),
    ("slic", {"delta": 1, "lam": 0}, [0, 1.5, 0]),
    ("cpo", {"beta": 0.1, "lam": 0}, [0.644397, 0.718460, 0.403186]),
    ("cpo", {"beta": 0.1, "lam": 1}, [2.644397, 2.280960, 2.403186]),
    ("cpo_sum", {"beta": 0.1, "lam": 1}, [10.644397, 13.218460, 8.403186]),
    ("simpo", {"beta": 2, "gamma": 1}, [1.567296, 0.411551, 2.126928]),
    ("simpo", {"beta": 2.5, "gamma": 2.5 * 0.55}, [1.945831, 0.397003, 2.694936]),
    ("orpo", {"lam": 0.1}, [2.079565, 1.594433, 2.104206]),
    ("aot", {"beta": 0.1}, [0.693147, 0.693147, 0.533382]),
    ("aot_unpaired", {"beta": 0.1}, [0.620957, 0.620957, 0.668460]),
    ("beta_dpo", {"beta": 0.1, "alpha": 0.6, "centre": 0.5}, [0.593650, 0.803650, 0.477864]),
]
DEFAULTS = {
    "dpo": 0.641765, "cdpo": 0.653432, "robust_dpo": 0.627182, "ipo": 23.226325, "ipo_sum": 18.916667,
    "dpo_norm": 0.613230, "gpo_logistic": 0.641765, "gpo_exponential": 0.909077, "gpo_squared": 0.8225,
    "gpo_truncated_quadratic": 0.8225, "gpo_savage": 0.224562, "gpo_hinge": 0.883333, "rso_hinge": 0.941667,
    "rso_sigmoid": 0.665724, "r_dpo": 0.646388, "dpop": 2.914553, "fdpo_forward_kl": 0.583358, "fdpo_js": 0.660100,
    "fdpo_alpha": 0.622230, "dpo_nll": 1.012599, "iterative_rpo": 2.495932, "con_j": 0.643620, "apo_zero": 0.970912,
    "apo_down": 0.983604, "slic": 1.516667, "simpo": 1.368592, "orpo": 1.926068, "aot": 0.639892,
    "aot_unpaired": 0.636791,
}  # fmt: skip
"""Means on default options."""


@pytest.mark.parametrize(("name", "options", "expected"), GOLDEN)
def test_golden(name, options, expected):
    near(expected, 6e-7)(preference[name](PAIRS, **options))


def test_every_loss_has_a_golden_test():
    assert {name for name, _, _ in GOLDEN} == set(preference)


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults(name):
    assert preference[name](PAIRS).mean().item() == pytest.approx(DEFAULTS[name], abs=6e-7)


def at(*z):
    """Pairs with ``beta D = z`` at beta 1, one token each."""
    zero, one = torch.zeros(len(z), dtype=torch.float64), torch.ones(len(z), dtype=torch.float64)
    return dataclasses.replace(
        PAIRS, chosen=f64(*z), rejected=zero, ref_chosen=zero, ref_rejected=zero, chosen_len=one, rejected_len=one
    )


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("logistic", [1.313262, 0.693147, 0.474077, 0.126928]),
        ("hinge", [2, 1, 0.5, 0]),
        ("squared", [4, 1, 0.25, 1]),
        ("exponential", [2.718282, 1, 0.606531, 0.135335]),
        ("truncated_quadratic", [4, 1, 0.25, 0]),
        ("savage", [0.534447, 0.25, 0.142537, 0.014209]),
    ],
)
def test_functions_of_the_margin(name, values):
    near(values)(preference[f"gpo_{name}"](at(-1, 0, 0.5, 2), beta=1))


# ---------------------------------------------------------------------------- identities

SWAPPED = dataclasses.replace(
    PAIRS,
    chosen=PAIRS.rejected,
    rejected=PAIRS.chosen,
    ref_chosen=PAIRS.ref_rejected,
    ref_rejected=PAIRS.ref_chosen,
    chosen_len=PAIRS.rejected_len,
    rejected_len=PAIRS.chosen_len,
)


def test_swapped_pairs():
    loss, beta, e = preference, 0.4, 0.2
    z = beta * margin(PAIRS)
    near((-z).tolist(), 1e-12)(loss["dpo"](PAIRS, beta=beta) - loss["dpo"](SWAPPED, beta=beta))
    clean = loss["dpo"](PAIRS, beta=beta)
    noisy = [loss["robust_dpo"](p, beta=beta, label_smoothing=e) for p in (PAIRS, SWAPPED)]
    near(clean.tolist(), 1e-12)((1 - e) * noisy[0] + e * noisy[1])
    conservative = [loss["cdpo"](p, beta=beta, label_smoothing=e) for p in (PAIRS, SWAPPED)]
    near(((1 - e) * clean + e * loss["dpo"](SWAPPED, beta=beta)).tolist(), 1e-12)(conservative[0])
    near((conservative[0] + conservative[1]).tolist(), 1e-12)(clean + loss["dpo"](SWAPPED, beta=beta))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cdpo", {"label_smoothing": 0}),
        ("robust_dpo", {"label_smoothing": 0}),
        ("r_dpo", {"alpha": 0}),
        ("dpop", {"lam": 0}),
        ("beta_dpo", {"alpha": 0}),
        ("dpo_nll", {"weight": 0}),
        ("iterative_rpo", {"alpha": 0}),
        ("con_j", {"weight": 0}),
        ("fdpo_alpha", {"alpha": 1e-9}),
        ("gpo_logistic", {}),
    ],
)
def test_what_becomes_dpo(name, options):
    expected = preference["dpo"](PAIRS, beta=0.3).tolist()
    near(expected, 1e-6 if name == "fdpo_alpha" else 1e-12)(preference[name](PAIRS, beta=0.3, **options))


def test_more_identities():
    loss, zero = preference, torch.zeros(3, dtype=torch.float64)
    free = dataclasses.replace(PAIRS, ref_chosen=zero, ref_rejected=zero)
    near(loss["dpo"](free, beta=0.3).tolist(), 1e-12)(loss["cpo"](PAIRS, beta=0.3, lam=0))
    near(loss["dpo"](PAIRS, beta=0.3).tolist(), 1e-12)(loss["rso_sigmoid"](PAIRS, gamma=0.3))
    near(loss["gpo_hinge"](PAIRS, beta=0.3).tolist(), 1e-12)(loss["rso_hinge"](PAIRS, gamma=0.3))
    near((0.09 * loss["ipo_sum"](PAIRS, tau=0.15)).tolist(), 1e-12)(loss["gpo_squared"](PAIRS, beta=0.3))
    near(loss["fdpo_forward_kl"](PAIRS, beta=0.3).tolist(), 1e-12)(loss["fdpo_alpha"](PAIRS, beta=0.3, alpha=1))
    for k in range(3):  # of a batch of one
        one = type(PAIRS)(**{name: x[k : k + 1] for name, x in vars(PAIRS).items()})
        for name in ("aot", "aot_unpaired"):
            near(loss["dpo"](one, beta=0.3).tolist(), 1e-12)(loss[name](one, beta=0.3))
    e, z = 0.05, 0.3 * margin(PAIRS)
    target = math.log((1 - e) / e)
    q = z.sigmoid()
    kl = q * (q.log() - math.log(1 - e)) + (1 - q) * ((1 - q).log() - math.log(e))
    near(kl.tolist(), 1e-12)(loss["exo"](PAIRS, beta=0.3, label_smoothing=e))
    near([0.0], 1e-12)(loss["exo"](at(target), beta=1, label_smoothing=e))


def test_a_longer_winner_is_pushed_less():
    chosen = PAIRS.chosen.clone().requires_grad_()
    pairs = dataclasses.replace(PAIRS, chosen=chosen)
    regular = torch.autograd.grad(preference["r_dpo"](pairs, alpha=0.1).sum(), chosen)[0]
    plain = torch.autograd.grad(preference["dpo"](pairs).sum(), chosen)[0]
    longer = PAIRS.chosen_len > PAIRS.rejected_len
    assert torch.equal(regular.abs() < plain.abs(), longer) and longer.tolist() == [False, True, False]


def test_gradients_that_are_known():
    chosen = PAIRS.chosen.clone().requires_grad_()
    pairs = dataclasses.replace(PAIRS, chosen=chosen)
    for name, options, expected in [
        ("cdpo", {"label_smoothing": 0.1}, [-0.036257, -0.043743, -0.031338]),
        ("robust_dpo", {"label_smoothing": 0.1}, [-0.058757, -0.066243, -0.053838]),
        ("ipo_sum", {"tau": 0.1}, [-7, -13, -3]),
    ]:
        near(expected)(torch.autograd.grad(preference[name](pairs, **options).sum(), chosen)[0])
    pushed = torch.autograd.grad(preference["dpop"](pairs, beta=0.1, lam=5).sum(), chosen)[0]
    z = 0.1 * (margin(PAIRS) - 5 * torch.tensor([0, 0.5, 0], dtype=torch.float64))
    near((-0.1 * (-z).sigmoid() * f64(1, 6, 1)).tolist(), 1e-12)(pushed)


def test_the_batch_sets_beta_without_gradient():
    chosen = PAIRS.chosen.clone().requires_grad_()
    pairs = dataclasses.replace(PAIRS, chosen=chosen)
    loss = preference["beta_dpo"](pairs, beta=0.1, alpha=0.6, centre=0.5)
    near((-0.14 * (-0.14 * margin(PAIRS)).sigmoid()).tolist(), 1e-12)(torch.autograd.grad(loss.sum(), chosen)[0])
    low = preference["beta_dpo"](PAIRS, beta=0.1, alpha=0.6, centre=1e3)
    near(preference["dpo"](PAIRS, beta=1e-3).tolist(), 1e-12)(low)


def test_log1mexp():
    x = f64(-50, -3, -math.log(2), -0.1, -1e-5)
    near([math.log1p(-math.exp(v)) for v in x.tolist()], 1e-12)(log1mexp(x))
    assert log1mexp(f64(0.0)).item() == pytest.approx(math.log(1e-7), abs=1e-6)


@pytest.mark.parametrize(
    ("name", "option", "value", "expected"),
    [
        ("cdpo", "label_smoothing", 0.5, "got 0.5; expected at least 0 and below 0.5"),
        ("robust_dpo", "label_smoothing", -0.1, "got -0.1; expected at least 0 and below 0.5"),
        ("aot", "label_smoothing", 0.7, "got 0.7"),
        ("aot_unpaired", "label_smoothing", 0.7, "got 0.7"),
        ("exo", "label_smoothing", 0, "got 0; expected at least 1e-09"),
        ("ipo", "tau", 0, "'tau': got 0; expected a number above 0"),
        ("ipo_sum", "tau", -1, "'tau': got -1"),
        ("fdpo_alpha", "alpha", 0, "'alpha': got 0"),
        ("sppo_hard", "beta", 0, "'beta': got 0"),
        ("cal_dpo", "beta", 0, "'beta': got 0"),
    ],
)
def test_options_that_mean_nothing_are_refused(name, option, value, expected):
    with pytest.raises(ConfigError, match=expected):
        preference[name](PAIRS, **{option: value})


@pytest.mark.parametrize(
    ("name", "candidates"),
    [
        ("rpo", ["iterative_rpo", "reward_aware_po", "reward_aware_po_k"]),
        ("spo", ["sppo", "sppo_hard", "self-play scores"]),
        ("dro", ["dro_v", "robust_dpo"]),
    ],
)
def test_names_that_papers_share_are_asked_back(name, candidates):
    with pytest.raises(ConfigError, match=f"'{name}' may be several methods; say which") as error:
        preference[name]
    assert all(candidate in str(error.value) for candidate in candidates) and name not in preference
