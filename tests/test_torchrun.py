"""A run started by torchrun: two processes train what one does, and the first alone writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

DATA = ["--model", "small", "--data", "smallworld", "--test", "smallworld", "--limit", "32", "--test-limit", "12"]
OPTIONS = ["run", "dpo", "--tiny", *DATA]


def start(folder, *command):
    env = os.environ | {"OMP_NUM_THREADS": "1", "POSTTRAIN_CACHE": str(folder / "cache")}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path):
    """In fp32 gradients agree to rounding, which AdamW then makes larger; in float64 they agree to 1e-8 (tests/train)."""
    two = start(
        tmp_path, sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "posttrain", *OPTIONS
    )
    assert two.returncode == 0, two.stderr[-3000:]
    one = start(tmp_path, sys.executable, "-m", "posttrain", *OPTIONS, "--name", "one")
    assert one.returncode == 0, one.stderr[-3000:]
    assert two.stdout.count("[1/2] dpo: starts") == 1  # the second process prints nothing
    runs = tmp_path / "runs"
    assert sorted(path.name for path in runs.iterdir()) == ["dpo-tiny", "one"]
    found, expected = (load_file(runs / name / "dpo" / "model.safetensors") for name in ("dpo-tiny", "one"))
    size = sum(x.numel() for x in expected.values())
    assert found.keys() == expected.keys()
    assert sum(float((found[k] - x).abs().sum()) for k, x in expected.items()) / size < 1e-7
    lines = [
        [json.loads(line) for line in (runs / name / "dpo" / "metrics.jsonl").read_text().splitlines()]
        for name in ("dpo-tiny", "one")
    ]
    assert len(lines[0]) == len(lines[1]) == 4
    for mine, theirs in zip(*lines, strict=True):
        for key in ("loss/total", "optim/grad_norm"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4), (mine["step"], key)
    assert json.loads((runs / "dpo-tiny" / "run.json").read_text())["command"].startswith(
        "torchrun --nproc-per-node 2 "
    )
    again = start(
        tmp_path, sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "posttrain", *OPTIONS
    )
    assert again.returncode == 0 and again.stdout.count("nothing was computed") == 1
