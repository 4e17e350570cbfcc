"""A run that is killed and continued ends bit for bit where an uninterrupted one does."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import time

import numpy as np
import pytest
import torch

from posttrain.errors import CheckError
from posttrain.forest import Branch, Row
from posttrain.rewards.base import Score
from posttrain.train.checkpoint import Unusable, read_checkpoint
from posttrain.train.guard import TooManySkipped
from posttrain.train.journal import Journal
from posttrain.train.log import JsonLines
from posttrain.train.loop import fit
from posttrain.train.objectives import PolicyGradient, Supervised
from posttrain.train.optim import Optim
from posttrain.train.signals import Terminated, sigterm_interrupts
from posttrain.train.sources import demonstration_source, shuffled
from posttrain.train.state import machine
from posttrain.train.streams import random_streams, restore_streams

from .tiny import equal, metrics, random_rows, role, rollouts, run_in, score, weights

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


def reinforce(directory, dtype=torch.float32, hooks=(), seed=0, reward=score, journal=True, updates=2):
    models = {"policy": role(seed, dtype=dtype), "value": role(1, scalar=True, dtype=dtype)}
    reference = role(0, trained=False, dtype=dtype)
    samples: list = []
    kept = Journal(directory / "journal") if journal else None
    on_samples = lambda *x: samples.append(x)  # noqa: E731
    source = rollouts(
        models["policy"],
        reference,
        models["value"],
        on_samples=on_samples,
        journal=kept,
        reward=reward,
        updates=updates,
    )
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


@pytest.mark.parametrize("killed", [1, 2, 3, 5])
def test_reinforcement(tmp_path, killed):
    """Two updates on each rollout: a run goes on between them, with the rollout's own samples, scores and values."""
    expected, _, samples = reinforce(tmp_path / "whole")
    with pytest.raises(Killed):
        reinforce(tmp_path / "cut", hooks=[kill_at(killed)])
    models, printed, again = reinforce(tmp_path / "cut", seed=5)
    assert f"continuing after step {killed} of 6" in printed and "can't be used" not in printed
    assert again == [s for s in samples if s[0] >= killed]
    assert equal(weights(models), weights(expected))
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


@pytest.mark.parametrize("lost", ["no journal", "a byte", "the file"])
def test_without_its_journal_a_run_goes_on_from_between_rollouts(tmp_path, lost):
    expected, _, _ = reinforce(tmp_path / "whole", journal=False)
    with pytest.raises(Killed):
        reinforce(tmp_path / "cut", hooks=[kill_at(3)], journal=lost != "no journal")
    path = tmp_path / "cut" / "journal" / "step-00000002.jsonl"
    if lost == "a byte":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif lost == "the file":
        path.unlink()
    models, printed, _ = reinforce(tmp_path / "cut", seed=5, journal=lost != "no journal")
    place = "nowhere" if lost == "no journal" else path
    fault = f"can't be used: the rollout begun at step 2 is not in the journal ({place}) as it was used"
    assert fault in printed and "using the one of step 2" in printed and "continuing after step 2 of 6" in printed
    assert equal(weights(models), weights(expected)) and metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def dice(completions):
    """A reward that draws from the three global streams, as a careless one may."""
    return [Score(random.random() + float(np.random.rand()) + float(torch.rand(()))) for _ in completions]


@pytest.mark.parametrize("killed", [2, 3])
def test_a_reward_with_dice_is_not_asked_twice_and_its_dice_fall_as_they_would_have(tmp_path, killed):
    def seeded(value):
        random.seed(value), np.random.seed(value), torch.manual_seed(value)

    seeded(1)
    expected, _, _ = reinforce(tmp_path / "whole", reward=dice)
    seeded(1)

    def scored(completions):
        found = dice(completions)
        asked.append(len(asked))
        if len(asked) == 3:
            raise Killed
        return found

    asked: list[int] = []
    if killed == 2:  # in the reward of the third rollout: two rollouts were used, the third is sampled and not scored
        with pytest.raises(Killed):
            reinforce(tmp_path / "cut", reward=scored)
        start = 4
    else:
        with pytest.raises(Killed):
            reinforce(tmp_path / "cut", reward=dice, hooks=[kill_at(3)])
        start = 3
    seeded(2)
    models, printed, _ = reinforce(tmp_path / "cut", seed=5, reward=dice)
    assert f"continuing after step {start} of 6" in printed
    assert equal(weights(models), weights(expected)) and metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_streams_are_restored():
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    random.gauss(0, 1), np.random.randn(), torch.randn(3)  # each leaves half a pair behind
    kept = json.loads(json.dumps(random_streams()))
    one = [random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand(), torch.randn(5).tolist()]
    restore_streams(kept)
    assert one == [random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand(), torch.randn(5).tolist()]


