from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from measured import go, measured
from posttrain import cli
from posttrain.graph import override
from posttrain.run_diff import Divergence, compare_runs, first_divergence, print_diff
from posttrain.runner import Stopped
from toys import chain

pytestmark = pytest.mark.usefixtures("here")


def shown(first: Path, second: Path, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_diff(compare_runs(first, second), console)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# ---------------------------------------------------------------------------- equal


def test_two_runs_of_one_recipe_are_equal_to_the_bit():
    found = compare_runs(go("a"), go("b"))
    assert found.equal and not found.asked and not found.data and not found.circumstances
    tune = found.stages[1]
    assert (tune.stage, tune.steps, tune.diverged, tune.files, tune.compared) == ("tune", 3, None, (), 1)
    assert found.stages[2].results is True  # without the seconds and speeds in it
    text = shown(Path("runs/a"), Path("runs/b"))
    assert text.splitlines()[-1] == "equal to the bit: configuration, data and 3 steps of 3 stages"
    assert " tune      equal to the bit over 3 steps   equal" in text


def test_circumstances_are_shown_and_make_no_difference_of_the_outcome(capsys: pytest.CaptureFixture[str]):
    one, two = go("a"), go("b")
    record = json.loads((two / "run.json").read_text())
    versions, files = record["versions"] | {"torch": "9.9"}, record["code"]["files"] | {"train/loop.py": "0"}
    change(two / "run.json", versions=versions, code={"hash": "x", "files": files})
    assert [item.what for item in compare_runs(one, two).circumstances] == ["versions.torch", "code.train/loop.py"]
    assert cli.main(["diff", "a", "b"]) == 0
    assert "stages; 2 circumstances differ" in capsys.readouterr().out


def test_numbers_are_compared_by_their_text_so_that_no_bit_is_lost():
    row = {"step": 0, "loss/nll": 0.0, "time/step": 1.0}
    assert first_divergence([row], [row | {"time/step": 2.0}]) == (1, None)
    assert first_divergence([row], [row | {"loss/nll": -0.0}])[1] == Divergence(0, "loss/nll", "0.0", "-0.0")
    nearly = [row | {"loss/nll": 0.1 + 0.2}, row | {"loss/nll": 0.3}]
    found = first_divergence(nearly[:1], nearly[1:])[1]
    assert found == Divergence(0, "loss/nll", "0.30000000000000004", "0.3")


def test_a_metric_that_one_log_lacks_is_a_divergence_and_a_shorter_log_is_none():
    rows: list[dict[str, Any]] = [{"step": 0, "a": 1.0}, {"step": 1, "a": 1.0, "b": 2.0, "c": 3.0}]
    assert first_divergence(rows, rows[:1]) == (1, None)
    without = [rows[0], {"step": 1, "a": 1.0}]
    assert first_divergence(rows, without) == (2, Divergence(1, "b", "2.0", "–", more=1))


# ---------------------------------------------------------------------------- different


def test_a_setting_is_named_with_the_step_at_which_it_first_tells(capsys: pytest.CaptureFixture[str]):
    one, two = go("a"), go("b", override(measured(), {"tune": {"beta": 0.2}}))
    found = compare_runs(one, two)
    assert found.asked == [("tune.beta", "0.1", "0.2")]
    tune = found.stages[1]
    assert tune.diverged is not None and (tune.diverged.step, tune.diverged.metric) == (1, "loss/nll")
    assert tune.files == ("model.safetensors",) and found.stages[0].equal
    assert ("policies/tuned/reward" in {name for name, _, _ in found.results}) and not found.equal
    assert cli.main(["diff", "a", "runs/b"]) == 1
    assert capsys.readouterr().out.rstrip().endswith("the runs differ: 1 setting; the outcome of tune, measure")


def test_the_tables_of_two_different_runs():
    one, two = go("a"), go("b", override(measured(), {"tune": {"beta": 0.2}}), seed=1)
    text = shown(one, two)
    assert max(map(len, text.splitlines())) <= 80
    assert text.startswith(
        """Asked

             a     b
 ─────────────────────
 seed        0     1
 tune.beta   0.1   0.2
"""
    ), text
    assert "differ first at step 0: loss/nll" in text
    assert "0.8444218515250481 in a" in text and "0.13436424411240122 in b" in text
    assert "model.safetensors differs" in text
    assert max(map(len, shown(one, two, width=120).splitlines())) <= 120


def test_changed_data_is_named_by_file_and_contents(here: Path):
    for name in ("x", "y"):
        (here / name).mkdir()
        (here / name / "rows.jsonl").write_text(f"{name}\n")
        (here / name / "same.jsonl").write_text("same\n")
    one, two = go("a", measured("x/rows.jsonl")), go("b", measured("y/rows.jsonl"))
    found = compare_runs(one, two)
    assert [item.what for item in found.asked] == ["start.data"]
    assert [item.what for item in found.data] == ["start rows.jsonl"] and "2 bytes" in found.data[0].first
    moved = compare_runs(go("c", measured("x/same.jsonl")), go("d", measured("y/same.jsonl")))
    assert moved.data == [] and [item.what for item in moved.asked] == ["start.data"]


def test_a_stage_that_only_one_run_has_is_one_line():
    found = compare_runs(go("a", chain()), go("b", measured()))
    assert ("first", "Count", "–") in found.asked and ("tune", "–", "Tune") in found.asked
    assert not [item for item in found.asked if item.what.startswith("first.")]


def test_an_unfinished_run_differs_from_a_finished_one():
    one = go("a", chain(fault="ctrl-c"), until="first")
    with pytest.raises(Stopped):
        go("b", chain(fault="ctrl-c"))
    found = compare_runs(one, Path("runs/b"))
    assert [stage.finished for stage in found.stages[:2]] == [(True, True), (False, False)]
    last = compare_runs(go("c", chain(fault="ctrl-c"), until="first"), Path("runs/b"))
    assert last.equal
    with pytest.raises(Stopped):
        go("d", chain(fault="ctrl-c"))
    go("d", chain(fault="ctrl-c"))
    cut = compare_runs(Path("runs/b"), Path("runs/d"))
    assert not cut.equal and cut.stages[1].finished == (False, True)
    assert "not finished in b" in shown(Path("runs/b"), Path("runs/d"))


def test_attempts_under_other_circumstances_are_noted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(Stopped):
        go("a", chain(fault="ctrl-c"))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    go("a", chain(fault="ctrl-c"))
    (note,) = compare_runs(Path("runs/a"), Path("runs/a")).notes[:1]
    assert note == "a: attempt 2 of 2 ran under other circumstances: environment.OMP_NUM_THREADS 1 then 2"


@pytest.mark.parametrize(
    "args, message",
    [
        ("diff", "`posttrain diff` needs a run: posttrain diff RUN SECOND-RUN"),
        ("diff a", "`posttrain diff` needs a second run: posttrain diff RUN SECOND-RUN"),
        ("diff a b", "no run 'a' (a name under runs/ or a directory with run.json); known: none"),
        ("diff a b c", "unexpected 'c'; options start with --, see posttrain diff --help"),
        ("diff a b --widht 3", "unknown option '--widht' of `posttrain diff`; known: none"),
    ],
)
def test_faults_of_usage(args: str, message: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(args.split()) == 2
    assert capsys.readouterr().err == f"posttrain: {message}\n"
