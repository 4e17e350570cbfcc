"""Text that a policy keeps, a critic that learns first, an average of weights: each as its formula says, and resumed to the bit."""

from __future__ import annotations

import pytest
import torch

from posttrain.errors import CheckError, ConfigError, DataError
from posttrain.forest import Batch, build_forest, join, split
from posttrain.train.checkpoint import read_checkpoint
from posttrain.train.critic_first import CriticFirst, CriticFirstSource
from posttrain.train.ema import Average
from posttrain.train.journal import Journal
from posttrain.train.loop import fit
from posttrain.train.objectives import PolicyGradient, Supervised
from posttrain.train.optim import MasterAdamW, Optim
from posttrain.train.ptx import Ptx, PtxSource, ptx_rows
from posttrain.train.sources import demonstration_source

from .cases import close, gradients, make
from .test_resume import Killed, kill_at
from .tiny import equal, metrics, random_rows, role, rollouts, run_in, weights

TEXT = [(3, [4]), (2, [6]), (5, [3]), (4, [2])]
WEIGHTS = [1.0, 0.5, 2.0, 1.0]
near = pytest.approx


def text(share=0.5):
    return ptx_rows(random_rows(1, TEXT), WEIGHTS, responses=4, share=share, seed=7)


def run(directory, hooks=(), seed=0, ptx=0.3, warmup=0, decay=0.0, dtype=torch.float32, **changes):
    """Six updates, two a rollout; returns the models, what was printed, and the average."""
    models = {"policy": role(seed, dtype=dtype), "value": role(1, scalar=True, dtype=dtype)}
    source = rollouts(
        models["policy"], role(0, trained=False, dtype=dtype), models["value"], journal=Journal(directory / "j")
    )
    objective = PolicyGradient(ratio_tolerance=0.1)
    if ptx:
        source, objective = PtxSource(source, text()), Ptx(inner=objective, coefficient=ptx)
    if warmup:
        source, objective = CriticFirstSource(source, warmup), CriticFirst(inner=objective)
    average = Average(decay) if decay else None
    optim = Optim(lr=0.01, role_lr={"value": 0.02}, warmup_steps=2, weight_decay=0.1, average=average)
    given = run_in(directory, save_every=1, **changes)
    fit(models, objective, source, optim=optim, run=given, hooks=hooks)
    return models, given.console.file.getvalue(), average


# ---------------------------------------------------------------------------- two batches in one


def test_joined_batches_are_those_of_all_their_rows():
    rows = random_rows(3, [(5, [4, 7, 3]), (2, [8])], "a"), random_rows(4, [(3, [2, 2]), (1, [5])], "a")
    one, two = (Batch(build_forest(r), {}, {}, {f"unit{k}": 1.0}) for k, r in enumerate(rows))
    found, whole = join(one, two), build_forest([*rows[0], *rows[1]])
    for name, value in vars(whole).items():
        other = getattr(found.forest, name)
        assert torch.equal(other, value) if isinstance(value, torch.Tensor) else True
    assert found.forest.trees == whole.trees and torch.equal(found.forest.masks["a"], whole.masks["a"])
    assert found.counts == {"unit0": 1.0, "unit1": 1.0}


def test_columns_that_one_lacks_are_zero_there_and_units_are_their_own():
    forests = [build_forest(random_rows(k, [(2, [3]), (1, [2])], name)) for k, name in ((1, "a"), (2, "b"))]
    one = Batch(forests[0], {"x": torch.ones(5)}, {"y": torch.ones(2, 3)}, {"tokens": 5.0})
    two = Batch(forests[1], {"z": torch.full((5,), 2.0)}, {}, {"others": 1.0})
    found = join(one, two)
    assert found.tokens["x"].tolist() == [1] * 5 + [0] * 5 and found.tokens["z"].tolist() == [0] * 5 + [2] * 5
    assert found.branches["y"].shape == (4, 3) and found.branches["y"].sum() == 6
    assert not found.forest.masks["a"][5:].any() and not found.forest.masks["b"][:5].any()
    with pytest.raises(DataError, match="two batches both count tokens"):
        join(one, one)


# ---------------------------------------------------------------------------- ptx


def test_the_step_is_that_of_the_samples_and_of_the_text():
    """Ouyang et al. 2022, eq. 2: consecutive gradients into one buffer, the second weighed."""
    models, objective, batch = make("policy_gradient:ppo_clip")
    source = demonstration_source(random_rows(1, TEXT), per_step=4, seed=0, weights=WEIGHTS)
    apart, samples, _ = gradients(models, objective, batch, 10_000)
    nll, sft, _ = gradients({"policy": models["policy"]}, Supervised(), source(0), 10_000)

    class Rollouts:
        def __call__(self, step):
            return batch

    joined = PtxSource(Rollouts(), source)(0)
    for most in (10_000, 25):
        found, grads, parts = gradients(models, Ptx(coefficient=27.8), joined, most)
        assert (parts > 1) is (most == 25)
        close(grads, {k: g + 27.8 * sft.get(k, torch.zeros_like(g)) for k, g in samples.items()})
        assert found["loss/ptx"] == near(nll["loss/nll"], rel=1e-9)
        assert {k: found[k] for k in apart if k != "loss/total"} == near(
            {k: apart[k] for k in apart if k != "loss/total"}
        )
        assert found["loss/total"] == near(apart["loss/total"] + 27.8 * nll["loss/total"])


def test_the_likelihood_by_hand():
    forest = build_forest(random_rows(0, [(1, [2]), (1, [2])]))
    masks = {"sampled": torch.tensor([1, 1, 0, 0]).bool(), "ptx": torch.tensor([0, 0, 1, 1]).bool()}
    forest.masks.update(masks | {"trained": torch.ones(4, dtype=torch.bool)})
    zero = torch.zeros(4)
    tokens = {"old_logp": zero, "advantage": zero, "ptx": torch.tensor([0, 0, 1.0, 0.5])}
    batch = Batch(forest, tokens, {}, {"tokens": 2.0, "ptx_tokens": 1.5})
    stats = {"policy": {"logp": torch.tensor([-9.0, -9.0, -1.0, -2.0])}}
    term = Ptx(inner=PolicyGradient(critic=False), coefficient=0.5)(stats, batch)["loss/ptx"]
    assert float(term.sum) == 2.0 and (term.unit, term.coefficient) == ("ptx_tokens", 0.5)


def test_rows_a_step_follow_the_share():
    assert [len(text(share)(0).forest.trees) for share in (0.01, 0.25, 0.5, 1.0)] == [1, 1, 2, 4]


@pytest.mark.parametrize("changes", [{"coefficient": 0.0}, {"inner": PolicyGradient(temperature=0.7)}])
def test_a_likelihood_that_is_not_the_policys_is_refused(changes):
    with pytest.raises(ConfigError, match="expected a coefficient above 0, and temperature 1"):
        Ptx(**changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run with everything."""
    place = tmp_path_factory.mktemp("whole")
    return place, *run(place, warmup=2, decay=0.9)


@pytest.mark.parametrize("killed", [1, 2, 3, 5])
def test_a_run_with_text_a_warm_up_and_an_average_goes_on_to_the_bit(whole, tmp_path, killed):
    place, expected, _, average = whole
    with pytest.raises(Killed):
        run(tmp_path, hooks=[kill_at(killed)], warmup=2, decay=0.9)
    models, printed, found = run(tmp_path, seed=5, warmup=2, decay=0.9)
    assert f"continuing after step {killed} of 6" in printed and "can't be used" not in printed
    assert equal(weights(models), weights(expected)) and equal(found.tensors, average.tensors)
    assert metrics(tmp_path) == metrics(place)


def test_micro_batches_change_nothing_with_text(whole, tmp_path):
    """In fp32, and over six updates, so near and not equal."""
    _, expected, _, _ = whole
    found = weights(run(tmp_path, warmup=2, decay=0.9, max_tokens=20)[0])
    for name, value in weights(expected).items():
        torch.testing.assert_close(found[name], value, atol=2e-3, rtol=0)


def test_text_is_learnt_and_logged(tmp_path):
    """With a weight so large that nothing else counts."""
    run(tmp_path / "a", ptx=50.0)
    losses = [line["loss/ptx"] for line in metrics(tmp_path / "a")]
    run(tmp_path / "b", ptx=0.0)
    assert losses[-1] < losses[0] - 0.1 and "loss/ptx" not in metrics(tmp_path / "b")[0]


# ---------------------------------------------------------------------------- the critic first


def test_only_the_critic_learns_in_the_warm_up(whole):
    place, _, printed, _ = whole
    begun = read_checkpoint(place / "checkpoints" / "step-00000006")
    assert begun.tensors["policy/step/model.norm.weight"] == 4 and begun.tensors["value/step/model.norm.weight"] == 6
    rows = metrics(place)
    assert [row["policy/ratio_error"] < 1e-5 for row in rows] == [True] * 3 + [False, True, False]
    assert [row["loss/total"] == near(row["loss/value"], rel=1e-6) for row in rows] == [True] * 2 + [False] * 4
    assert "ptx tokens" in printed


def test_a_warm_up_wants_a_critic():
    with pytest.raises(ConfigError, match="a critic's warm-up without a critic"):
        CriticFirst(inner=PolicyGradient(critic=False))


# ---------------------------------------------------------------------------- the average


def test_the_average_is_that_of_the_weights_after_each_update():
    """``decay^n theta_0 + sum (1 - decay) decay^(n - k) theta_k``."""
    model = role(0)
    average = Average(0.75)
    optimizer = MasterAdamW({"policy": model.parameters()}, Optim(lr=0.1, average=average))
    mean = {name: p.detach().clone() for name, p in model.parameters().items()}
    for step in range(3):
        for p in model.parameters().values():
            p.grad = torch.full_like(p, 1.0 + step)
        optimizer.step(1.0)
        mean = {name: 0.75 * mean[name] + 0.25 * p.detach() for name, p in model.parameters().items()}
    for name, value in mean.items():
        torch.testing.assert_close(average.tensors[name], value)
    average.put(model.parameters())
    assert all(torch.equal(p, average.tensors[name]) for name, p in model.parameters().items())
    with pytest.raises(CheckError, match="kept no average of weights"):
        average.load({})


def test_parts_of_a_step_may_have_no_sample():
    """Text stands after the samples, in micro-batches of its own where they are small."""
    models, _, batch = make("policy_gradient:ppo_clip")
    source = demonstration_source(random_rows(1, TEXT), per_step=4, seed=0)
    joined = PtxSource(lambda step: batch, source)(0)
    last = split(joined, 12, False)[-1]
    assert not last.forest.masks["sampled"].any() and last.forest.masks["ptx"].any()
    stats = {
        "policy": {"logp": -torch.ones(len(last.forest.target))},
        "value": {"value": torch.zeros(len(last.forest.target))},
    }
    checks = Ptx(coefficient=1.0).check(stats, last, 0)
    assert [c.name for c in checks] == ["ptx tokens"] and checks[0].ok and models
