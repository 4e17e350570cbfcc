"""Checkpoints: whole or not at all, every damaged byte is found, a full disk loses nothing, nothing is pickled."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from posttrain.errors import CheckError
from posttrain.train import saver as saving
from posttrain.train.checkpoint import (
    Unusable,
    checkpoint_paths,
    newest_checkpoint,
    read_checkpoint,
    save_checkpoint,
    write_json,
)
from posttrain.train.log import METRICS, MetricsLog
from posttrain.train.loop import fit
from posttrain.train.objectives import Supervised
from posttrain.train.optim import MasterAdamW, Optim
from posttrain.train.saver import Saver
from posttrain.train.sources import demonstration_source

from .tiny import equal, metrics, random_rows, role, run_in, weights

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.tensor(2.5, dtype=torch.bfloat16),
    "step": torch.tensor(3.0, dtype=torch.float64),
    "flags": torch.tensor([True, False]),
    "strided": torch.arange(6).reshape(2, 3).T,
}


def flip(path, at=-1):
    """Invert the lowest bit of one byte."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def saved(directory, *steps):
    for step in steps:
        save_checkpoint(directory, step, {"w": torch.full((3,), float(step))}, '{"source": null}')


def names(directory):
    return sorted(p.name for p in directory.iterdir())


# ---------------------------------------------------------------------------- one checkpoint


def test_what_is_written_is_read_back_and_is_plain_safetensors(tmp_path):
    save_checkpoint(tmp_path, 2, TENSORS, '{"source": [1, "a"]}')
    found = read_checkpoint(tmp_path / "step-00000002")
    assert (found.step, found.state) == (2, {"source": [1, "a"]})
    for tensors in (found.tensors, load_file(tmp_path / "step-00000002" / "tensors.safetensors")):
        assert equal(tensors, TENSORS) and all(tensors[k].dtype == TENSORS[k].dtype for k in TENSORS)
    assert names(tmp_path / "step-00000002") == ["manifest.json", "state.json", "tensors.safetensors"]
    manifest = json.loads((tmp_path / "step-00000002" / "manifest.json").read_text())
    assert set(manifest) == {"step", "files", "value", "sha256"}
    assert manifest["files"]["state.json"]["bytes"] == len('{"source": [1, "a"]}')


def test_the_newest_is_used(tmp_path):
    saved(tmp_path, 2, 10, 4)
    found, faults = newest_checkpoint(tmp_path)
    assert (found.step, found.tensors["w"].tolist(), faults) == (10, [10.0] * 3, [])


def test_no_checkpoint(tmp_path):
    assert newest_checkpoint(tmp_path) == newest_checkpoint(tmp_path / "missing") == (None, [])


def test_times_of_files_decide_nothing(tmp_path):
    """The clock was set back, or far ahead, between two saves."""
    saved(tmp_path, 2, 4)
    os.utime(tmp_path / "step-00000004", (0, 0))
    os.utime(tmp_path / "step-00000002", (4e9, 4e9))
    assert newest_checkpoint(tmp_path)[0].step == 4
    saver = Saver(tmp_path, keep=1)
    saver.save(6, {"w": torch.ones(1)}, {}, {})
    saver.join()
    assert names(tmp_path) == ["step-00000006"]


def test_each_fault_is_named_and_so_is_what_is_used_instead(tmp_path):
    saved(tmp_path, 2, 4, 6, 8)
    place = [tmp_path / f"step-{step:08d}" for step in (2, 4, 6, 8)]
    flip(place[3] / "tensors.safetensors")
    (place[2] / "state.json").write_text("{}")
    (place[1] / "state.json").unlink()
    found, faults = newest_checkpoint(tmp_path)
    assert found.step == 2
    assert faults == [
        f"checkpoint {place[3]} can't be used: tensors.safetensors does not match its checksum",
        f"checkpoint {place[2]} can't be used: state.json has 2 bytes, expected 16",
        f"checkpoint {place[1]} can't be used: state.json: No such file or directory",
        "using the one of step 2",
    ]
    flip(place[0] / "manifest.json", 12)
    found, faults = newest_checkpoint(tmp_path)
    assert found is None and faults[-1] == "there is no older one: training starts again from step 0"


