"""Steps that are not finite: nothing moves, what made them is kept and replayed, and too many end the run with a checkpoint."""

from __future__ import annotations

import json
import math
import time
from functools import partial
from io import StringIO

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from posttrain.errors import CheckError, ModelError
from posttrain.forest import Batch
from posttrain.rewards.base import Score
from posttrain.train import distributed
from posttrain.train.checkpoint import save_checkpoint
from posttrain.train.diagnose import KLLimit, Watch
from posttrain.train.dumps import read_batch, read_fault
from posttrain.train.guard import Replayed, TooManySkipped, replay, replaying
from posttrain.train.loop import _stats, fit
from posttrain.train.objectives import PolicyGradient, Supervised
from posttrain.train.optim import Optim
from posttrain.train.sources import demonstration_source

from .tiny import equal, metrics, random_rows, role, rollouts, run_in, score, weights

OPTIM = Optim(lr=0.01, warmup_steps=2, weight_decay=0.1)
ROWS = random_rows(1, [(3, [4]), (2, [6]), (5, [3]), (4, [2, 3])])


class Changed:
    """A source whose batches of some steps are changed."""

    def __init__(self, source, steps, change):
        self.source, self.steps, self.change = source, steps, change

    def __call__(self, step):
        batch = self.source(step)
        return self.change(batch) if step in self.steps else batch

    def __getattr__(self, name):
        return getattr(self.source, name)


def column(name, value, at=0):
    """A change of one entry of a batch's column."""

    def change(batch: Batch) -> Batch:
        x = batch.tokens[name].clone()
        x[at] = value
        return Batch(batch.forest, batch.tokens | {name: x}, batch.branches, batch.counts)

    return change


def train(directory, bad=(), change=None, *, hooks=(), reward=score, dtype=torch.float64, updates=1, **run):
    """Reinforcement learning without a critic whose batches of ``steps`` are changed."""
    models = {"policy": role(0, dtype=dtype)}
    source = rollouts(models["policy"], role(0, trained=False, dtype=dtype), None, updates=updates, reward=reward)
    objective = PolicyGradient(critic=False, ratio_tolerance=0.1)
    to = run_in(directory, **({"steps": 4} | run))
    fit(models, objective, Changed(source, bad, change), optim=OPTIM, run=to, hooks=hooks)
    return models, objective, to.console.file.getvalue()


