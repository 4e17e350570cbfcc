from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from posttrain.errors import ConfigError
from posttrain.forecast import dry_run
from posttrain.graph import describe, ordered, override, stage_inputs
from posttrain.runner import Stopped, _locked, duration, run_recipe, stop_cause, write_json
from posttrain.stages import Recipe, Stage
from toys import Count, chain, total

HERE = Path(__file__).parent


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=100)


def text(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined]


def calls(run: Path) -> list[str]:
    return (run / "calls.txt").read_text().splitlines()


# ---------------------------------------------------------------------------- graph


def test_inputs_come_before_readers_whatever_the_order_in_the_recipe():
    stages = chain().stages
    backwards = Recipe("r", {name: stages[name] for name in ("last", "second", "first")})
    assert list(ordered(backwards)) == ["first", "second", "last"]
    assert list(stage_inputs(stages["last"])) == ["start", "others.0", "others.1"]


def test_faults_of_a_graph_are_named():
    first = Count()
    with pytest.raises(ConfigError, match="stage 'b': field 'start' refers to a Count that is not in the recipe"):
        ordered(Recipe("r", {"b": Count(start=first)}))
    loop = Count()
    other = Count(start=loop)
    object.__setattr__(loop, "start", other)
    with pytest.raises(ConfigError, match="a -> b -> a"):
        ordered(Recipe("r", {"a": loop, "b": other}))
    with pytest.raises(ConfigError, match="two names"):
        ordered(Recipe("r", {"a": first, "b": first}))
    with pytest.raises(ConfigError, match=r"'\.\./x'"):
        ordered(Recipe("r", {"../x": first}))
    with pytest.raises(ConfigError, match="item 1"):
        ordered(Recipe("r", {"a": first, "b": Count(others=(first, 3))}))  # type: ignore[arg-type]


def test_equal_stages_under_two_names_stay_two():
    a, b = Count(), Count()
    assert a == b
    recipe = override(Recipe("r", {"a": a, "b": b, "c": Count(start=b)}), {"a": {"steps": 9}})
    assert recipe.stages["c"].start is recipe.stages["b"]  # type: ignore[attr-defined]
    assert (recipe.stages["a"].steps, recipe.stages["b"].steps) == (9, 3)  # type: ignore[attr-defined]


def test_override_reaches_readers_at_any_depth_and_leaves_the_original():
    recipe = chain()
    new = override(recipe, {"first": {"steps": 7}})
    last, second, first = (new.stages[name] for name in ("last", "second", "first"))
    assert first.steps == 7 and recipe.stages["first"].steps == 2  # type: ignore[attr-defined]
    assert second.start is first and last.start is second and last.others == (first, second)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="did you mean 'steps'"):
        override(recipe, {"first": {"step": 7}})
    with pytest.raises(ConfigError, match="did you mean 'first'"):
        override(recipe, {"frist": {"steps": 7}})


# ---------------------------------------------------------------------------- keys


def keys(recipe: Recipe, seed: int = 0, tiny: bool = False) -> list[str]:
    return [described["key"] for described in describe(ordered(recipe), seed=seed, tiny=tiny).values()]


def test_a_key_covers_all_that_decides_a_result(tmp_path: Path):
    base = keys(chain())
    assert keys(chain()) == base and len(set(base)) == 3
    later = keys(override(chain(), {"second": {"rate": 2.0}}))
    assert [a == b for a, b in zip(base, later, strict=True)] == [True, False, False]
    assert not set(keys(chain(), seed=1)) & set(base) and not set(keys(chain(), tiny=True)) & set(base)
    file, copy = tmp_path / "a" / "rows.jsonl", tmp_path / "b" / "rows.jsonl"
    for path in (file, copy):
        path.parent.mkdir()
        path.write_text("1\n")
    before = keys(override(chain(), {"first": {"data": str(file)}}))
    file.write_text("2\n")
    assert not set(keys(override(chain(), {"first": {"data": str(file)}}))) & set(before)


