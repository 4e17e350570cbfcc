from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain import cli
from posttrain.arguments import convert
from posttrain.cli_list import loss_grids, loss_registries
from posttrain.errors import ConfigError
from posttrain.registry import METHODS, RECIPES, Registry
from posttrain.train.objectives import objectives
from toys import total

HERE = Path(__file__).parent
CHAIN = "toys:chain"

pytestmark = pytest.mark.usefixtures("here")


def described(stage: str, run: str = "chain") -> dict:
    return json.loads((Path("runs") / run / stage / "stage.json").read_text())


# ---------------------------------------------------------------------------- faults of usage


@pytest.mark.parametrize(
    "args, message",
    [
        ("rnu", "unknown command 'rnu'; did you mean 'run'?"),
        ("--versoin", "unknown option '--versoin'; did you mean '--version'?"),
        ("run", "`posttrain run` needs a recipe: posttrain run RECIPE; known: "),
        ("run instructgtp", "unknown recipe 'instructgtp'; did you mean 'instructgpt'?"),
        ("run nowhere.at.all:x", "can't import 'nowhere.at.all:x'"),
        ("run toys:chian", "'toys' has no 'chian'; did you mean 'chain'?"),
        ("run toys:total", "recipe 'toys:total' needs --path PATH"),
        (f"run {CHAIN} --frist.steps 3", "unknown stage 'frist' in '--frist.steps'; did you mean 'first'?"),
        (f"run {CHAIN} --first.step 3", "stage 'first' has no field 'step'; did you mean 'steps'?"),
        (f"run {CHAIN} --first.steps abc", "--first.steps: got 'abc', expected int"),
        (f"run {CHAIN} --first.rate nan", "--first.rate: got 'nan', expected float"),
        (f"run {CHAIN} --first.flip maybe", "--first.flip: got 'maybe', expected true or false"),
        (f"run {CHAIN} --first.mode sideways", "--first.mode: got 'sideways', expected 'up' or 'down'"),
        (f"run {CHAIN} --first.betas 1,x", "--first.betas: got '1,x', expected tuple[float, ...]"),
        (f"run {CHAIN} --second.start first", "--second.start: got 'first', expected Stage or none"),
        (f"run {CHAIN} --first.steps", "--first.steps needs a value: int"),
        (
            f"run {CHAIN} --widht 3",
            "unknown option '--widht' of recipe 'toys:chain'; did you mean '--width'?",
        ),
        (
            f"run {CHAIN} --dryrun",
            "unknown option '--dryrun' of recipe 'toys:chain'; did you mean '--dry-run'?",
        ),
        (
            f"run {CHAIN} --steps 3",
            "unknown option '--steps' of recipe 'toys:chain'; did you mean '--first.steps'?",
        ),
        (f"run --dryrun {CHAIN}", "unknown option '--dryrun' of `posttrain run`; did you mean '--dry-run'?"),
        (f"run {CHAIN} --model tyo", "unknown model 'tyo'; did you mean 'toy'?"),
        (f"run {CHAIN} --data defualt", "unknown data 'defualt'; did you mean 'default'?"),
        (f"run {CHAIN} --data-file none.jsonl", "can't read the data file 'none.jsonl'"),
        (f"run {CHAIN} --until lsat", "unknown stage 'lsat'; did you mean 'last'?"),
        (f"run {CHAIN} --name a/b", "got the run name 'a/b'"),
        (f"run {CHAIN} --seed 1 --seed 2", "--seed is given twice"),
        (f"run {CHAIN} --seed x", "--seed: got 'x', expected int"),
        (f"run {CHAIN} --tiny=yes", "--tiny takes no value; got 'yes'"),
        (f"run {CHAIN} extra", "unexpected 'extra'"),
        (f"run {CHAIN} -x", "unknown option '-x'; options start with --"),
        ("show nothing", "no run 'nothing'"),
        ("chat nothing", "no run 'nothing'"),
        ("show", "`posttrain show` needs a run: posttrain show RUN"),
        ("list recipse", "unknown kind 'recipse'; did you mean 'recipes'?"),
        ("list losses methods", "unexpected 'methods'"),
        ("doctor --jsn", "unknown option '--jsn' of `posttrain doctor`; did you mean '--json'?"),
    ],
)
def test_a_fault_of_usage_is_one_line_and_exit_status_2(
    args: str, message: str, capfd: pytest.CaptureFixture[str], here: Path
):
    assert cli.main(args.split()) == 2
    output = capfd.readouterr()
    assert output.err.startswith(f"posttrain: {message}") and output.err.count("\n") == 1 and output.out == ""
    assert not list(here.iterdir())