def snapshots(models_of):
    """A hook that keeps the weights after each step."""
    kept = []
    return kept, lambda step, _: kept.append(weights(models_of()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_step_is_skipped_and_nothing_moves(tmp_path, dtype, bad):
    """Weights, masters and moments after a skipped step are bit for bit those before; the run goes on."""
    models, _, printed = train(tmp_path, (1,), column("advantage", bad, 2), dtype=dtype, save_every=1, keep=9)
    before, after, last = (
        load_file(tmp_path / "checkpoints" / f"step-{k:08d}" / "tensors.safetensors") for k in (1, 2, 3)
    )
    assert equal(before, after) and not equal(after, last)
    lines = metrics(tmp_path)
    assert [line["step/skipped"] for line in lines] == [0, 1, 0, 0]
    assert "loss/total" not in lines[1] and lines[1]["kl/mean"] == pytest.approx(lines[1]["kl/mean"])
    assert f"batch advantage is {bad} at entry 2" in printed and "weights are unchanged" in printed
    assert "posttrain replay" in printed and all(bool(p.isfinite().all()) for p in weights(models).values())


def test_the_schedule_goes_by_step_and_the_count_of_updates_does_not(tmp_path):
    """The learning rate at step 2 is that of step 2; AdamW has made one update fewer."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(whole), train(cut, (1,), column("advantage", math.nan))
    assert metrics(whole)[2]["optim/lr"] == metrics(cut)[2]["optim/lr"] == 0.01
    counts = {}
    for run in (whole, cut):
        tensors = load_file(run / "checkpoints" / "step-00000004" / "tensors.safetensors")
        counts[run.name] = {float(x) for k, x in tensors.items() if k.startswith("policy/step/")}
    assert counts == {"whole": {4.0}, "cut": {3.0}}


def test_a_log_probability_that_a_clamp_would_hide(tmp_path):
    """exp(clamp(-inf)) is a number, so that the loss alone would not show it."""
    _, _, printed = train(tmp_path, (1,), column("old_logp", -math.inf, 1))
    assert "batch old_logp is -inf at entry 1" in printed


def test_a_gradient_that_overflows(tmp_path):
    """The loss is a number, its gradient is not."""
    _, _, printed = train(tmp_path, (1,), column("advantage", 3e38, 0), dtype=torch.float32)
    assert "gradient " in printed and [line["step/skipped"] for line in metrics(tmp_path)] == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("change", "dtype", "said"),
    [
        (column("advantage", math.nan, 2), torch.float64, "batch advantage is nan at entry"),
        (column("advantage", 3e38, 0), torch.float32, "gradient "),
    ],
)
def test_a_dump_replays(tmp_path, change, dtype, said):
    """With other roles of the same shape: weights come from the dump."""
    train(tmp_path, (2,), change, dtype=dtype)
    dump = tmp_path / "faults" / "step-00000002"
    models, objective = {"policy": role(5, dtype=dtype)}, PolicyGradient(critic=False)
    found = replay(dump, models, objective, partial(_stats, models, objective))
    assert found.startswith(said) and found.endswith(", as then")
    kept = load_file(dump / "weights.safetensors")
    assert equal(weights(models), kept) and read_batch(dump).forest.trees
    with pytest.raises(ModelError, match="is of another model"):
        replay(dump, {"policy": role(5, scalar=True, dtype=dtype)}, objective, partial(_stats, models, objective))
    (dump / "fault.json").write_text("{}")
    with pytest.raises(ModelError, match="is no dump of a skipped step"):
        read_fault(dump)


def test_a_weight_that_is_not_finite_is_named_first(tmp_path):
    """A hook breaks a weight after step 0; every later step is skipped until the run ends."""
    models = {"policy": role(0)}
    name = "model.layers.1.mlp.up_proj.weight"

    def break_it(step, _):
        dict(models["policy"].net.named_parameters())[name].data[0, 0] = math.nan

    source = demonstration_source(ROWS, per_step=2, seed=7)
    run = run_in(tmp_path, steps=6)
    with pytest.raises(TooManySkipped, match="3 steps in a row were skipped, the last is step 3"):
        fit(models, Supervised(), source, optim=OPTIM, run=run, hooks=[break_it])
    assert run.console.file.getvalue().count(f"weight policy/{name} is nan at entry 0") == 3


def test_a_score_that_is_no_number_is_kept_and_replayed(tmp_path):
    calls = []

    def reward(completions):
        calls.append(len(completions))
        return [Score(math.nan) if len(calls) == 2 and i == 3 else s for i, s in enumerate(score(completions))]

    _, _, printed = train(tmp_path, reward=reward)
    assert [line["step/skipped"] for line in metrics(tmp_path)] == [0, 1, 0, 0]
    assert "step 1 is skipped, weights are unchanged: the reward gave nan for" in printed
    dump = tmp_path / "faults" / "step-00000001"
    fault = read_fault(dump)
    assert [row["score"] for row in fault["completions"]].count("nan") == 1 and fault["completions"][3][
        "score"
    ] == "nan"
    with pytest.raises(Replayed, match="all scores are finite now; then: the reward gave nan"), replaying(dump):
        train(tmp_path / "again")
    calls[:] = [0]
    with pytest.raises(Replayed, match=r"the reward gave nan for .*, as then"), replaying(dump):
        train(tmp_path / "again", reward=reward)
    assert not (tmp_path / "again" / "metrics.jsonl").exists()


def test_two_updates_on_a_rollout_that_has_no_scores_are_both_skipped(tmp_path):
    seen = []

    def reward(completions):
        seen.append(1)
        return score(completions) if len(seen) == 1 else [Score(math.nan)] * len(completions)

    train(tmp_path, reward=reward, updates=2, max_bad_steps=9)
    assert [line["step/skipped"] for line in metrics(tmp_path)] == [0, 0, 1, 1]


def test_too_many_in_a_row_end_the_run_with_a_checkpoint(tmp_path):
    """Of the weights before the first of them; continued, the count goes on where it stood."""
    kept = []
    change = column("advantage", math.nan)
    with pytest.raises(TooManySkipped) as caught:
        train(tmp_path, (2, 3, 4), change, steps=9, save_every=99, hooks=[lambda step, _: kept.append(step)])
    assert str(caught.value) == (
        "train: 3 steps in a row were skipped, the last is step 4 (batch advantage is nan at entry 0 (1 of "
        f"{_entries(caught)} are not finite)); the weights are those before the first of them; look at {tmp_path / 'faults'} with "
        "posttrain replay"
    )
    assert kept == [0, 1, 2, 3]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]
    dumped = sorted(p.name for p in (tmp_path / "faults").iterdir())
    assert dumped == [f"step-{k:08d}" for k in (2, 3, 4)]
    assert [read_fault(tmp_path / "faults" / name)["weights"] for name in dumped] == [dumped[0]] * 3
    assert not (tmp_path / "faults" / dumped[1] / "weights.safetensors").exists()
    with pytest.raises(TooManySkipped, match="3 steps in a row were skipped, the last is step 4"):
        train(tmp_path, (4,), change, steps=9)
    _, _, printed = train(tmp_path, steps=6)
    assert "continuing after step 4 of 6" in printed and [m["step/skipped"] for m in metrics(tmp_path)] == [
        0,
        0,
        1,
        1,
        0,
        0,
    ]


def _entries(caught):
    return str(caught.value).split(" of ")[1].split(" ")[0]


def test_a_run_that_ends_in_the_middle_of_a_rollout_knows_which_it_needs(tmp_path):
    """Nothing journals here, so that the checkpoint of the end can't be used, and says so."""
    change = column("advantage", math.nan)
    with pytest.raises(TooManySkipped):
        train(tmp_path, (3,), change, updates=2, max_bad_steps=1, save_every=99)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    _, _, printed = train(tmp_path, updates=2)
    assert "can't be used: the rollout begun at step 2 is not in the journal (nowhere) as it was used" in printed
    assert [line["step/skipped"] for line in metrics(tmp_path)] == [0, 0, 0, 0]


def test_a_checkpoint_that_is_there_is_not_written_anew_at_the_end(tmp_path):
    """While one takes the other's place there is none."""
    place, seen = tmp_path / "checkpoints" / "step-00000002", []

    def change(batch):
        while not place.exists():
            time.sleep(0.01)
        seen.append(place.stat().st_ino)
        return column("advantage", math.nan)(batch)

    with pytest.raises(TooManySkipped):
        train(tmp_path, (2,), change, max_bad_steps=1, save_every=2)
    assert seen == [place.stat().st_ino]


def test_weights_that_are_not_finite_at_the_start_are_named(tmp_path):
    models = {"policy": role(0)}
    name = "model.layers.1.mlp.up_proj.weight"
    dict(models["policy"].net.named_parameters())[name].data[0, 0] = math.inf
    source = demonstration_source(ROWS, per_step=2, seed=7)
    said = rf"nothing was trained: numbers finite: got weight policy/{name} is inf at entry 0 .*, expected all finite$"
    with pytest.raises(CheckError, match=said):
        fit(models, Supervised(), source, optim=OPTIM, run=run_in(tmp_path))


def test_weights_that_are_not_finite_later_are_skipped_by_a_run_that_goes_on_too(tmp_path):
    def run(directory, hooks):
        models = {"policy": role(0)}

        def break_it(step, _):
            if step == 0:
                next(iter(models["policy"].parameters().values())).data[0, 0] = math.nan

        source = demonstration_source(ROWS, per_step=2, seed=7)
        fit(models, Supervised(), source, optim=OPTIM, run=run_in(directory, save_every=1), hooks=[break_it, *hooks])

    class Killed(Exception):
        pass

    def kill(step, _):
        if step == 2:
            raise Killed

    with pytest.raises(TooManySkipped, match="the last is step 3"):
        run(tmp_path / "whole", [])
    with pytest.raises(Killed):
        run(tmp_path / "cut", [kill])
    with pytest.raises(TooManySkipped, match="the last is step 3"):
        run(tmp_path / "cut", [])
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def over_limit(directory, history):
    """A watch that has seen ``history`` (KL by step) ends a run at the last of it."""
    watch = Watch(directory, Console(file=StringIO()), 1.0)
    row = {"truncated/share": 0.0, "length/mean": 9.0, "length/p95": 9.0, "policy/entropy": 1.0}
    with pytest.raises(KLLimit) as caught, watch:
        for step, kl in history.items():
            watch(step, row | {"kl/mean": kl})
    return str(caught.value)


def test_checkpoints_above_the_limit_are_set_aside_each_time(tmp_path):
    for _ in range(2):  # the second time, those of the first are in the way
        for step in (2, 3, 4):
            save_checkpoint(tmp_path / "checkpoints", step, {}, "{}")
        assert "Stopped; checkpoints up to step 2 are kept" in over_limit(tmp_path, {0: 0.1, 2: 0.5, 4: 3.0})
        assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
            "over-limit-step-00000003", "over-limit-step-00000004", "step-00000002",
        ]  # fmt: skip


def test_only_the_rank_that_writes_sets_checkpoints_aside(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "checkpoints", 4, {}, "{}")
    monkeypatch.setattr(distributed, "_CURRENT", [distributed.World(1, 2)])
    over_limit(tmp_path, {0: 0.1, 4: 3.0})
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]


def test_single_bad_steps_never_end_a_run(tmp_path):
    train(tmp_path, (1, 2, 4, 5), column("advantage", math.nan), steps=7)
    assert [line["step/skipped"] for line in metrics(tmp_path)] == [0, 1, 1, 0, 1, 1, 0]


def test_a_run_that_goes_on_counts_what_it_skipped_before(tmp_path):
    class Killed(Exception):
        pass

    def kill(step, _):
        if step == 2:
            raise Killed

    change = column("advantage", math.nan)
    with pytest.raises(Killed):
        train(tmp_path, (1, 2, 3), change, hooks=[kill], save_every=1)
    with pytest.raises(TooManySkipped, match="3 steps in a row were skipped, the last is step 3"):
        train(tmp_path, (1, 2, 3), change, save_every=1)
    assert (
        json.loads((tmp_path / "faults" / "step-00000003" / "fault.json").read_text())["finding"]["name"] == "advantage"
    )