def test_a_missing_data_file_is_named():
    with pytest.raises(ConfigError, match=r"can't read the data file 'nowhere.jsonl': No such file"):
        keys(override(chain(), {"first": {"data": "nowhere.jsonl"}}))


def test_a_key_is_the_same_in_another_process():
    code = "from toys import chain; from posttrain.graph import describe, ordered; "
    code += "print(describe(ordered(chain()), seed=0, tiny=False)['last']['key'])"
    other = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == keys(chain())[2]


def test_a_value_without_stable_text_is_refused_and_a_function_is_its_import_path():
    def of(value: object) -> object:
        recipe = Recipe("r", {"a": Count(label=value)})  # type: ignore[arg-type]
        return describe(ordered(recipe), seed=0, tiny=False)["a"]["config"]["label"]

    assert of(duration) == "posttrain.runner:duration"
    assert of({Path("x"): (1, frozenset({"b", "a"}))}) == {"x": [1, ["a", "b"]]}
    for value in (lambda: 1, object()):
        with pytest.raises(ConfigError, match=r"field 'label'.*stable text"):
            of(value)


# ---------------------------------------------------------------------------- runs


def test_a_run_leaves_its_record_and_a_second_one_computes_nothing(tmp_path: Path, console: Console):
    run = run_recipe(chain(), root=tmp_path, console=console, seed=1, command="posttrain run chain")
    assert run == tmp_path / "chain"
    # first: 2 steps of 2; second: 4 + 3 steps of 2; last: second + first + second + 1 step of 2
    assert [total(run / name) for name in ("first", "second", "last")] == [4, 10, 10 + 4 + 10 + 2]
    record = json.loads((run / "run.json").read_text())
    assert record["command"] == "posttrain run chain" and record["seed"] == 1
    assert set(record["versions"]) == {"python", "posttrain", "torch", "transformers", "tokenizers", "peft", "numpy"}
    assert record["hardware"]["threads"] >= 1 and record["hardware"]["memory"] > 0.1 and record["hardware"]["cpu"]
    assert record["stages"]["last"]["inputs"] == {
        "start": "second",
        "others.0": "first",
        "others.1": "second",
    }
    assert record["stages"]["first"]["config"]["betas"] == [0.9, 0.99]
    done = json.loads((run / "second" / "done.json").read_text())
    assert done["key"] == json.loads((run / "second" / "stage.json").read_text())["key"]
    assert done["outputs"] == {"total.json": 4}  # checkpoints are no outputs
    before = calls(run)
    run_recipe(chain(), root=tmp_path, console=console, seed=1)
    assert calls(run) == before == ["first from 0", "second from 0", "last from 0"]
    assert text(console).count("skipped") == 3
    assert json.loads((run / "run.json").read_text())["created"] == record["created"]


def test_a_finished_stage_that_lost_part_of_an_output_runs_again_and_one_that_lost_its_records_does_not(
    tmp_path: Path, console: Console
):
    """A machine that lost power may leave a file cut; a journal or checkpoints may be deleted to save space."""
    with pytest.raises(Stopped):
        run_recipe(chain(fault="ctrl-c"), root=tmp_path, console=console)
    run = tmp_path / "chain"
    for name in ("journal", "tensorboard"):
        (run / "second" / name).mkdir()
        (run / "second" / name / "step-00000001.jsonl").write_text("{}\n")
    run_recipe(chain(fault="ctrl-c"), root=tmp_path, console=console)
    assert json.loads((run / "second" / "done.json").read_text())["outputs"] == {"total.json": 3}
    for name in ("journal", "tensorboard", "checkpoints"):
        shutil.rmtree(run / "second" / name)
    run_recipe(chain(fault="ctrl-c"), root=tmp_path, console=console)
    assert calls(run) == ["first from 0", "second from 0", "second from 1", "last from 0"]
    (run / "last" / "total.json").write_text("")
    run_recipe(chain(fault="ctrl-c"), root=tmp_path, console=console)
    assert "last will be cleared and run again: its output total.json is gone" in text(console)
    assert calls(run)[4:] == ["last from 0"]