def test_an_error_of_a_stage_is_one_line(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["run", CHAIN, "--fault", "config"]) == 2
    assert capsys.readouterr().err == "posttrain: a name that nobody knows\n"


def test_an_unknown_run_is_compared_with_those_there(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["run", CHAIN, "--name", "monday"]) == 0
    assert cli.main(["show", "mondya"]) == 2
    assert "did you mean 'monday'?" in capsys.readouterr().err
    assert cli.find_run("monday") == cli.find_run("runs/monday") == Path("runs/monday")


# ---------------------------------------------------------------------------- what works


def test_options_and_overrides_reach_the_stages(capsys: pytest.CaptureFixture[str]):
    text = "--width 4 --name x --seed=1 --second.rate -0.5 --first.label none --last.flip TRUE --first.mode down"
    text += " --last.betas 0.5,0.25 --until last --second.label a,b"
    assert cli.main(["run", CHAIN, *text.split()]) == 0
    first, second, last = (described(name, "x")["config"] for name in ("first", "second", "last"))
    assert (first["steps"], first["label"], first["mode"]) == (4, None, "down")
    assert (second["rate"], second["label"]) == (-0.5, "a,b")
    assert (last["flip"], last["betas"]) == (True, [0.5, 0.25])
    # first: 4 steps of 2; second: 8 + 3 steps of -1
    assert total(Path("runs/x/second")) == 5
    assert "[3/3] last: done" in capsys.readouterr().out


def test_a_dry_run_writes_nothing(capsys: pytest.CaptureFixture[str], here: Path):
    assert cli.main(["run", CHAIN, "--dry-run", "--tiny"]) == 0
    assert "forecast" in capsys.readouterr().out and not list(here.iterdir())


