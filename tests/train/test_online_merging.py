"""Merging at every step: numbers worked out by hand from the paper, what it is at its ends, and going on to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from posttrain.errors import ConfigError
from posttrain.train.loop import fit
from posttrain.train.objectives import Supervised
from posttrain.train.online_merging import (
    OnlineMerge,
    blend,
    check_numbers,
    largest,
    ondare,
    ondare_rescaled,
    online_merges,
    onties,
    onties_unweighted,
    task_vectors,
)
from posttrain.train.optim import MasterAdamW, Optim
from posttrain.train.sources import demonstration_source

from .test_resume import Killed, kill_at
from .tiny import equal, metrics, random_rows, role, run_in, weights


def doubles(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def near(found, *expected):
    torch.testing.assert_close(found, doubles(*expected), atol=1e-12, rtol=0)


DELTA, TASK = doubles(0.01, -0.03, 0.02, -0.001), doubles(0.5, 0.2, -0.1, -0.4)


def test_ondare_by_hand():
    """Equation 4 with the masks (1, 0, 1, 0) and (0, 1, 1, 0): 0.9 * 0.01; 0.1 * 0.2; 0.9 * 0.02 - 0.1 * 0.1; nothing."""
    masks = doubles(1, 0, 1, 0), doubles(0, 1, 1, 0)
    near(1 + blend(DELTA * masks[0], TASK * masks[1], 0.1), 1.009, 1.02, 1.008, 1.0)


def test_ondare_draws_by_key_and_in_proportion():
    one, task = torch.ones(100_000), 2 * torch.ones(100_000)
    found = ondare(one, task, [0, 1], alpha=0.25, keep=0.2)
    shares = [float((found == v).float().mean()) for v in (0.0, 0.75, 0.5, 1.25)]
    assert shares == pytest.approx([0.64, 0.16, 0.16, 0.04], abs=0.005)  # the two masks are independent
    assert torch.equal(found, ondare(one, task, [0, 1], alpha=0.25, keep=0.2))
    assert not torch.equal(found, ondare(one, task, [0, 2], alpha=0.25, keep=0.2))
    torch.testing.assert_close(ondare_rescaled(one, task, [0, 1], alpha=0.25, keep=0.2), found / 0.2)


def test_onties_by_hand():
    """Equation 7, half kept: (0, -0.027, 0.018, 0) with (0.05, 0, 0, -0.04)."""
    near(1 + onties(DELTA, largest(TASK, 0.5), [], alpha=0.1, keep=0.5), 1.05, 0.973, 1.018, 0.96)


def test_onties_where_signs_differ_the_larger_goes():
    """(0.027, 0.018, 0.009, 0.0009) with (-0.005, 0.02, 0.01, -0.004); the released code looks at 0.03 - 0.05 < 0 first."""
    delta, task = doubles(0.03, 0.02, 0.01, 0.001), doubles(-0.05, 0.2, 0.1, -0.04)
    near(onties(delta, task, [], alpha=0.1, keep=1.0), 0.027, 0.038, 0.019, -0.004)
    near(onties_unweighted(delta, task, [], alpha=0.1, keep=1.0), -0.005, 0.038, 0.019, -0.004)
    near(onties(doubles(0.5, 0.5), doubles(-0.5, 0.5), [], alpha=0.5, keep=1.0), 0.0, 0.5)


def test_largest():
    near(largest(doubles(3, -4, 0, 1, -2), 0.4), 3, -4, 0, 0, 0)
    near(largest(doubles(3, -4, 0, 1), 0.01), 0, -4, 0, 0)  # one at least
    near(largest(doubles(1, -1, 0.5), 0.34), 1, -1, 0)  # equals stay together, whatever their order
    near(largest(doubles(1, -1, 0.5), 1.0), 1, -1, 0.5)


def moved(merge, steps=5, dtype=torch.float32, decay=0.0, lr=0.01):
    """A parameter after some steps of AdamW on fixed gradients."""
    g = torch.Generator().manual_seed(1)
    p = nn.Parameter(torch.randn(50, generator=g).to(dtype))
    optimizer = MasterAdamW({"policy": {"w": p}}, Optim(lr=lr, weight_decay=decay, merge=merge))
    for _ in range(steps):
        p.grad = torch.randn(50, generator=g).to(dtype)
        optimizer.step(1.0)
    return optimizer.masters["policy"]["w"].detach().clone()


def merging(rule, alpha, keep, task=None):
    task = torch.linspace(-1, 1, 50) if task is None else task
    return OnlineMerge(rule=rule, alpha=alpha, keep=keep, task={"policy": {"w": task}})


@pytest.mark.parametrize("rule", online_merges)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_nothing_of_the_task_and_every_entry_kept_it_is_adamw_to_the_bit(rule, dtype):
    task = torch.zeros(50) if rule == "onties_unweighted" else None  # its sign is the task's, whatever alpha
    for decay in (0.0, 0.1):
        found, expected = (
            moved(merging(rule, 0.0, 1.0, task), decay=decay, dtype=dtype),
            moved(None, decay=decay, dtype=dtype),
        )
        if decay:
            torch.testing.assert_close(found, expected, atol=1e-7, rtol=0)
        else:
            assert torch.equal(found, expected)


def test_steps_of_the_optimiser_follow_the_rule_and_decay_stays_whole():
    """One step of AdamW is lr sign(g): lr 0.01, alpha 0.1 and task 0.5 give 0.9 (-0.01) + 0.05 after the decay 1 - 0.01 * 0.5."""
    p = nn.Parameter(torch.ones(2, dtype=torch.float64))
    merge = OnlineMerge(rule="onties", alpha=0.1, keep=1.0, task={"policy": {"w": doubles(0.5, -0.5)}})
    optimizer = MasterAdamW({"policy": {"w": p}}, Optim(lr=0.01, weight_decay=0.5, clip=1e9, merge=merge))
    p.grad = doubles(3.0, 3.0)
    optimizer.step(1.0)
    torch.testing.assert_close(p.detach(), doubles(0.995 + 0.05, 0.995 - 0.059), atol=1e-9, rtol=0)


def test_half_of_the_entries_stand_still():
    start = moved(None, steps=0)
    once = moved(merging("ondare", 0.0, 0.5), steps=1)
    stood = once == start
    assert 10 <= int(stood.sum()) <= 40 and torch.equal(once[~stood], moved(None, steps=1)[~stood])
    again = moved(merging("ondare", 0.0, 0.5), steps=2)
    assert not torch.equal(again == once, stood)  # other entries at the next step


def test_a_parameter_without_a_task_vector_moves_as_adamw_moves_it():
    merge = OnlineMerge(rule="ondare", alpha=0.5, keep=0.1, task={"policy": {}, "value": {"w": torch.ones(50)}})
    assert torch.equal(moved(merge), moved(None))


@pytest.mark.parametrize("rule", ["ondare", "onties"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_killed_run_goes_on_to_the_bit(tmp_path, rule, dtype):
    def train(directory, hooks=(), seed=0):
        models = {"policy": role(0, dtype=dtype)}
        base = {k: p.detach() for k, p in role(9, dtype=dtype).parameters().items()}
        task = task_vectors(models["policy"].parameters(), base, rule, 0.5)
        optim = Optim(lr=0.01, merge=OnlineMerge(rule=rule, alpha=0.01, keep=0.5, task={"policy": task}))
        if seed:  # what a checkpoint restores must not depend on the weights that were there
            for parameter in models["policy"].parameters().values():
                parameter.data.add_(1)
        source = demonstration_source(random_rows(1, [(3, [4]), (2, [6]), (5, [3])]), per_step=2, seed=7)
        fit(models, Supervised(), source, optim=optim, run=run_in(directory, steps=5), hooks=hooks)
        return models

    whole = train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "cut", [kill_at(3)])
    cut = train(tmp_path / "cut", seed=1)
    assert equal(weights(cut), weights(whole)) and metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_task_vectors():
    parameters = {"w": nn.Parameter(torch.tensor([1.0, 5.0]).bfloat16()), "scalar.weight": nn.Parameter(torch.ones(1))}
    base = {"w": torch.tensor([0.5, 1.0])}
    assert task_vectors(parameters, base, "ondare", 0.5)["w"].tolist() == [0.5, 4.0]
    found = task_vectors(parameters, base, "onties", 0.5)
    assert found.keys() == {"w"} and found["w"].tolist() == [0.0, 4.0] and found["w"].dtype == torch.float32
    with pytest.raises(ConfigError, match=r"the merging base has no 'w' of shape \(2,\)"):
        task_vectors(parameters, {"w": torch.ones(3)}, "ondare", 0.5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("ondares", 0.1, 0.1), "unknown online merging 'ondares'; did you mean 'ondare'"),
        (("ondare", 1.1, 0.1), r"got alpha=1.1; expected 0 to 1; the paper's search starts at 1e-7"),
        (("ondare", 0.1, 0.0), r"got keep=0; expected more than 0, at most 1"),
    ],
)
def test_numbers_outside_their_ranges(given, message):
    with pytest.raises(ConfigError, match=message):
        check_numbers(*given)