def test_allowed_changes_drop_journalled_rollouts_that_no_checkpoint_used(tmp_path: Path, console: Console):
    """They were sampled under the old settings, by a policy that the new ones will not come to."""
    with pytest.raises(Stopped):
        run_recipe(chain(fault="ctrl-c"), root=tmp_path, console=console)
    stage = tmp_path / "chain" / "second"
    (stage / "journal").mkdir()
    for step in (4, 6, 8):
        (stage / "journal" / f"step-{step:08d}.jsonl").touch()
    for name in ("step-00000005", "step-00000006", "over-limit-step-00000009", ".step-00000007.0.1.tmp"):
        (stage / "checkpoints" / name).mkdir()
    run_recipe(chain(fault="ctrl-c"), root=tmp_path, console=console)  # nothing changed
    assert len(list((stage / "journal").iterdir())) == 3
    recipe = override(chain(fault="ctrl-c"), {"second": {"rate": 2.0}})
    run_recipe(recipe, root=tmp_path, console=console, allow_changed=True)
    assert [p.name for p in (stage / "journal").iterdir()] == ["step-00000004.jsonl"]


def test_what_a_killed_process_was_writing_is_removed(tmp_path: Path, console: Console):
    with pytest.raises(Stopped):
        run_recipe(chain(fault="ctrl-c"), root=tmp_path, console=console)
    left = tmp_path / "chain" / "second" / "policy" / ".tmpAbC123"  # as safetensors names them
    left.parent.mkdir()
    json_too = tmp_path / "chain" / "second" / f".reward.json.{os.getpid()}.tmp"
    for path in (left, json_too):
        path.write_bytes(b"half")
    run_recipe(chain(fault="ctrl-c"), root=tmp_path, console=console)
    assert not left.exists() and not json_too.exists()
    assert json.loads((tmp_path / "chain" / "second" / "done.json").read_text())["outputs"] == {"total.json": 3}


def test_until_stops_after_a_stage(tmp_path: Path, console: Console):
    run = run_recipe(chain(), root=tmp_path, console=console, until="second")
    assert calls(run) == ["first from 0", "second from 0"]
    with pytest.raises(ConfigError, match="did you mean 'second'"):
        run_recipe(chain(), root=tmp_path, console=console, until="secnd")


@pytest.mark.parametrize(
    "fault, code, words",
    [
        ("sigint", 130, "stopped by Ctrl-C"),
        ("sigterm", 143, "stopped by SIGTERM"),
        ("disk", 1, "the disk is full"),
        ("memory", 1, "out of memory"),
        ("torch", 1, "out of memory"),
    ],
)
def test_what_stops_a_run_is_one_line_and_the_run_goes_on(
    tmp_path: Path, console: Console, fault: str, code: int, words: str
):
    recipe = chain(fault=fault)
    with pytest.raises(Stopped) as stopped:
        run_recipe(recipe, root=tmp_path, console=console, command="posttrain run chain --x 'a b'")
    run = tmp_path / "chain"
    assert stopped.value.code == code
    assert text(console).splitlines()[-1] == stopped.value.line
    assert stopped.value.line.startswith(f"posttrain: {words}") and "stage 'second'" in stopped.value.line
    assert stopped.value.line.endswith("go on with: posttrain run chain --x 'a b'")
    assert not (run / "second" / "done.json").exists()
    run_recipe(recipe, root=tmp_path, console=console)
    assert calls(run) == ["first from 0", "second from 0", "second from 1", "last from 0"]
    assert total(run / "second") == 5
    assert "second: was cut off, continues" in text(console)


@pytest.mark.parametrize("fault, kind", [("bug", ZeroDivisionError), ("config", ConfigError)])
def test_other_errors_pass_after_a_line_that_says_where(tmp_path: Path, console: Console, fault: str, kind: type):
    with pytest.raises(kind):
        run_recipe(chain(fault=fault), root=tmp_path, console=console, command="again")
    assert "stage 'second'" in text(console) and "once repaired, go on with: again" in text(console)


def test_seconds_add_up_over_attempts(tmp_path: Path, console: Console):
    with pytest.raises(Stopped):
        run_recipe(chain(fault="ctrl-c"), root=tmp_path, console=console)
    described = json.loads((tmp_path / "chain" / "second" / "stage.json").read_text())
    write_json(tmp_path / "chain" / "second" / "stage.json", described | {"seconds": 100.0})
    run_recipe(chain(fault="ctrl-c"), root=tmp_path, console=console)
    assert 100 < json.loads((tmp_path / "chain" / "second" / "done.json").read_text())["seconds"] < 110


CHANGED = {"second": {"rate": 2.0}}


def test_changed_settings_are_refused_with_the_difference(tmp_path: Path, console: Console):
    run = run_recipe(chain(), root=tmp_path, console=console)
    record = (run / "run.json").read_text()
    with pytest.raises(ConfigError) as caught:
        run_recipe(override(chain(), CHANGED), root=tmp_path, console=console)
    assert str(caught.value) == (
        f"{run} was begun under other settings (stage 'second': rate was 1.0, is 2.0; stage 'last': an input changed); "
        "--allow-changed keeps what is there, goes on, and records the difference in run.json; --restart-changed clears "
        "these stages and runs them again; another --name keeps both"
    )
    assert len(calls(run)) == 3 and (run / "run.json").read_text() == record
    both = {"allow_changed": True, "restart_changed": True}
    with pytest.raises(ConfigError, match="was begun under other settings"):
        run_recipe(override(chain(), CHANGED), root=tmp_path, console=console, **both)
    run_recipe(chain(), root=tmp_path, console=console)  # as it was: nothing to ask
    assert len(calls(run)) == 3


def test_changed_stages_and_their_readers_can_be_restarted(tmp_path: Path, console: Console):
    run = run_recipe(chain(), root=tmp_path, console=console)
    (run / "second" / "old.txt").touch()
    console.file = io.StringIO()
    run_recipe(override(chain(), CHANGED), root=tmp_path, console=console, restart_changed=True)
    lines = text(console).splitlines()
    assert "second will be cleared and run again: rate was 1.0, is 2.0" in lines[0]
    assert "last will be cleared and run again: an input changed" in lines[1]
    assert "first: finished earlier" in lines[2]
    assert calls(run)[3:] == ["second from 0", "last from 0"]
    assert not (run / "second" / "old.txt").exists() and not list(run.glob(".cleared-*"))


def test_changed_settings_can_be_allowed_and_are_recorded(tmp_path: Path, console: Console):
    """A finished stage is kept, an unfinished one goes on with the new settings; nobody is asked again."""
    with pytest.raises(Stopped):
        run_recipe(chain(fault="ctrl-c"), root=tmp_path, console=console)
    run, changes = tmp_path / "chain", {"first": {"rate": 5.0}, "second": {"rate": 2.0}}
    run_recipe(override(chain(fault="ctrl-c"), changes), root=tmp_path, console=console, allow_changed=True)
    assert calls(run) == ["first from 0", "second from 0", "second from 1", "last from 0"]
    assert [total(run / name) for name in ("first", "second")] == [2, 2 + 1 + 2 * 2]
    assert json.loads((run / "run.json").read_text())["attempts"][-1]["allowed"] == {
        "first": "rate was 1.0, is 5.0",
        "second": "rate was 1.0, is 2.0; an input changed",
    }
    assert f"{run / 'first'}: kept although rate was 1.0, is 5.0" in text(console)
    run_recipe(override(chain(fault="ctrl-c"), changes), root=tmp_path, console=console)
    assert len(calls(run)) == 4 and "allowed" not in json.loads((run / "run.json").read_text())["attempts"][-1]


def test_other_library_versions_are_refused_for_an_unfinished_stage_only(tmp_path: Path, console: Console):
    with pytest.raises(Stopped):
        run_recipe(chain(fault="ctrl-c"), root=tmp_path, console=console)
    run = tmp_path / "chain"
    for name in ("first", "second"):
        described = json.loads((run / name / "stage.json").read_text())
        present = described["versions"]["torch"]
        write_json(run / name / "stage.json", described | {"versions": described["versions"] | {"torch": "1.0"}})
    with pytest.raises(ConfigError, match=rf"\(stage 'second': torch was '1.0', is '{re.escape(present)}'\)"):
        run_recipe(chain(fault="ctrl-c"), root=tmp_path, console=console)
    run_recipe(chain(fault="ctrl-c"), root=tmp_path, console=console, allow_changed=True)
    assert calls(run)[2:] == ["second from 1", "last from 0"]


def test_a_changed_data_file_is_named_with_both_hashes(tmp_path: Path, console: Console):
    file = tmp_path / "rows.jsonl"
    file.write_text("1\n")
    run_recipe(chain(data_file=str(file)), root=tmp_path, console=console)
    file.write_text("2\n")
    with pytest.raises(ConfigError, match=r"stage 'first': file rows.jsonl was '\w{16}', is '\w{16}'; stage 'second'"):
        run_recipe(chain(data_file=str(file)), root=tmp_path, console=console)


def test_a_resume_that_would_begin_or_do_nothing_is_refused(tmp_path: Path, console: Console):
    with pytest.raises(ConfigError) as caught:
        run_recipe(chain(), root=tmp_path, console=console, resume=True)
    assert str(caught.value) == f"there is no run in {tmp_path / 'chain'} to resume; leave --resume out to begin one"
    assert not (tmp_path / "chain").exists()
    with pytest.raises(Stopped):
        run_recipe(chain(fault="ctrl-c"), root=tmp_path, console=console)
    run_recipe(chain(fault="ctrl-c"), root=tmp_path, console=console, resume=True)
    with pytest.raises(ConfigError) as caught:
        run_recipe(chain(fault="ctrl-c"), root=tmp_path, console=console, resume=True)
    assert str(caught.value) == (
        f"every stage of {tmp_path / 'chain'} is finished; --resume has nothing to do; leave it out"
    )
    run_recipe(chain(fault="ctrl-c"), root=tmp_path, console=console)
    assert text(console).endswith(f"every stage of {tmp_path / 'chain'} was finished before; nothing was computed\n")


def test_memory_knobs_are_no_change():
    from posttrain.stages import SFT

    one = keys(Recipe("r", {"a": SFT(model="small-base", data="smallworld")}))
    two = keys(Recipe("r", {"a": SFT(model="small-base", data="smallworld", max_tokens=77, save_every=3, keep=5)}))
    assert one == two


def test_a_disk_that_is_known_to_be_too_small_is_said_in_numbers():
    error = OSError(28, "the checkpoint of step 4 needs 9.5 MB, 1.2 MB are free", "runs/x")
    assert stop_cause(error) == (
        "the disk is full (the checkpoint of step 4 needs 9.5 MB, 1.2 MB are free; free some space)",
        1,
    )
    assert stop_cause(OSError(28, os.strerror(28))) == ("the disk is full (free some space)", 1)


def test_a_lost_output_is_made_again(tmp_path: Path, console: Console):
    run = run_recipe(chain(), root=tmp_path, console=console)
    (run / "first" / "total.json").unlink()
    run_recipe(chain(), root=tmp_path, console=console)
    assert "its output total.json is gone" in text(console)
    assert calls(run)[3:] == ["first from 0"]  # its readers' keys are as they were


def test_a_directory_that_is_no_stage_is_never_cleared(tmp_path: Path, console: Console):
    (tmp_path / "chain" / "first").mkdir(parents=True)
    (tmp_path / "chain" / "first" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"thesis.tex.*no stage.json"):
        run_recipe(chain(), root=tmp_path, console=console)
    assert (tmp_path / "chain" / "first" / "thesis.tex").exists()


