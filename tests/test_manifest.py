from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from rich.console import Console

from measured import measured
from posttrain import stages
from posttrain.graph import describe, override
from posttrain.machine import deterministic_kernels
from posttrain.manifest import circumstances, code, git, stage_record
from posttrain.models.small import small_path
from posttrain.runner import Stopped, run_recipe
from posttrain.stages import SFT, Context, Recipe, Stage
from toys import chain


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=100)


def record(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())


def test_a_run_records_what_can_change_its_numbers(tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MY_TOKEN", "secret")
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "rows.jsonl"
    data.write_text("one row\n")
    run = run_recipe(
        measured(str(data)), root=tmp_path, console=console, seed=3, command="posttrain run x", until="tune"
    )
    found = record(run)
    assert found["command"] == "posttrain run x" and (found["seed"], found["tiny"], found["until"]) == (
        3,
        False,
        "tune",
    )
    assert set(found["versions"]) == {"python", "posttrain", "torch", "transformers", "tokenizers", "peft", "numpy"}
    assert found["versions"]["python"] == sys.version.split()[0]
    assert {"cpu", "cores", "threads", "memory", "capability", "flags", "accelerators"} == set(found["hardware"])
    assert found["environment"]["OMP_NUM_THREADS"] == "1" and "MY_TOKEN" not in found["environment"]
    assert found["git"] is None and found["directory"] == str(tmp_path)
    assert {"runner.py", "train/loop.py", "measured"} <= set(found["code"]["files"])
    start, tune = found["stages"]["start"], found["stages"]["tune"]
    assert start["type"] == "measured:Start" and tune["inputs"] == {"model": "start"}
    # sha256 of "one row\n"
    assert start["files"] == [{"path": str(data), "bytes": 8, "hash": "cf4a4bffb81a70e4"}]
    assert tune["config"] == {"beta": 0.1, "effect": 1.0, "steps": 3, "betas": [0.9, 0.99]} and "resolved" not in tune
    assert [one["stages"] for one in found["attempts"]] == [{"start": "start", "tune": "start"}]


def test_the_resolved_configuration_is_kept_beside_the_one_asked_for(tmp_path: Path, console: Console):
    start = record(run_recipe(measured(), root=tmp_path, console=console, tiny=True))["stages"]["start"]
    assert start["config"]["size"] == 4 and start["resolved"]["size"] == 2


def test_a_stages_key_and_record_cover_everything_of_a_model_that_decides_its_numbers(tmp_path: Path):
    model = shutil.copytree(small_path("base"), tmp_path / "model")
    stage = SFT(model=str(model), data="smallworld", epochs=3)
    recipe = Recipe("r", {"sft": stage})

    def keys(tiny: bool = False) -> str:
        return describe(recipe.stages, seed=0, tiny=tiny)["sft"]["key"]

    names = [Path(entry["path"]).name for entry in stage_record(stage, recipe, False)["files"]]
    assert names == [
        "demonstrations.jsonl", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    for name in names[1:]:
        before = keys()
        (model / name).write_bytes((model / name).read_bytes() + b" ")
        assert keys() != before, name
    before = keys(), keys(tiny=True)
    (model / "done.json").write_text("{}")  # a stage's own record, where the directory is one's
    assert keys() == before[0]
    (model / "model.safetensors").write_bytes(b"other")
    assert (keys() != before[0]) and keys(tiny=True) == before[1]  # which reads the shipped small model instead


def test_attempts_add_up_and_an_idle_one_changes_no_circumstances(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
):
    recipe = chain(fault="ctrl-c")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(Stopped):
        run_recipe(recipe, root=tmp_path, console=console, command="first")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    run = run_recipe(recipe, root=tmp_path, console=console, command="second")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    run_recipe(recipe, root=tmp_path, console=console, command="third")
    found = record(run)
    does = [list(one["stages"].values()) for one in found["attempts"]]
    assert does == [["start", "start", "start"], ["skip", "continue", "start"], ["skip", "skip", "skip"]]
    assert [one["command"] for one in found["attempts"]] == ["first", "second", "third"]
    assert [one["environment"]["OMP_NUM_THREADS"] for one in found["attempts"]] == ["1", "2", "3"]
    assert found["environment"]["OMP_NUM_THREADS"] == "2"  # of the last attempt that computed something
    assert found["attempts"][0]["code"] == found["code"]["hash"]


def test_the_code_hash_covers_modules_that_define_stages_and_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = "from toys import Count\nclass Own(Count):\n    pass\n"
    (tmp_path / "own_stage.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    import own_stage  # type: ignore[import-not-found]

    recipe = Recipe("r", {"a": own_stage.Own()})
    before = code(recipe)
    (tmp_path / "own_stage.py").write_text(source + "# changed\n")
    after = code(recipe)
    assert before["hash"] != after["hash"]
    assert [name for name in before["files"] if before["files"][name] != after["files"][name]] == ["own_stage"]
    named = override(recipe, {"a": {"label": calls_home}})
    assert __name__ in code(named)["files"] and __name__ not in before["files"]


def calls_home() -> None:
    """A function a stage could be given."""


def test_git_names_the_commit_and_whether_files_differ_from_it(tmp_path: Path):
    assert git(tmp_path) is None
    (tmp_path / "a.txt").write_text("1")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for args in (["init", "-q"], ["add", "a.txt"], [*identity, "commit", "-q", "-m", "one"]):
        subprocess.run(["git", "-C", str(tmp_path), *args], check=True)
    found = git(tmp_path)
    assert found is not None and len(found["commit"]) == 40 and found["changed"] is False
    (tmp_path / "a.txt").write_text("2")
    assert git(tmp_path) == {"commit": found["commit"], "changed": True}


@dataclass(frozen=True, kw_only=True)
class Looks(Stage):
    """Writes down which kernels torch may choose."""

    def files(self) -> list[Path]:
        return []


def look(stage: Looks, ctx: Context) -> None:
    (ctx.dir / "found.txt").write_text(str(torch.are_deterministic_algorithms_enabled()))


def test_every_stage_computes_with_kernels_that_sum_in_one_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Looks, "WORK", f"{__name__}:look")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        Looks().run(Context(dir=tmp_path, inputs={}, console=Console(file=io.StringIO())))
    finally:
        torch.use_deterministic_algorithms(before)
    assert (tmp_path / "found.txt").read_text() == "True"
    own = [kind for kind in vars(stages).values() if isinstance(kind, type) and issubclass(kind, Stage)]
    assert len(own) > 8 and all(kind.run is Stage.run for kind in own)  # none goes round it


def test_circumstances_are_the_same_twice(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = circumstances(chain())
    deterministic_kernels()  # as a first run in this process does
    assert circumstances(chain()) == before
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # chosen by the user
    assert circumstances(chain())["environment"]["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