def no_number(completions):
    return [Score(math.nan), *score(completions)[1:]]


class Scripted:
    """A reward that follows a list of rewards, and then is the last of them."""

    def __init__(self, *parts):
        self.parts, self.asked = list(parts), 0

    def __call__(self, completions):
        self.asked += 1
        part = self.parts.pop(0) if len(self.parts) > 1 else self.parts[0]
        return part(completions)


@pytest.mark.parametrize("killed", [2, 3])
def test_a_score_that_was_no_number_is_not_asked_for_again(tmp_path, killed):
    """Asked a second time, such a reward may well give one, and the step would not be skipped any more."""
    flaky = lambda: Scripted(score, no_number, score)  # noqa: E731
    expected, _, samples = reinforce(tmp_path / "whole", reward=flaky())
    assert [line["step/skipped"] for line in metrics(tmp_path / "whole")] == [0, 0, 1, 1, 0, 0]
    with pytest.raises(Killed):
        reinforce(tmp_path / "cut", reward=flaky(), hooks=[kill_at(killed)])
    mended = Scripted(score)
    models, printed, again = reinforce(tmp_path / "cut", seed=5, reward=mended)
    assert f"continuing after step {killed} of 6" in printed and mended.asked == 1
    assert again == [s for s in samples if s[0] >= killed]
    assert equal(weights(models), weights(expected)) and metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


@pytest.mark.parametrize(("updates", "last", "asked"), [(2, 4, 1), (3, 5, 1)])
def test_a_run_that_its_reward_ended_goes_on_once_the_reward_is_mended(tmp_path, updates, last, asked):
    """The rollout is the journalled one; only its scores are asked for again."""
    with pytest.raises(TooManySkipped, match=f"the last is step {last} "):
        reinforce(tmp_path, reward=Scripted(score, no_number), updates=updates)
    mended = Scripted(score)
    _, printed, samples = reinforce(tmp_path, reward=mended, updates=updates)
    assert f"continuing after step {last} of 6" in printed and mended.asked == asked
    assert [line["step/skipped"] for line in metrics(tmp_path)] == [0] * (last - 2) + [1, 1] + [0] * (6 - last)
    assert [step for step, _ in samples] == [last - last % updates]  # those samples are recorded now


class Drifting:
    """An objective whose loss depends on how often it was asked."""

    def __init__(self, inner=None, name="loss/nll"):
        self.inner, self.name, self.asked = inner or Supervised(), name, 0

    def __call__(self, stats, batch):
        self.asked += 1
        terms = self.inner(stats, batch)
        term = terms[self.name]
        return {self.name: type(term)(term.sum * (1 + self.asked / 10), term.unit)}

    def state(self):
        return {"asked": self.asked}

    def load_state(self, state):
        self.asked = state["asked"]

    def __getattr__(self, name):
        return getattr(self.inner, name)


def test_the_state_of_an_objective_is_kept(tmp_path):
    def run(directory, hooks=()):
        models = {"policy": role(0, dtype=torch.float32)}
        source = demonstration_source(random_rows(1, [(3, [4]), (2, [6]), (5, [3])]), per_step=2, seed=7)
        fit(models, Drifting(), source, optim=OPTIM, run=run_in(directory), hooks=hooks)
        return weights(models)

    expected = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "cut", [kill_at(4)])
    assert equal(run(tmp_path / "cut"), expected) and metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    last = read_checkpoint(tmp_path / "cut" / "checkpoints" / "step-00000006")
    assert last.state["objective"]["asked"] >= 6 and set(last.state) == {
        "format", "source", "objective", "streams", "metrics", "machine", "dtypes",
    }  # fmt: skip
    assert last.state["metrics"] == (tmp_path / "cut" / "metrics.jsonl").stat().st_size


