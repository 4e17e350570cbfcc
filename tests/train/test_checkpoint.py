"""Checkpoints: whole or not at all, damage is found, nothing is pickled."""

from __future__ import annotations

import json

import pytest
import torch

from posttrain.errors import CheckError
from posttrain.train import checkpoint
from posttrain.train.checkpoint import load_checkpoint, save_checkpoint
from posttrain.train.log import METRICS, MetricsLog
from posttrain.train.loop import fit
from posttrain.train.objectives import Supervised
from posttrain.train.optim import Optim
from posttrain.train.sources import demonstration_source

from .tiny import equal, metrics, random_rows, role, run_in, weights


def flip(path, at=-1):
    """Invert the lowest bit of one byte."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def saved(directory, *steps):
    for step in steps:
        save_checkpoint(directory, step, {"w": torch.full((3,), float(step))}, {"source": None})


def test_the_newest_is_loaded_and_the_two_newest_are_kept(tmp_path):
    saved(tmp_path, 2, 4, 10)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000004", "step-00000010"]
    files = sorted(p.name for p in (tmp_path / "step-00000010").iterdir())
    assert files == ["manifest.json", "state.json", "tensors.safetensors"]
    step, tensors, state, faults = load_checkpoint(tmp_path)
    assert (step, tensors["w"].tolist(), state, faults) == (10, [10.0] * 3, {"source": None}, [])


def test_no_checkpoint(tmp_path):
    assert load_checkpoint(tmp_path) is None and load_checkpoint(tmp_path / "missing") is None


def test_what_a_killed_process_left_is_not_read(tmp_path):
    saved(tmp_path, 2)
    left = tmp_path / ".step-00000004.123.tmp"
    left.mkdir()
    (left / "tensors.safetensors").write_bytes(b"half")
    assert load_checkpoint(tmp_path)[0] == 2


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
def test_a_flipped_bit_is_found(tmp_path, name):
    saved(tmp_path, 2, 4)
    flip(tmp_path / "step-00000004" / name)
    step, tensors, _, faults = load_checkpoint(tmp_path)
    assert step == 2 and tensors["w"].tolist() == [2.0] * 3
    (fault,) = faults
    assert "step-00000004 is damaged" in fault and f"{name} does not match its checksum" in fault


def test_every_flipped_bit_of_the_manifest_is_found(tmp_path):
    saved(tmp_path, 2, 4)
    path = tmp_path / "step-00000004" / "manifest.json"
    good = path.read_bytes()
    for at in range(len(good)):
        path.write_bytes(good)
        flip(path, at)
        assert load_checkpoint(tmp_path)[0] == 2, path.read_bytes()


def test_a_missing_file_is_found(tmp_path):
    saved(tmp_path, 2, 4)
    (tmp_path / "step-00000004" / "state.json").unlink()
    assert load_checkpoint(tmp_path)[0] == 2


def train(directory, steps=6):
    models = {"policy": role(0, dtype=torch.float32)}
    source = demonstration_source(random_rows(1, [(3, [4]), (2, [6]), (5, [3])]), per_step=2, seed=7)
    run = run_in(directory, steps=steps)
    fit(models, Supervised(), source, optim=Optim(lr=0.01), run=run)
    return models, run.console.file.getvalue()


@pytest.mark.parametrize(("damaged", "start"), [((6,), 4), ((4, 6), 0)])
def test_a_run_goes_on_from_an_older_one_and_ends_the_same(tmp_path, damaged, start):
    expected, _ = train(tmp_path)
    lines = metrics(tmp_path)
    for step in damaged:
        flip(tmp_path / "checkpoints" / f"step-{step:08d}" / "tensors.safetensors")
    models, printed = train(tmp_path)
    assert printed.count("is damaged") == len(damaged)
    assert (f"continuing after step {start} of 6" in printed) is (start > 0)
    assert equal(weights(models), weights(expected)) and metrics(tmp_path) == lines


@pytest.mark.parametrize("broken", ["save_file", "_fsync"])
def test_a_full_disk_leaves_the_last_checkpoint_and_nothing_half_written(tmp_path, monkeypatch, broken):
    """The second of three checkpoints fails: while its tensors are written, or while it is forced to disk."""
    expected, _ = train(tmp_path / "whole")
    works, calls = getattr(checkpoint, broken), []

    def fails(*args, **kwargs):
        calls.append(args)
        if len(calls) > (1 if broken == "save_file" else 5 + 2):
            raise OSError(28, "No space left on device")
        return works(*args, **kwargs)

    monkeypatch.setattr(checkpoint, broken, fails)
    with pytest.raises(OSError, match="No space left on device"):
        train(tmp_path / "cut")
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-00000002"]
    models, printed = train(tmp_path / "cut")
    assert "continuing after step 2 of 6" in printed and "damaged" not in printed
    assert equal(weights(models), weights(expected)) and metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_only_safetensors_and_json_are_written(tmp_path):
    train(tmp_path)
    files = [p for p in tmp_path.rglob("*") if p.is_file() and "tensorboard" not in p.parts]
    assert {p.suffix for p in files} == {".safetensors", ".json", ".jsonl"} and len(files) == 7


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
    assert timed == {"speed/tokens", "time/step", "time/generate", "time/score", "memory/peak"}