def test_one_that_something_else_refuses_is_passed_over(tmp_path):
    saved(tmp_path, 2, 4)

    def accept(found):
        if found.step == 4:
            raise Unusable("its journal is gone")

    found, faults = newest_checkpoint(tmp_path, accept)
    assert found.step == 2
    assert faults == [
        f"checkpoint {tmp_path / 'step-00000004'} can't be used: its journal is gone",
        "using the one of step 2",
    ]


def test_a_renamed_checkpoint_is_refused(tmp_path):
    saved(tmp_path, 2)
    (tmp_path / "step-00000002").rename(tmp_path / "step-00000009")
    with pytest.raises(Unusable, match=r"manifest\.json says step 2"):
        read_checkpoint(tmp_path / "step-00000009")


def damage(path, draw):
    """Change one byte of a file to another, or cut the file."""
    data = bytearray(path.read_bytes())
    at = draw.randrange(len(data))
    if draw.random() < 0.25:
        path.write_bytes(data[:at])
        return f"{path.name} cut at {at}"
    data[at] ^= draw.randrange(1, 256)
    path.write_bytes(data)
    return f"{path.name} byte {at} is {data[at]}"


@pytest.mark.parametrize("trials", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_damages_are_all_found_and_the_newest_good_one_is_used(tmp_path, trials):
    draw = random.Random(0)
    saver = Saver(tmp_path, keep=3)
    for step in (2, 4, 6):
        saver.save(step, {"w": torch.full((5,), float(step)), "m": torch.zeros(2, 3)}, {"source": None}, {})
    saver.join()
    good = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    files = [[path for path in good if path.parent.name == f"step-0000000{step}"] for step in (4, 6)]
    found = 0
    for trial in range(trials):
        both = trial % 4 == 0
        done = [damage(draw.choice(files[1]), draw)] + ([damage(draw.choice(files[0]), draw)] if both else [])
        kept, faults = newest_checkpoint(tmp_path)
        assert kept is not None and kept.step == (2 if both else 4), done
        assert kept.tensors["w"].tolist() == [float(kept.step)] * 5 and len(faults) == 2 + both, done
        found += len(done)
        for path, data in good.items():
            path.write_bytes(data)
    assert found == trials * 5 // 4 and newest_checkpoint(tmp_path)[0].step == 6


def test_every_bit_of_the_manifest_counts(tmp_path):
    saved(tmp_path, 2, 4)
    path = tmp_path / "step-00000004" / "manifest.json"
    good = path.read_bytes()
    for at in range(len(good)):
        for bit in range(8):
            path.write_bytes(good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :])
            with pytest.raises(Unusable):
                read_checkpoint(path.parent)


# ---------------------------------------------------------------------------- the saver


def test_the_newest_and_the_best_are_kept(tmp_path):
    saver = Saver(tmp_path, keep=2, best="-loss/nll", known=list(METRICS))
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 1.5), (5, 1.7)):
        saver.save(step, TENSORS, {}, {"loss/nll": loss})
    saver.join()
    assert names(tmp_path) == ["step-00000002", "step-00000004", "step-00000005"]
    later = Saver(tmp_path, keep=1, best="-loss/nll", known=list(METRICS))  # another process knows it too
    later.save(6, TENSORS, {}, {})
    later.join()
    assert names(tmp_path) == ["step-00000002", "step-00000006"] and later.oldest() == 6
    with pytest.raises(CheckError, match=r"best='loss/nl'; expected .* did you mean 'loss/nll'"):
        Saver(tmp_path, best="loss/nl", known=list(METRICS))
    with pytest.raises(CheckError, match="got keep=0"):
        Saver(tmp_path, keep=0)


def test_ones_that_were_refused_do_not_push_out_good_ones(tmp_path):
    saved(tmp_path, 2, 4, 6, 8)
    for step in (6, 8):
        flip(tmp_path / f"step-{step:08d}" / "state.json")
    saver = Saver(tmp_path, start=4, keep=2)
    assert names(tmp_path) == [f"step-0000000{n}" for n in (2, 4, 6, 8)]  # until there is a new one
    saver.save(6, TENSORS, {}, {})
    saver.join()
    assert names(tmp_path) == ["step-00000004", "step-00000006"] and newest_checkpoint(tmp_path)[0].step == 6


def test_a_save_is_of_the_moment_it_was_asked_for(tmp_path):
    """Weights go on changing while the writer is held up before its first byte."""
    gate, weight = threading.Event(), torch.zeros(1000)
    saver = Saver(tmp_path)
    saver.save(1, {"w": weight}, {}, {}, first=gate.wait)
    saver.settle()
    weight += 1
    assert names(tmp_path) == []
    gate.set()
    saver.save(2, {"w": weight}, {}, {})
    saver.join()
    one, two = (read_checkpoint(tmp_path / f"step-0000000{n}").tensors["w"] for n in (1, 2))
    assert not one.any() and (two == 1).all()


def test_the_copy_of_a_save_goes_into_the_memory_of_the_last(tmp_path):
    saver = Saver(tmp_path)
    places = []
    for step in (1, 2, 3):
        saver.save(step, TENSORS if step < 3 else TENSORS | {"a": torch.zeros(7)}, {}, {})
        saver.join()
        places.append({name: buffer.data_ptr() for name, buffer in saver._buffers.items()})
        assert not set(places[-1].values()) & {t.data_ptr() for t in TENSORS.values()}
    assert places[0] == places[1] and {n for n in TENSORS if places[2][n] != places[0][n]} == {"a"}
    found = read_checkpoint(tmp_path / "step-00000003").tensors
    assert equal(found, TENSORS | {"a": torch.zeros(7)})


def test_an_optimiser_waits_for_the_copy_and_not_for_the_disk(tmp_path, monkeypatch):
    """The copy is held up until the update has begun, the writing until the update is made."""
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer, saver = MasterAdamW({"policy": {"w": weight}}, Optim(lr=1.0)), Saver(tmp_path)
    began, updated, copy = threading.Event(), threading.Event(), np.copyto

    def before_change():
        began.set()
        saver.settle()

    def copy_late(*args):
        assert began.wait(20)
        time.sleep(0.05)
        copy(*args)

    def write_late():
        assert updated.wait(20)

    monkeypatch.setattr(np, "copyto", copy_late)
    optimizer.before_change = before_change
    saver.save(1, optimizer.tensors(), {}, {}, first=write_late)
    weight.grad = torch.ones(3)
    optimizer.step(1.0)
    assert (weight != 0).all() and names(tmp_path) == []
    updated.set()
    saver.join()
    assert not read_checkpoint(tmp_path / "step-00000001").tensors["policy/master/w"].any()
    assert saver.held_up() > 0 and saver.held_up() == 0


def test_what_the_writer_meets_is_raised_at_the_next_step(tmp_path):
    saver = Saver(tmp_path)

    def fails():
        raise OSError(errno.EIO, "Input/output error")

    saver.save(1, TENSORS, {}, {}, first=fails)
    saver._thread.join()
    with pytest.raises(OSError, match="Input/output error"):
        saver.check()
    saver.check()
    with pytest.raises(OSError, match="Input/output error"), Saver(tmp_path) as other:
        other.save(1, TENSORS, {}, {}, first=fails)
    assert names(tmp_path) == []


def test_leaving_at_once_leaves_nothing_half_visible(tmp_path):
    gate = threading.Event()
    with pytest.raises(KeyboardInterrupt), Saver(tmp_path) as saver:
        saver.save(1, TENSORS, {}, {}, first=gate.wait)
        raise KeyboardInterrupt
    gate.set()
    saver._thread.join()
    assert names(tmp_path) == []


