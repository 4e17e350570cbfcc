"""Losses of pairs on the golden numbers, and the mapping that holds them."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import math
import subprocess
import sys
from collections.abc import Mapping

import pytest
import torch

from posttrain.errors import ConfigError
from posttrain.losses import PairLogps, preference
from posttrain.losses.preference import dpo, margin
from posttrain.registry import keyword_defaults

from .fixtures import PAIRS, f64, near

NAMES = sorted(preference)


def test_margin():
    near([1.5, -1.5, 3.5])(margin(PAIRS))


def test_dpo():
    found = preference["dpo"](PAIRS, beta=0.1)
    near([0.620957, 0.770957, 0.533382])(found)
    assert found.mean().item() == pytest.approx(0.641765, abs=5e-7)
    assert torch.equal(preference["dpo"](PAIRS), found)  # 0.1 is the default
    near([math.log(1 + math.exp(-x)) for x in (0.75, -0.75, 1.75)], 1e-12)(dpo(PAIRS, beta=0.5))


def test_gradient_of_dpo():
    chosen, rejected = PAIRS.chosen.clone().requires_grad_(), PAIRS.rejected.clone().requires_grad_()
    dpo(dataclasses.replace(PAIRS, chosen=chosen, rejected=rejected)).sum().backward()
    near([-0.046257, -0.053743, -0.041338])(chosen.grad)
    assert torch.equal(rejected.grad, -chosen.grad)


EXACT = {
    "beta_dpo": {"alpha": 0},  # its beta has no gradient, so that differences say something else
    "slic": {"delta": 1.3},  # away from the kink
}
FIELDS = [f.name for f in dataclasses.fields(PairLogps)]


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name):
    fields = [getattr(PAIRS, f).clone().requires_grad_() for f in FIELDS]
    loss = functools.partial(preference[name], **EXACT.get(name, {}))
    assert torch.autograd.gradcheck(lambda *given: loss(PairLogps(**dict(zip(FIELDS, given, strict=True)))), fields)


def grid(dtype, *sizes, length=1.0):
    """All pairs whose four log-probabilities are among some, with what its gradient is taken to."""
    given = list(itertools.product(sizes, repeat=4))
    columns = [torch.tensor(x, dtype=dtype).requires_grad_() for x in zip(*given, strict=True)]
    lengths = torch.full((2, len(given)), length, dtype=dtype)
    return PairLogps(**dict(zip(FIELDS, [*columns, *lengths], strict=True))), columns


@pytest.mark.parametrize("name", NAMES)
def test_shape_order_and_extremes(name):
    loss = preference[name]
    whole = loss(PAIRS)
    assert whole.shape == (3,)
    order = torch.tensor([2, 0, 1])
    permuted = PairLogps(**{k: v[order] for k, v in vars(PAIRS).items()})
    torch.testing.assert_close(loss(permuted), whole[order], atol=1e-12, rtol=0)
    empty = PairLogps(**{k: v[:0] for k, v in vars(PAIRS).items()})
    assert loss(empty).shape == (0,)
    for length in (0.0, 1.0, 500.0):
        extreme, (chosen, rejected, *_) = grid(torch.float32, -1e4, -1.0, -1e-9, 0.0, length=length)
        found = loss(extreme)
        found.sum().backward()
        assert found.isfinite().all() and chosen.grad.isfinite().all() and rejected.grad.isfinite().all()


TARGETS = {
    "cdpo": lambda d, h: d - math.log(9) / 0.1,
    "ipo": lambda d, h: d - 5,
    "ipo_sum": lambda d, h: d - 5,
    "gpo_squared": lambda d, h: d - 10,
    "exo": lambda d, h: d - math.log(999) / 0.5,
    "nca": lambda d, h: h - math.log(2) / 0.01,
    "sppo_hard": lambda d, h: h - 500,
    "cal_dpo": lambda d, h: 2 * (h - 500) - (-d).sigmoid(),
}
"""What is 0 where the gradient with respect to the chosen response is, and has its sign, on default options."""
DOWN = {"apo_down"}  # the chosen response is to become less likely too


@pytest.mark.parametrize("name", NAMES)
def test_the_chosen_response_is_pushed_up_until_its_target_and_the_rejected_one_down(name):
    pairs, (chosen, rejected, *_) = grid(torch.float64, -700.0, -30.0, -9.5, -2.0, -1.0)
    preference[name](pairs).sum().backward()
    d, h = margin(pairs).detach(), (pairs.chosen - pairs.ref_chosen).detach()
    if name in TARGETS:
        beyond = TARGETS[name](d, h)
        assert (chosen.grad * beyond >= 0).all() and (beyond > 0).any()
        moving = beyond.abs() < 20
        assert (chosen.grad[moving] != 0).all()
    elif name not in DOWN:
        assert (chosen.grad <= 0).all() and (chosen.grad < 0).any()
    if name not in ("cdpo", "ipo", "ipo_sum", "gpo_squared", "exo", "sppo_hard", "cal_dpo"):
        assert (rejected.grad >= 0).all() and (rejected.grad > 0).any()


@pytest.mark.parametrize("name", NAMES)
def test_the_declared_value_where_policy_and_reference_agree(name):
    declared = preference.facts(name).get("at_reference")
    assert declared is None or isinstance(declared, float)
    same = dataclasses.replace(PAIRS, chosen=PAIRS.ref_chosen, rejected=PAIRS.ref_rejected)
    if declared is not None:
        near([declared] * 3, 1e-9)(preference[name](same))
    else:  # it depends on lengths, or on how likely the chosen response is
        assert preference[name](same).std() > 0


@pytest.mark.parametrize("name", NAMES)
def test_every_loss_says_what_it_is_and_where_it_is_from(name):
    facts, text = preference.facts(name), inspect.getdoc(preference[name])
    assert facts["paper"] and set(facts["needs"]) <= {"reference"}
    assert facts.keys() <= {"paper", "needs", "at_reference", "coupled", "per_token"}
    assert preference.facts(preference[name]) == facts
    first, blank, *_ = text.split("\n")
    assert "``" in first and first.endswith(".") and not blank and "Source: " in text
    assert all(type(default) is float for default in keyword_defaults(preference[name]).values())


@pytest.mark.parametrize("name", NAMES)
def test_what_a_loss_states_it_needs_is_what_it_reads(name):
    unknown = torch.full((3,), math.nan, dtype=torch.float64)
    without = preference[name](dataclasses.replace(PAIRS, ref_chosen=unknown, ref_rejected=unknown))
    assert without.isnan().any() == ("reference" in preference.facts(name)["needs"])
    twice = dataclasses.replace(PAIRS, chosen_len=PAIRS.chosen_len * 2)
    if preference.facts(name).get("per_token"):
        assert not torch.equal(preference[name](twice), preference[name](PAIRS))


@pytest.mark.parametrize("name", NAMES)
def test_coupled_losses_are_declared(name):
    one = PairLogps(**{k: v[:1] for k, v in vars(PAIRS).items()})
    apart = not torch.equal(preference[name](one), preference[name](PAIRS)[:1])
    assert apart <= preference.facts(name).get("coupled", False)


def test_dpo_states_log_2_and_that_it_needs_a_reference():
    assert preference.facts("dpo")["at_reference"] == math.log(2)
    assert preference.facts("dpo")["needs"] == ("reference",)
    assert preference.facts(math.sqrt) == {}


def test_the_record_has_six_fields_all_required_and_is_frozen():
    names = [f.name for f in dataclasses.fields(PairLogps)]
    assert names == ["chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_len", "rejected_len"]
    for name in names:
        with pytest.raises(TypeError, match=name):
            PairLogps(**{k: v for k, v in vars(PAIRS).items() if k != name})
    with pytest.raises(TypeError):
        PairLogps(*vars(PAIRS).values())
    with pytest.raises(dataclasses.FrozenInstanceError):
        PAIRS.chosen = f64(0)


def test_the_mapping_is_read_only_and_names_what_was_meant():
    assert isinstance(preference, Mapping) and "dpo" in preference and preference["dpo"] is dpo
    with pytest.raises(TypeError):
        preference["mine"] = dpo
    with pytest.raises(ConfigError, match=r"unknown preference loss 'dpoo'; did you mean 'dpo'\?"):
        preference["dpoo"]


def test_options_are_checked_when_they_are_bound():
    near([0.620957, 0.770957, 0.533382])(preference.bound("dpo", {"beta": 0.1})(PAIRS))
    near([0.620957, 0.770957, 0.533382])(preference.bound(dpo, {})(PAIRS))
    with pytest.raises(ConfigError, match=r"preference loss 'dpo' has no option 'bta'; did you mean 'beta'\?"):
        preference.bound("dpo", {"bta": 0.1})
    with pytest.raises(ConfigError, match="option 'beta': got nan; expected a finite number"):
        preference.bound(dpo, {"beta": math.nan})


def test_the_name_is_the_mapping_whatever_is_imported_first():
    code = """
import importlib, sys
from collections.abc import Mapping

FIRST = ["posttrain.losses", "posttrain.losses.preference", "posttrain.losses.policy", "posttrain.train.objectives"]
for first in FIRST:
    for name in [n for n in sys.modules if n.partition(".")[0] == "posttrain"]:
        del sys.modules[name]
    importlib.import_module(first)
    import posttrain.losses.preference
    from posttrain.losses import preference
    import posttrain.losses
    assert isinstance(preference, Mapping) and isinstance(posttrain.losses.preference, Mapping), first
    assert posttrain.losses.preference["dpo"] is preference["dpo"]
    from posttrain.losses.preference import dpo, preference as again
    assert again is preference and preference["dpo"] is dpo
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr
