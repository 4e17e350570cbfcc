"""A run that is killed and continued ends bit for bit where an uninterrupted one does."""

from __future__ import annotations

import json

import pytest
import torch

from posttrain.errors import CheckError
from posttrain.forest import Batch
from posttrain.train.log import JsonLines
from posttrain.train.loop import fit
from posttrain.train.objectives import PolicyGradient, Supervised
from posttrain.train.optim import Optim
from posttrain.train.sources import demonstration_source, shuffled

from .tiny import equal, metrics, random_rows, role, rollouts, run_in, weights

OPTIM = Optim(lr=0.01, role_lr={"value": 0.02}, schedule="cosine", warmup_steps=2, weight_decay=0.1)


class Killed(Exception):
    """Stands for whatever ends a process."""


def kill_at(step):
    def hook(at, _):
        if at == step:
            raise Killed

    return hook


def supervised(directory, dtype, hooks=(), seed=0):
    models = {"policy": role(seed, dtype=dtype)}
    source = demonstration_source(random_rows(1, [(3, [4]), (2, [6]), (5, [3]), (4, [2, 3])]), per_step=2, seed=7)
    run = run_in(directory, steps=7)
    fit(models, Supervised(), source, optim=OPTIM, run=run, hooks=hooks)
    return models, run.console.file.getvalue()


def reinforce(directory, dtype, hooks=(), seed=0):
    models = {"policy": role(seed, dtype=dtype), "value": role(1, scalar=True, dtype=dtype)}
    reference = role(0, trained=False, dtype=dtype)
    samples: list = []
    source = rollouts(models["policy"], reference, models["value"], on_samples=lambda *x: samples.append(x))
    run = run_in(directory, steps=6, save_every=1)
    fit(models, PolicyGradient(ratio_tolerance=0.1), source, optim=OPTIM, run=run, hooks=hooks)
    return models, run.console.file.getvalue(), samples


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("killed", "continued"), [(0, 0), (1, 0), (4, 4), (6, 6)])
def test_supervised(tmp_path, dtype, killed, continued):
    """Killed in the hook of a step: after its metrics are written, before its checkpoint."""
    expected, _ = supervised(tmp_path / "whole", dtype)
    with pytest.raises(Killed):
        supervised(tmp_path / "cut", dtype, [kill_at(killed)])
    assert len(metrics(tmp_path / "cut")) == killed + 1
    # what a checkpoint restores must not depend on the weights that were there
    models, printed = supervised(tmp_path / "cut", dtype, seed=0 if continued == 0 else 5)
    assert (f"continuing after step {continued} of 7" in printed) is (continued > 0)
    assert equal(weights(models), weights(expected))
    assert not equal(weights(models), weights({"policy": role(0, dtype=dtype)}))
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert [line["step"] for line in metrics(tmp_path / "cut")] == list(range(7))


@pytest.mark.parametrize("killed", [2, 3, 5])
def test_reinforcement(tmp_path, killed):
    """Two updates on each rollout: a run goes on from between rollouts only."""
    expected, _, samples = reinforce(tmp_path / "whole", torch.float32)
    with pytest.raises(Killed):
        reinforce(tmp_path / "cut", torch.float32, [kill_at(killed)])
    models, printed, again = reinforce(tmp_path / "cut", torch.float32, seed=5)
    start = killed // 2 * 2
    assert f"continuing after step {start} of 6" in printed
    assert again == [s for s in samples if s[0] >= start]
    assert equal(weights(models), weights(expected))
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_a_finished_run_is_not_run_again(tmp_path):
    expected, _ = supervised(tmp_path, torch.float32)
    lines = (tmp_path / "metrics.jsonl").read_text()
    models, _ = supervised(tmp_path, torch.float32, [kill_at(0)], seed=5)
    assert equal(weights(models), weights(expected)) and (tmp_path / "metrics.jsonl").read_text() == lines


class Poisoned:
    """Rollout batches whose advantages turn to ``value`` at step 1."""

    def __init__(self, source, value):
        self.source, self.value = source, value

    def __call__(self, step):
        batch = self.source(step)
        if step != 1:
            return batch
        bad = batch.tokens["advantage"] * self.value
        return Batch(batch.forest, batch.tokens | {"advantage": bad}, batch.branches, batch.counts)

    def __getattr__(self, name):
        return getattr(self.source, name)


def test_a_loss_that_is_not_finite_stops_the_run_before_it_touches_weights(tmp_path):
    models = {"policy": role(0), "value": role(1, scalar=True)}
    source = Poisoned(rollouts(models["policy"], role(0, trained=False), models["value"]), float("nan"))
    after_first = []
    hook = lambda step, _: after_first.append(weights(models))  # noqa: E731
    with pytest.raises(CheckError, match="the loss is nan at step 1; weights are unchanged"):
        fit(models, PolicyGradient(), source, optim=OPTIM, run=run_in(tmp_path), hooks=[hook])
    assert len(after_first) == 1 and equal(weights(models), after_first[0])
    assert [line["step"] for line in metrics(tmp_path)] == [0]


def test_a_sampler_that_is_not_the_policy_is_refused_before_the_first_step(tmp_path):
    models = {"policy": role(0), "value": role(1, scalar=True)}
    source = rollouts(role(4, trained=False), role(0, trained=False), models["value"])
    before = weights(models)
    with pytest.raises(CheckError, match=r"ratio before updates: got .* expected mean within 0\.0001"):
        fit(models, PolicyGradient(), source, optim=OPTIM, run=run_in(tmp_path))
    assert equal(weights(models), before)


def test_each_epoch_has_every_row_once_in_its_own_order():
    assert sorted(shuffled(9, 1, 0)) == sorted(shuffled(9, 1, 1)) == list(range(9))
    assert shuffled(9, 1, 0) == shuffled(9, 1, 0) != shuffled(9, 1, 1)
    source = demonstration_source(random_rows(1, [(n + 1, [2]) for n in range(5)]), per_step=2, seed=0)
    assert source.steps_per_epoch == 3
    sizes = [tree.prompt[1] - tree.prompt[0] for step in range(3) for tree in source(step).forest.trees]
    assert sorted(sizes) == [1, 2, 3, 4, 5]
    assert [source.metrics(step)["data/epoch"] for step in (0, 2, 5)] == pytest.approx([1 / 3, 1, 2])


def test_lines_are_cut_back(tmp_path):
    path = tmp_path / "samples.jsonl"
    log = JsonLines(path, 0)
    odd = "a\u2028b\u0085c\u2029d\x0be\nf"  # what str.splitlines would cut at
    for step in range(4):
        log.write(step, {"completion": odd})
        log.write(step, {"completion": "zwölf"})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 4, "compl')  # the process was killed here
    log = JsonLines(path, 3)
    log.write(3, {"completion": "again"})
    log.close()
    records = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    assert [r["step"] for r in records] == [0, 0, 1, 1, 2, 2, 3]
    assert [r["completion"] for r in records] == [odd, "zwölf"] * 3 + ["again"]
    assert [p.name for p in tmp_path.iterdir()] == ["samples.jsonl"]