def test_leftovers_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path):
    child = subprocess.Popen(["sleep", "60"])
    dead = subprocess.Popen(["true"])
    dead.wait()
    started = Path(f"/proc/{child.pid}/stat").read_text().split()[21]
    owners = [f"{dead.pid}-12", f"{child.pid}-{started}", f"{child.pid}-{int(started) - 1}", f"{os.getpid()}-1"]
    left = [f".step-00000004.0.{owner}.tmp" for owner in owners]  # the third's process number was given again
    for name in left:
        (tmp_path / name).mkdir()
        (tmp_path / name / "tensors.safetensors").write_bytes(b"half")
    assert newest_checkpoint(tmp_path) == (None, [])
    Saver(tmp_path)
    child.kill()
    child.wait()
    assert names(tmp_path) == [left[1]]


def test_json_is_replaced_whole(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1} and names(tmp_path) == ["a.json"]


# ---------------------------------------------------------------------------- whole runs


def test_training_goes_on_while_the_writer_writes(tmp_path, monkeypatch):
    """The disk does not answer the save of step 2 until step 4 is made."""
    on, sync, seen = threading.Event(), os.fsync, []

    def slow(handle):
        if threading.current_thread().name == "checkpoint-2":
            seen.append(on.wait(20))
        sync(handle)

    monkeypatch.setattr(os, "fsync", slow)
    train(tmp_path, steps=4, hooks=[lambda step, _: on.set() if step == 3 else None])
    assert seen and all(seen)
    assert [p.name for p in checkpoint_paths(tmp_path / "checkpoints")] == ["step-00000004", "step-00000002"]
    train(tmp_path / "short", steps=2)
    two, whole = (read_checkpoint(p / "checkpoints" / "step-00000002").tensors for p in (tmp_path / "short", tmp_path))
    assert equal(two, whole)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["time/save"] > 0 for row in rows] == [False, False, True, False]


def train(directory, steps=6, hooks=(), **changes):
    models = {"policy": role(0, dtype=torch.float32)}
    source = demonstration_source(random_rows(1, [(3, [4]), (2, [6]), (5, [3])]), per_step=2, seed=7)
    run = run_in(directory, steps=steps, **changes)
    fit(models, Supervised(), source, optim=Optim(lr=0.01), run=run, hooks=hooks)
    return models, run.console.file.getvalue()


@pytest.mark.parametrize(("damaged", "start"), [((6,), 4), ((4, 6), 0)])
def test_a_run_goes_on_from_an_older_one_and_ends_the_same(tmp_path, damaged, start):
    expected, _ = train(tmp_path)
    lines = metrics(tmp_path)
    for step in damaged:
        flip(tmp_path / "checkpoints" / f"step-{step:08d}" / "tensors.safetensors")
    models, printed = train(tmp_path)
    assert printed.count("can't be used: tensors.safetensors does not match its checksum") == len(damaged)
    assert (f"continuing after step {start} of 6" in printed) is (start > 0)
    assert ("using the one of step 4" in printed) is (start > 0)
    assert ("there is no older one: training starts again from step 0" in printed) is (start == 0)
    assert equal(weights(models), weights(expected)) and metrics(tmp_path) == lines


def test_a_run_that_is_done_says_so(tmp_path):
    train(tmp_path)
    _, printed = train(tmp_path)
    assert "train: all 6 steps are done; nothing is trained" in printed


def test_metrics_that_were_changed_after_the_checkpoint_are_refused(tmp_path):
    train(tmp_path, steps=4)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(CheckError) as caught:
        train(tmp_path, steps=6)
    size = sum(map(len, lines))
    assert str(caught.value) == (
        f"{tmp_path / 'metrics.jsonl'} has {size - len(lines[0])} bytes before step 4, expected {size}; it was changed after "
        "the checkpoint: put it back, or start again in another directory"
    )


class Mount:
    """A small file system of its own, where this process may mount one."""

    def __init__(self, place: Path, options: str):
        self.place = place
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True)
        if done.returncode:
            pytest.skip("mounting is not permitted here")

    def again(self, options: str):
        subprocess.run(["mount", "-o", f"remount,{options}", self.place], check=True)


@pytest.fixture
def disk(tmp_path):
    mount = Mount(tmp_path / "disk", "size=8m")
    yield mount
    subprocess.run(["umount", "--lazy", mount.place], check=True)


def fill(directory, leave):
    """Write a file that leaves so many bytes free."""
    free = shutil.disk_usage(directory).free
    (directory / "filler").write_bytes(bytes(free - leave))


@pytest.mark.parametrize(("leave", "words"), [(900_000, "ahead"), (0, "in the middle")])
def test_a_full_disk_loses_nothing(tmp_path, disk, monkeypatch, leave, words):
    """It fills after the first checkpoint: too full to begin the second, or full although there seemed to be room."""
    expected, _ = train(tmp_path / "whole")
    there = disk.place / "run"

    def hook(step, _):
        if step == 2:
            # the first checkpoint must be on disk before the disk fills
            while not (there / "checkpoints" / "step-00000002").exists():
                time.sleep(0.01)
            fill(disk.place, leave)

    if words == "in the middle":
        monkeypatch.setattr(saving, "require_space", lambda *args: None)
    with pytest.raises(OSError) as caught:
        train(there, hooks=[hook])
    assert caught.value.errno == errno.ENOSPC
    if words == "ahead":
        golden = r"the checkpoint of step 4 needs 1\.\d MB, 0\.9 MB are free"
        assert re.fullmatch(golden, caught.value.strerror), caught.value.strerror
    assert [p.name for p in (there / "checkpoints").iterdir()] == ["step-00000002"]
    (disk.place / "filler").unlink()
    monkeypatch.undo()
    models, printed = train(there)
    assert "continuing after step 2 of 6" in printed and "can't be used" not in printed
    assert equal(weights(models), weights(expected)) and metrics(there) == metrics(tmp_path / "whole")


def test_a_directory_that_turns_read_only_loses_nothing(tmp_path, disk):
    expected, _ = train(tmp_path / "whole")
    there = disk.place / "run"
    train(there, steps=2)
    disk.again("ro")
    with pytest.raises(OSError) as caught:
        train(there)
    assert caught.value.errno == errno.EROFS and str(there) in str(caught.value)
    disk.again("rw")
    models, printed = train(there)
    assert "continuing after step 2 of 6" in printed and "can't be used" not in printed
    assert equal(weights(models), weights(expected)) and metrics(there) == metrics(tmp_path / "whole")


def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
    expected, _ = train(tmp_path / "whole")
    true = time.time

    def jump(step, _):
        monkeypatch.setattr(time, "time", lambda: true() + (-1) ** step * 1e8)
        if step == 4:
            raise KeyError("killed")

    with pytest.raises(KeyError):
        train(tmp_path / "cut", hooks=[jump])
    os.utime(tmp_path / "cut" / "checkpoints" / "step-00000004", (0, 0))
    models, printed = train(tmp_path / "cut", hooks=[lambda step, found: jump(step + 1, found) if step > 4 else None])
    assert "continuing after step 4 of 6" in printed
    assert equal(weights(models), weights(expected)) and metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_only_safetensors_and_json_are_written(tmp_path):
    train(tmp_path)
    files = [p for p in tmp_path.rglob("*") if p.is_file() and "tensorboard" not in p.parts]
    assert {p.suffix for p in files} == {".safetensors", ".json", ".jsonl"} and len(files) == 7
    assert [p.name for p in checkpoint_paths(tmp_path / "checkpoints")] == ["step-00000006", "step-00000004"]


def test_metrics_are_registered_and_finite(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.write(0, {"loss/nll": 1.5})
    with pytest.raises(CheckError, match="metric 'loss/nl' is not registered; did you mean 'loss/nll'"):
        log.write(1, {"loss/nl": 1.0})
    for value in (float("nan"), float("inf")):
        with pytest.raises(CheckError, match=f"metric 'loss/nll' is {value} at step 1; expected a finite number"):
            log.write(1, {"loss/nll": value})
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 0, "loss/nll": 1.5}


def test_every_metric_says_what_it_is():
    assert all(m.unit and m.formula for m in METRICS.values())
    timed = {name for name, m in METRICS.items() if m.wall_clock}
    assert timed == {"speed/tokens", "time/step", "time/save", "time/generate", "time/score", "memory/peak"}
