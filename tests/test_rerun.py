from __future__ import annotations

import dataclasses
import inspect
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from measured import RUNS, calls, go, measured
from posttrain import cli
from posttrain.errors import ConfigError
from posttrain.graph import ordered, override, stage_config, stage_inputs
from posttrain.manifest import stage_record
from posttrain.registry import RECIPES
from posttrain.rerun import rebuild, rerun, restore
from posttrain.run_diff import compare_runs
from posttrain.runner import duration
from posttrain.stages import SFT, Recipe, Stage
from toys import Count

pytestmark = pytest.mark.usefixtures("here")


def edit(run: Path, alter: Callable[[dict], object]) -> None:
    record = json.loads((run / "run.json").read_text())
    alter(record)
    (run / "run.json").write_text(json.dumps(record))


# ---------------------------------------------------------------------------- the recipe from its record


def recorded(recipe: Recipe) -> dict[str, Any]:
    stages = {name: stage_record(stage, recipe, False, reached=False) for name, stage in ordered(recipe).items()}
    return json.loads(json.dumps({"recipe": recipe.name, "summary": recipe.summary, "stages": stages}))


def by_name(recipe: Recipe) -> dict[str, Any]:
    """Each stage's class and fields, with stages by their names: rounds have too many paths to compare inputs by inputs."""
    names = {id(stage): name for name, stage in recipe.stages.items()}

    def named(value: Any) -> Any:
        if isinstance(value, Stage):
            return Stage, names[id(value)]
        return type(value)(map(named, value)) if type(value) in (tuple, list) else value

    stages = ordered(recipe).items()
    return {n: (type(s), {f.name: named(getattr(s, f.name)) for f in dataclasses.fields(s)}) for n, s in stages}


def test_a_stage_shows_its_values_and_names_its_inputs_by_class():
    stages = RECIPES["llama3"]().stages  # six rounds: written out whole, paths double with each
    assert repr(stages["annotator"]).startswith("TrainReward(model=<SFT>, data='smallworld', ")
    assert len(repr(RECIPES["llama3"]())) < 600 * len(stages)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_is_rebuilt_from_its_record(name: str):
    needed = {key: "x" for key, p in inspect.signature(RECIPES[name]).parameters.items() if p.default is p.empty}
    recipe = RECIPES[name](**needed)
    again = rebuild(recorded(recipe))
    assert (again.name, again.summary) == (recipe.name, recipe.summary)
    assert by_name(again) == by_name(recipe)  # dataclasses: fields, tuples and inputs of inputs
    inside = set(map(id, again.stages.values()))
    assert all(id(other) in inside for stage in again.stages.values() for other in stage_inputs(stage).values())


def test_fields_come_back_as_their_annotation_says():
    first = Count(betas=(0.5,), mode="down", label=None)
    recipe = Recipe("r", {"a": first, "b": Count(start=first, others=(first,), rate=1e-4)})
    again = rebuild(recorded(recipe)).stages
    assert again["a"] == first and again["b"].others == (again["a"],)  # type: ignore[attr-defined]
    assert again["b"].start is again["a"]  # type: ignore[attr-defined]
    assert restore("x/y", Path | None) == Path("x/y") and restore("x/y", Path | str) == "x/y"
    assert restore("posttrain.runner:duration", Callable[[float], str]) is duration
    assert restore([[1, 2], [3]], tuple) == ((1, 2), (3,)) and restore([1], list[int]) == [1]


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda r: r["stages"]["tune"].update(type="measured:measured"), "stage 'tune' is recorded as 'measured:measured', which is"),
        (lambda r: r["stages"]["tune"].update(type="measured:Gone"), "'measured' has no 'Gone'"),
        (lambda r: r["stages"]["tune"]["config"].update(gamma=1), "stage 'tune' is recorded with 'gamma', which Tune no longer has"),
        (lambda r: r["stages"]["tune"]["config"].pop("beta"), "stage 'tune', field 'beta' was None and would be 0.1"),
        (lambda r: r["stages"]["tune"].pop("type"), "records too little to repeat the run; use its command: posttrain run measured"),
        (lambda r: r.pop("code"), "records too little to repeat the run"),
    ],
)  # fmt: skip
def test_a_record_that_does_not_give_the_run_back_is_refused(alter: Callable[[dict], object], message: str):
    run = go("a", command="posttrain run measured")
    edit(run, alter)
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        rerun(run, console=Console(file=io.StringIO()))
    assert sorted(path.name for path in RUNS.iterdir() if path.is_dir()) == ["a"]


# ---------------------------------------------------------------------------- running it