@pytest.mark.parametrize("args", ["", "--help", "-h", "help", "run --help", "show -h", "list --help", "doctor --help"])
def test_help_is_no_error(args: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(args.split()) == 0
    assert capsys.readouterr().out.startswith("usage: posttrain")


def test_help_of_a_recipe_lists_its_options_and_fields(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["run", CHAIN, "--help"]) == 0
    output = capsys.readouterr().out
    assert "  --width int (now 2)" in output
    assert "  --second.mode 'up' or 'down' (now 'up')" in output
    assert "stage last (Count, reads start=second, others.0=first, others.1=second):" in output
    assert "--last.start" not in output


@pytest.mark.parametrize(("kind", "names"), [("recipes", RECIPES), ("methods", METHODS)])
def test_recipes_and_methods_are_listed_without_torch(kind: str, names: Registry):
    code = f"import sys; from posttrain.cli import main; code = main(['list', '{kind}']); "
    code += "sys.exit(code or 9 * any(name in sys.modules for name in ('torch', 'transformers', 'tyro')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"(?m)^ (\w+) {3,}\w", done.stdout)[1:] == sorted(names)  # the first is the header


def test_everything_is_listed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main(["list"]) == 0
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 100
    heads = re.findall(r"(?m)^[A-Z].*$", output)
    assert heads[:2] == ["Recipes: posttrain run RECIPE", "Methods: posttrain train METHOD"]
    assert {"Preference losses", "Policy losses", "KL penalties", "Objectives"} <= set(heads)
    for registry in (RECIPES, METHODS, *loss_registries(), objectives):
        assert all(re.search(rf"(?m)^ {name} ", output) for name in registry)
    assert cli.main(["list", "losses"]) == 0
    assert capsys.readouterr().out in output


def test_a_loss_is_listed_with_formula_needs_and_paper():
    rows = {row[0]: row for grid in loss_grids() for row in grid.rows}
    assert rows["dpo"] == (
        "dpo", "reference\npairs",
        "DPO: -log sigmoid(beta D), D the margin of log-ratios between chosen and rejected.\n"
        "Rafailov et al. 2023, Direct preference optimization, arXiv 2305.18290",
    )  # fmt: skip
    assert rows["aot"][1] == "reference, whole step\npairs"
    assert rows["reward_aware_po"][1] == "reference\npairs with scores" and rows["simpo"][1] == "–\npairs"
    assert rows["sppo"][1] == "reference\nlists with win rates" and rows["d2o"][1] == "reference\nlists"
    assert rows["tdpo2"][1] == "reference, each token's KL to the reference\npairs"
    assert rows["kto"][1] == "reference, whole step\nlabelled answers" and rows["gae"][1] == "–"
    assert rows["ppo_clip"][1:] == (
        "–\nfresh samples",
        "Clipped surrogate max(-A rho, -A clip(rho, 1 - clip, 1 + clip)).\n"
        "Schulman et al. 2017 (PPO), eq. 7, as a loss.",
    )


def test_the_line_that_stops_a_run_repeats_the_command(here: Path):
    args = [sys.executable, "-m", "posttrain.cli", "run", CHAIN, "--fault", "ctrl-c", "--first.label", "a b"]
    done = subprocess.run(args, capture_output=True, text=True, env={"PYTHONPATH": str(HERE)})
    assert done.returncode == 130 and done.stderr == ""
    again = "python -m posttrain.cli run toys:chain --fault ctrl-c --first.label 'a b'"
    assert done.stdout.splitlines()[-1].endswith(again)
    assert json.loads(Path("runs/chain/run.json").read_text())["command"] == again


def test_version(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == "posttrain 0.1.0\n"


def test_doctor_reports_numbers(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"].startswith("2.") and found["cpu"]["cores"] >= 1
    assert 0.1 < found["speed"]["fp32"] < 1e6 and 0.01 < found["speed"]["bf16"] < 1e6
    assert found["disk"]["free"] > 0 and found["memory"]["total"] > 0.1
    assert {"tensorboard", "test"} <= set(found["extras"])


def test_doctor_prints_the_command_that_installs_what_is_missing(capsys: pytest.CaptureFixture[str]):
    from rich.console import Console

    from posttrain.doctor import examine, print_report

    found = examine()
    command = "python -m pip install 'judge>=2'"
    found["extras"] = {"judge": {"present": False, "missing": ["judge>=2"], "install": command}}
    print_report(found, Console(width=60))
    output = capsys.readouterr().out
    assert f"extra judge: {command}\n" in output and "missing judge>=2" in output


# ---------------------------------------------------------------------------- conversion


@pytest.mark.parametrize(
    "text, kind, value",
    [
        ("3", int, 3),
        ("1e-5", float, 1e-5),
        ("2", float | None, 2.0),
        ("None", float | None, None),
        ("4", int | float, 4),
        ("4.5", int | float, 4.5),
        ("4", str | int, 4),
        ("x=1,2", str, "x=1,2"),
        ("False", bool, False),
        ("a/b", Path, Path("a/b")),
        ("1,2", list[int], [1, 2]),
    ],
)
def test_text_becomes_the_annotated_type(text: str, kind: object, value: object):
    found = convert(text, kind, "x")
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text, kind", [("3.5", int), ("", int), ("true", int), ("1", bool), ("x", int | None)])
def test_text_of_another_type_is_refused(text: str, kind: object):
    with pytest.raises(ConfigError, match=f"got '{text}', expected"):
        convert(text, kind, "x")