def test_neither_the_first_checks_nor_a_skipped_step_move_an_objective(tmp_path):
    """They ask it too: before the first step of a run that goes on, and to find what is not finite."""

    def run(directory, hooks=()):
        models, objective = {"policy": role(0)}, Drifting(PolicyGradient(critic=False), "loss/policy")
        reward = Scripted(score, no_number, score)
        journal = Journal(directory / "journal")
        source = rollouts(models["policy"], role(0, trained=False), None, updates=1, reward=reward, journal=journal)
        fit(models, objective, source, optim=OPTIM, run=run_in(directory, save_every=1), hooks=hooks)
        return weights(models)

    expected = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "cut", [kill_at(4)])
    asked = [
        read_checkpoint(tmp_path / "cut" / "checkpoints" / f"step-0000000{k}").state["objective"]["asked"]
        for k in (3, 4)
    ]
    assert asked[1] > asked[0] > 0
    assert equal(run(tmp_path / "cut"), expected) and metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_rows_that_come_later_do_not_refuse_a_run_that_goes_on(tmp_path):
    """Some rows train no stop token; a run that began with others trains on them, interrupted or not."""
    rows = [Row([5, 6], [Branch([7, 8, 9], {"loss": [True, True, last]})]) for last in (False, True, True, True)]

    def run(directory, hooks=()):
        models = {"policy": role(0)}
        source = demonstration_source(rows, per_step=1, seed=7)
        assert [bool(source(k).forest.masks["loss"][-1]) for k in range(4)] == [True, True, False, True]
        fit(models, Supervised(), source, optim=OPTIM, run=run_in(directory, steps=4), hooks=hooks)
        return weights(models)

    expected = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "cut", [kill_at(2)])
    assert equal(run(tmp_path / "cut"), expected)


def test_another_machine_is_announced(tmp_path, monkeypatch):
    with pytest.raises(Killed):
        supervised(tmp_path, torch.float32, [kill_at(4)])
    threads = machine()["threads"]
    torch.set_num_threads(threads + 1)
    try:
        _, printed = supervised(tmp_path, torch.float32)
    finally:
        torch.set_num_threads(threads)
    assert f"threads was {threads}, is {threads + 1}: the last bits of results may differ" in printed


def test_another_dtype_is_announced(tmp_path):
    """Where ``auto`` chose, a resume on another processor may choose otherwise."""
    with pytest.raises(Killed):
        supervised(tmp_path, torch.bfloat16, [kill_at(4)])
    _, printed = supervised(tmp_path, torch.float32)
    line = "train: the policy was trained in bfloat16 and is in float32 now; the run goes on, not as it would have"
    assert line in printed


# ---------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_after_its_step_is_saved(tmp_path, capfd, number):
    expected, _ = supervised(tmp_path / "whole", torch.float32)
    before = signal.getsignal(number)
    kind = Terminated if number == signal.SIGTERM else KeyboardInterrupt
    hook = lambda step, _: signal.raise_signal(number) if step == 2 else None  # noqa: E731
    with sigterm_interrupts(), pytest.raises(kind):
        supervised(tmp_path / "cut", torch.float32, [hook])
    assert signal.getsignal(number) is before
    notice = "posttrain: finishing and saving this step; a second signal leaves at once"
    assert capfd.readouterr().err.strip() == notice
    names = sorted(p.name for p in (tmp_path / "cut" / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000003"] and len(metrics(tmp_path / "cut")) == 3
    models, printed = supervised(tmp_path / "cut", torch.float32, seed=5)
    assert "continuing after step 3 of 7" in printed
    assert equal(weights(models), weights(expected)) and metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_a_signal_after_the_last_step_waits_for_the_last_checkpoint(tmp_path, monkeypatch, capfd):
    """It comes while that one is being written."""
    slow = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (time.sleep(0.05), slow(handle)))

    class Signals:
        def __init__(self, source):
            self.source = source

        def state(self, step):
            if step == 7:
                signal.raise_signal(signal.SIGINT)
            return self.source.state(step)

        def __call__(self, step):
            return self.source(step)

        def __getattr__(self, name):
            return getattr(self.source, name)

    source = Signals(demonstration_source(random_rows(1, [(3, [4]), (2, [6])]), per_step=2, seed=7))
    with pytest.raises(KeyboardInterrupt):
        fit({"policy": role(0)}, Supervised(), source, optim=OPTIM, run=run_in(tmp_path, steps=7))
    assert "finishing and saving this step" in capfd.readouterr().err
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir())[-1] == "step-00000007"