def test_a_rerun_is_equal_and_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    for key, value in {"GOMP_SPINCOUNT": "2000", "OMP_WAIT_POLICY": "PASSIVE"}.items():  # as the command sets them
        monkeypatch.setenv(key, value)
    recipe = override(measured(effect=0.5), {"tune": {"beta": 0.3, "betas": (0.1, 0.2)}})
    go("a", recipe, seed=4, tiny=True, until="tune")
    calls(RUNS)
    assert cli.main(["rerun", "a"]) == 0
    assert calls(RUNS) == ["a-rerun/start", "a-rerun/tune"]
    assert capsys.readouterr().out.rstrip().endswith("equal to the bit: configuration, data and 3 steps of 2 stages")
    record = json.loads(Path("runs/a-rerun/run.json").read_text())
    assert record["command"].endswith("--name a-rerun") and record["seed"] == 4 and record["tiny"] is True
    assert cli.main(["rerun", "a"]) == 0 and Path("runs/a-rerun-2/tune/done.json").exists()
    calls(RUNS)
    assert cli.main(["rerun", "a", "--name", "a-rerun"]) == 0 and calls(RUNS) == []  # that one is finished


def test_a_rerun_uses_as_many_threads_as_the_run(capsys: pytest.CaptureFixture[str]):
    run, now = go("a"), torch.get_num_threads()
    try:
        torch.set_num_threads(now + 1)
        assert cli.main(["rerun", "a"]) == 0
        assert torch.get_num_threads() == now
        line = f"threads set to {now}, as in the run; the environment says {now + 1}\n"
        output = capsys.readouterr().out
        assert output.startswith(line) and "Changed since the run" not in output
    finally:
        torch.set_num_threads(now)
    assert compare_runs(run, RUNS / "a-rerun").circumstances == []


def test_changed_data_refuse_a_rerun_unless_allowed(here: Path, capsys: pytest.CaptureFixture[str]):
    data = here / "rows.jsonl"
    data.write_text("1\n")
    go("a", measured(str(data)))
    data.write_text("2\n")
    assert cli.main(["rerun", "a"]) == 2
    output = capsys.readouterr()
    line = "runs/a ran with other data, code or versions: start rows.jsonl; --allow-changed runs it all the same"
    assert output.err == f"posttrain: {line}\n" and "Changed since the run" in output.out
    assert not Path("runs/a-rerun").exists()
    assert cli.main(["rerun", "a", "--allow-changed"]) == 1  # it read other data
    assert "the runs differ: 1 file read" in capsys.readouterr().out


def test_changed_code_and_versions_refuse_and_another_machine_does_not(capsys: pytest.CaptureFixture[str]):
    run = go("a")
    edit(run, lambda r: r["hardware"].update(cpu="another"))
    assert cli.main(["rerun", "a"]) == 0
    assert "another" in capsys.readouterr().out
    edit(
        run,
        lambda r: (r["versions"].update(torch="1.0"), r["code"]["files"].update({"train/loop.py": "0", "x.py": "1"})),
    )
    assert cli.main(["rerun", "a"]) == 2
    assert ": versions.torch, code.train/loop.py, code.x.py; --allow" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args, message",
    [
        ("rerun", "`posttrain rerun` needs a run: posttrain rerun RUN"),
        ("rerun b", "no run 'b' (a name under runs/ or a directory with run.json); known: a"),
        ("rerun a --name a", "runs/a is the run itself; choose another --name"),
        ("rerun a --name other", "runs/other holds a run with other options, which would be cleared; choose another --name"),
        ("rerun a --nmae c", "unknown option '--nmae' of `posttrain rerun`; did you mean '--name'?"),
    ],
)  # fmt: skip
def test_faults_of_usage(args: str, message: str, capsys: pytest.CaptureFixture[str]):
    go("a")
    if "other" in args:
        go("other", seed=1)
    assert cli.main(args.split()) == 2
    assert capsys.readouterr().err == f"posttrain: {message}\n"


def test_a_training_run_is_reproduced_to_the_bit():
    sft = SFT(limit=12, prompts_per_step=8, save_every=1)
    run = go("sft", Recipe("sft", {"sft": sft}), seed=5, tiny=True)
    again = rerun(run, root=RUNS, console=Console(file=io.StringIO()))
    found = compare_runs(run, again)
    assert found.equal and found.stages[0].steps >= 2 and found.stages[0].compared == 1
    assert stage_config(rebuild(json.loads((again / "run.json").read_text())).stages["sft"]) == stage_config(sft)
    # and the comparison sees a single bit of the weights
    weights = again / "sft" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert compare_runs(run, again).stages[0].files == ("model.safetensors",)