def test_a_stage_is_checked_before_anything_is_written(tmp_path: Path, console: Console):
    with pytest.raises(ConfigError, match="nobody"):
        run_recipe(override(chain(), {"last": {"label": "nobody"}}), root=tmp_path / "runs", console=console)
    assert not (tmp_path / "runs").exists()


def test_two_runs_in_one_directory_are_refused_and_a_dead_one_is_taken_over(tmp_path: Path, console: Console):
    run = tmp_path / "chain"
    run.mkdir()
    with _locked(run, console), pytest.raises(ConfigError, match=f"process {os.getpid()} works on"):
        run_recipe(chain(), root=tmp_path, console=console)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (run / ".lock").write_text(str(dead.pid))
    run_recipe(chain(), root=tmp_path, console=console)
    assert f"process {dead.pid} died" in text(console) and (run / ".lock").read_text() == ""


def test_tiny_runs_do_not_touch_the_full_ones_and_names_stay_inside(tmp_path: Path, console: Console):
    assert run_recipe(chain(), root=tmp_path, console=console, tiny=True).name == "chain-tiny"
    for name in ("../x", "a/b", ".."):
        with pytest.raises(ConfigError, match="run name"):
            run_recipe(chain(), root=tmp_path, name=name, console=console)


def test_a_killed_process_can_be_continued(tmp_path: Path, console: Console):
    script = "import sys; from pathlib import Path; from toys import chain; from posttrain.runner import *; "
    script += "run_recipe(chain(fault='kill'), root=Path(sys.argv[1]))"
    child = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=HERE, capture_output=True)
    assert child.returncode == -signal.SIGKILL
    run = run_recipe(chain(fault="kill"), root=tmp_path, console=console)
    assert calls(run) == ["first from 0", "second from 0", "second from 1", "last from 0"]
    assert total(run / "second") == 5 and "died while it worked on" in text(console)


def test_the_signal_handler_is_put_back(tmp_path: Path, console: Console):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped):
        run_recipe(chain(fault="sigterm"), root=tmp_path, console=console)
    assert signal.getsignal(signal.SIGTERM) is before


def test_json_is_replaced_whole(tmp_path: Path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_other_errors_are_no_stop():
    assert stop_cause(ValueError("x")) is None and stop_cause(OSError(2, "no file")) is None
    assert stop_cause(Exception("I/O error: No space left on device (os error 28)")) is not None


# ---------------------------------------------------------------------------- dry run


def test_dry_run_shows_the_graph_and_forecasts(console: Console):
    dry_run(chain(), console=console)
    shown = text(console)
    assert "counts [three] times" in shown and "second, first, second" in shown
    assert "3,600,000" in shown  # tokens of all stages
    assert "first: counts" in shown and "GFLOP/s" in shown
    dry_run(replace(chain(), stages={"first": _Huge()}), console=console)
    assert "warning: needs 1000000.0 GiB" in text(console)


class _Huge(Stage):
    def plan(self):  # type: ignore[override]
        return replace(super().plan(), memory=1e6 * 1024**3)


def test_dry_run_does_not_import_torch():
    code = "import sys; from toys import chain; from posttrain.forecast import dry_run; dry_run(chain()); "
    code += "assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=HERE, check=True, capture_output=True)


def test_code_that_changed_is_said_when_a_run_goes_on(tmp_path: Path, console: Console):
    """A finished run has nothing that could go on otherwise."""
    recipe = chain(fault="sigterm")
    with pytest.raises(Stopped):
        run_recipe(recipe, root=tmp_path, console=console)
    path = tmp_path / "chain" / "run.json"
    record = json.loads(path.read_text())
    now = record["attempts"][0]["code"]
    record["attempts"][0]["code"] = "0123456789abcdef"
    path.write_text(json.dumps(record))
    run_recipe(recipe, root=tmp_path, console=console)
    said = " ".join(text(console).split())
    assert f"its code changed since (0123456789abcdef, now {now}); it may go on otherwise than before" in said
    run_recipe(recipe, root=tmp_path, console=console)
    assert " ".join(text(console).split()).count("its code changed") == 1