def test_a_second_signal_leaves_at_once(tmp_path):
    before, after = signal.getsignal(signal.SIGINT), []

    def hook(step, _):
        if step == 2:
            while not (tmp_path / "checkpoints" / "step-00000002").exists():
                time.sleep(0.01)
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            after.append(step)

    with pytest.raises(KeyboardInterrupt):
        supervised(tmp_path, torch.float32, [hook])
    assert not after and signal.getsignal(signal.SIGINT) is before
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    _, printed = supervised(tmp_path, torch.float32)
    assert "continuing after step 2 of 7" in printed


def test_an_ignored_signal_stays_ignored(tmp_path):
    """As under nohup, or in a shell's background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        supervised(tmp_path, torch.float32, [lambda step, _: signal.raise_signal(signal.SIGINT)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(metrics(tmp_path)) == 7


# ---------------------------------------------------------------------------- journal


def test_what_is_journalled_is_made_once(tmp_path):
    made = []

    def make():
        made.append(1)
        return [(1, 0.1), (2, float("-inf"))]

    one = Journal(tmp_path / "j").once(4, "a", make)
    again = Journal(tmp_path / "j").once(4, "a", make)
    assert [tuple(x) for x in again] == one and len(made) == 1
    Journal(tmp_path / "j").once(4, "b", make), Journal(tmp_path / "j").once(5, "a", make)
    assert len(made) == 3 and sorted(p.name for p in (tmp_path / "j").iterdir()) == [
        "step-00000004.jsonl",
        "step-00000005.jsonl",
    ]
    Journal(tmp_path / "j").forget(5)
    assert [p.name for p in (tmp_path / "j").iterdir()] == ["step-00000005.jsonl"]


def test_a_line_cut_anywhere_is_made_again(tmp_path):
    journal = Journal(tmp_path)
    journal.once(0, "a", lambda: ["zwölf", 1 / 3])
    path = tmp_path / "step-00000000.jsonl"
    first = path.read_bytes()
    journal.once(0, "b", lambda: [2])
    whole, state = path.read_bytes(), journal.state(0)
    journal.require(state)
    for end in range(len(first), len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(Unusable, match="the rollout begun at step 0 is not in the journal"):
            journal.require(state)
        assert Journal(tmp_path).once(0, "a", lambda: None) == ["zwölf", 1 / 3]
        assert Journal(tmp_path).once(0, "b", lambda: [2]) == [2] and path.read_bytes() == whole


def test_every_damaged_byte_of_a_journal_is_found(tmp_path):
    journal = Journal(tmp_path)
    journal.once(0, "a", lambda: [1, 2])
    state, path = journal.state(0), tmp_path / "step-00000000.jsonl"
    good = path.read_bytes()
    for at in range(len(good)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
        with pytest.raises(Unusable):
            journal.require(state)


# ---------------------------------------------------------------------------- the rest


def test_a_finished_run_is_not_run_again(tmp_path):
    expected, _ = supervised(tmp_path, torch.float32)
    lines = (tmp_path / "metrics.jsonl").read_text()
    models, _ = supervised(tmp_path, torch.float32, [kill_at(0)], seed=5)
    assert equal(weights(models), weights(expected)) and (tmp_path / "metrics.jsonl").read_text() == lines


def test_fewer_steps_than_were_made_are_refused(tmp_path):
    """Weights that were trained for longer than asked would pass for the shorter run's."""
    with pytest.raises(Killed):
        supervised(tmp_path, torch.float32, [kill_at(5)])
    source = demonstration_source(random_rows(1, [(3, [4]), (2, [6])]), per_step=2, seed=7)
    with pytest.raises(CheckError) as caught:
        fit({"policy": role(0)}, Supervised(), source, optim=OPTIM, run=run_in(tmp_path, steps=3))
    assert str(caught.value) == (
        "train: the newest checkpoint has made 4 steps, the run now asks for 3; ask for at least as many, or start again: in "
        "another directory, or with --restart-changed"
    )
    assert len(metrics(tmp_path)) == 6  # nothing was touched


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
        log.write(step, {"completion": odd}, {"completion": "zwölf"})
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
