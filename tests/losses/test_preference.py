"""Losses of pairs on the golden numbers, and the mapping that holds them."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from collections.abc import Mapping

import pytest
import torch

from posttrain.errors import ConfigError
from posttrain.losses import PairLogps, preference
from posttrain.losses.preference import dpo, margin


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
NAMES = sorted(preference)


def near(values, atol=5e-7):
    return lambda found: torch.testing.assert_close(found, f64(*values), atol=atol, rtol=0)


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


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name):
    fields = [getattr(PAIRS, f.name).clone().requires_grad_() for f in dataclasses.fields(PAIRS)]
    names = [f.name for f in dataclasses.fields(PAIRS)]
    loss = preference[name]
    assert torch.autograd.gradcheck(lambda *given: loss(PairLogps(**dict(zip(names, given, strict=True)))), fields)


@pytest.mark.parametrize("name", NAMES)
def test_shape_order_and_extremes(name):
    loss = preference[name]
    whole = loss(PAIRS)
    assert whole.shape == (3,)
    order = torch.tensor([2, 0, 1])
    permuted = PairLogps(**{k: v[order] for k, v in vars(PAIRS).items()})
    torch.testing.assert_close(loss(permuted), whole[order], atol=1e-12, rtol=0)
    sizes = (-1e4, -1.0, 0.0)
    given = [(c, r, p, q) for c in sizes for r in sizes for p in sizes for q in sizes]
    columns = [torch.tensor(x, dtype=torch.float32).requires_grad_() for x in zip(*given, strict=True)]
    ones = torch.ones(len(given))
    keys = ("chosen", "rejected", "ref_chosen", "ref_rejected")
    extreme = PairLogps(**dict(zip(keys, columns, strict=True)), chosen_len=ones, rejected_len=ones)
    found = loss(extreme)
    found.sum().backward()
    assert found.isfinite().all() and columns[0].grad.isfinite().all() and columns[1].grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_the_declared_value_where_policy_and_reference_agree(name):
    declared = preference.facts(name).get("at_reference")
    assert declared is None or isinstance(declared, float)
    same = dataclasses.replace(PAIRS, chosen=PAIRS.ref_chosen, rejected=PAIRS.ref_rejected)
    if declared is not None:
        near([declared] * 3, 1e-12)(preference[name](same))


@pytest.mark.parametrize("name", NAMES)
def test_every_loss_says_where_it_is_from(name):
    facts = preference.facts(name)
    assert facts["paper"] and set(facts["needs"]) <= {"reference"}
    assert preference.facts(preference[name]) == facts
    assert preference[name].__doc__


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
