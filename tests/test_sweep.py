from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from measured import calls
from posttrain import cli
from posttrain.cli_runs import SEPARATOR, gather
from posttrain.errors import ConfigError
from posttrain.evals.sweep_view import NO_DIFFERENCE, sweep_grid, sweep_png
from posttrain.evals.tables import rich_grid
from posttrain.registry import RECIPES
from posttrain.sweep import Point, check_points, find_baseline, grid

SWEEP = Path("runs/s")
PNG = b"\x89PNG\r\n\x1a\n"

pytestmark = pytest.mark.usefixtures("here")


def command(text: str) -> int:
    return cli.main(text.split())


def sweep(text: str) -> int:
    return command(f"sweep measured:measured --name s {text}")


def found() -> dict[str, Any]:
    return json.loads((SWEEP / "sweep.json").read_text())


def table(width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(rich_grid(sweep_grid(found())))
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]


# ---------------------------------------------------------------------------- points


def test_values_are_gathered_and_make_a_grid():
    text: str = "r --tune.beta 0.05 -0.1 --seeds 2 --dry-run --start.size=3 --tune.effect 1"
    args = gather([*text.split()])
    assert args == [
        "r",
        f"--tune.beta=0.05{SEPARATOR}-0.1",
        "--seeds",
        "2",
        "--dry-run",
        "--start.size=3",
        "--tune.effect=1",
    ]
    assert grid({"a": ["1", "2"], "b": ["x", "y"]}) == [
        {"a": "1", "b": "x"}, {"a": "1", "b": "y"}, {"a": "2", "b": "x"}, {"a": "2", "b": "y"},
    ]  # fmt: skip
    assert grid({}) == [{}]


def test_points_have_names_for_directories_and_labels_for_tables():
    recipe = RECIPES["measured:measured"]()
    point = Point(options={"tune.beta": "1e-4", "data": "a b/c.jsonl"}, recipe=recipe)
    assert point.name == "beta-1e-4_data-a-b-c.jsonl" and point.label == "tune.beta 1e-4\ndata a b/c.jsonl"
    assert Point(options={}, recipe=recipe).name == "as-given"
    points = [Point(options={"tune.beta": value}, recipe=recipe) for value in ("0.1", "0.2")]
    for asked in ("0.2", "beta-0.2", "tune.beta 0.2"):
        assert find_baseline(points, asked) is points[1]
    with pytest.raises(ConfigError, match=r"under the name 'data-x'"):
        other = cli.build_recipe("measured:measured", {"tune.beta": "0.7"})
        check_points([Point(options={"data": "x"}, recipe=recipe), Point(options={"data": "x/"}, recipe=other)], False)


# ---------------------------------------------------------------------------- runs


def test_a_sweep_runs_what_is_missing_and_shares_what_is_the_same(capsys: pytest.CaptureFixture[str]):
    assert sweep("--tune.beta 0.1 0.2 --seeds 2") == 0
    first = [
        f"beta-{beta}-seed{seed}/{stage}"
        for seed in (0, 1)
        for beta in (0.1, 0.2)
        for stage in ("start", "tune", "measure")
    ]
    assert calls(SWEEP) == [one for one in first if "0.2" not in one or "start" not in one]  # start has the same key
    assert (SWEEP / "beta-0.2-seed1" / "start" / "model.safetensors").read_bytes() == bytes(4)
    output = capsys.readouterr().out
    assert (
        re.search(r"\[2/4\] tune.beta 0.2, seed 0: \d\.\d s \(start shared\)\n", output) and "Traceback" not in output
    )
    assert "[1/3] start: starts" in (SWEEP / "beta-0.1-seed0.log").read_text()
    assert sweep("--tune.beta 0.1 0.2 0.3 --seeds 2") == 0  # one more point; what is finished is skipped
    assert calls(SWEEP) == [f"beta-0.3-seed{seed}/{stage}" for seed in (0, 1) for stage in ("tune", "measure")]
    assert capsys.readouterr().out.count("finished earlier, skipped") == 4
    assert (SWEEP / "sweep.png").read_bytes().startswith(PNG)


def test_a_run_of_a_sweep_is_the_run_it_would_be_alone(capsys: pytest.CaptureFixture[str]):
    assert sweep("--tune.beta 0.1 0.2 --seeds 1") == 0
    assert command("run measured:measured --tune.beta 0.2 --name alone") == 0
    assert command("diff s/beta-0.2-seed0 alone") == 0
    assert "equal to the bit" in capsys.readouterr().out


def test_a_sweep_cut_off_goes_on(capsys: pytest.CaptureFixture[str]):
    sweeping = "sweep toys:chain --name s --second.rate 1 2 --seeds 1 --fault ctrl-c"
    with pytest.raises(SystemExit) as stopped:
        command(sweeping)
    assert stopped.value.code == 130
    assert "stopped by Ctrl-C in stage 'second' of runs/s/rate-1-seed0" in capsys.readouterr().out
    assert found() == {"schema": 1, "recipe": "chain", "fixed": {"fault": "ctrl-c"}, "tiny": False}
    with pytest.raises(SystemExit):  # the first point goes on and ends; the second one is struck in its turn
        command(sweeping)
    assert "[1/2] second.rate 1, seed 0: " in capsys.readouterr().out
    assert command(sweeping) == 2  # all runs are done, and this recipe measures nothing
    assert "measured nothing to compare" in capsys.readouterr().err


def test_a_sweep_is_shown_again_once_it_ended(capsys: pytest.CaptureFixture[str]):
    assert sweep("--tune.beta 0.1 0.5 --seeds 3") == 0
    printed = capsys.readouterr().out
    assert command("show s") == 0 and command("show runs/s") == 0
    shown = capsys.readouterr().out
    assert printed.endswith(shown[: len(shown) // 2]) and "higher" in shown
    assert "numbers  runs/s/sweep.json\nruns     runs/s/POINT-seedN\n" in shown
    plan = {key: found()[key] for key in ("schema", "recipe", "fixed", "tiny")}
    (SWEEP / "sweep.json").write_text(json.dumps(plan))
    assert command("show s") == 2
    assert "runs/s is a sweep that was cut off; repeat its command" in capsys.readouterr().err


def test_a_failing_point_is_named_and_the_others_go_on(capsys: pytest.CaptureFixture[str]):
    assert sweep("--tune.beta 0.1 2 --seeds 3") == 1
    output = capsys.readouterr().out
    assert "[2/6] tune.beta 2, seed 0: failed: beta 2.0 blew up; expected less\n" in output
    assert "beta-2-seed1 failed: beta 2.0 blew up; expected less" in " ".join(output.split())
    (entry,) = found()["comparisons"]
    assert (entry["seeds"], entry["mean"], entry["p"], entry["shown"]) == (0, None, None, False)
    assert "failed\n" in table(80) and (SWEEP / "sweep.png").read_bytes().startswith(PNG)


def test_values_that_tiny_sets_itself_can_be_swept():
    assert sweep("--start.size 1 2 --tiny --seeds 1") == 0
    sizes = [(SWEEP / f"size-{size}-seed0" / "start" / "model.safetensors").stat().st_size for size in (1, 2)]
    assert sizes == [1, 2]


def test_a_dry_run_lists_the_points_and_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]):
    assert sweep("--tune.beta 0.1 0.2 --seeds 3 --dry-run --baseline 0.2") == 0
    output = capsys.readouterr().out
    assert "6 runs (2 points with 3 seeds), each at most as above:\n  runs/s/beta-0.1-seed0 to 2\n" in output
    assert "  runs/s/beta-0.2-seed0 to 2 (baseline)\n" in output and not list(here.iterdir())


# ---------------------------------------------------------------------------- what is shown


def test_a_large_effect_is_shown_and_a_nil_one_is_not():
    assert sweep("--tune.beta 0.1 0.5 1 --seeds 3") == 0
    record = found()
    assert record["metric"] == "policies/tuned/reward" and record["baseline"] == "beta-0.1"
    assert [entry["unit"] for entry in record["comparisons"]] == ["seed", "seed"]
    for entry, gain in zip(record["comparisons"], (0.4, 0.9), strict=True):
        assert entry["low"] < entry["mean"] < entry["high"] and entry["mean"] == pytest.approx(gain, abs=0.03)
        assert entry["shown"] and entry["p_holm"] >= entry["p"]
    values = record["points"][0]["values"]
    spread = max(values) - min(values)  # pairing by seed takes it out
    assert spread > 5 * (entry["high"] - entry["low"])
    assert record["points"][0]["numbers"]["tune:loss/nll"][0] is not None
    (SWEEP / "sweep.json").unlink()
    assert sweep("--tune.beta 0.1 0.5 1 --seeds 3 --metric policies/start/reward") == 0
    assert {entry["mean"] for entry in found()["comparisons"]} == {0.0}
    assert table(80).count("no difference") == 2


def test_an_interval_around_zero_is_no_difference_shown():
    assert command("sweep measured:measured --name s --effect 0 --tune.beta 0.1 0.2 --seeds 4") == 0
    (entry,) = found()["comparisons"]
    assert entry["low"] < 0 < entry["high"] and entry["p"] > 0.05 and not entry["shown"]
    assert NO_DIFFERENCE == "no difference shown"
    text = table(100)
    assert "no difference" in text and "assume roughly normal differences" in text
    assert "p corrected by Holm for 1 comparison" in text


@pytest.mark.parametrize("seeds", [1, 2])
def test_with_one_or_two_seeds_prompts_are_resampled_and_it_is_said(seeds: int):
    assert sweep(f"--tune.beta 0.1 0.5 --seeds {seeds}") == 0
    (entry,) = found()["comparisons"]
    assert (entry["unit"], entry["n"], entry["shown"]) == ("prompt", 12, True)
    text = " ".join(table(100).split())
    assert f"with {seeds} seed{'s' * (seeds > 1)} no interval over seeds can be given: that takes 3" in text
    assert "interval by bootstrap over 12 held-out prompts, paired; says nothing of other seeds" in text


def test_without_rows_two_seeds_give_no_interval():
    assert command("sweep measured:measured --name s --rows false --tune.beta 0.1 0.5 --seeds 2") == 0
    (entry,) = found()["comparisons"]
    assert entry["unit"] is None and entry["low"] is None and entry["p"] is None and entry["mean"] > 0.3
    assert "no interval" in table(80) and "that takes 3" in table(80)


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_the_terminal(width: int):
    assert sweep("--tune.beta 0.1 0.5 --tune.steps 2 3 --seeds 3") == 0
    lines = table(width).splitlines()
    assert max(map(len, lines)) <= width
    assert lines[0] == "policies/tuned/reward, mean of 3 seeds"
    rows = [line for line in lines if line.startswith((" tune.beta", "tune.beta"))]
    assert len(rows) == 4 and "baseline" in rows[0] and "higher" in rows[2] and "no difference" in rows[1]


def test_one_point_has_a_mean_and_no_comparison():
    assert sweep("--seeds 2") == 0
    assert found()["comparisons"] == [] and "as given" in table(80) and sweep_png(found()).startswith(PNG)


# ---------------------------------------------------------------------------- faults of usage


@pytest.mark.parametrize(
    "args, message",
    [
        ("sweep", "`posttrain sweep` needs a recipe: posttrain sweep RECIPE; known: "),
        ("sweep instructgtp --sft.lr 1 2", "unknown recipe 'instructgtp'; did you mean 'instructgpt'?"),
        ("sweep measured:measured --tuen.beta 1 2", "unknown stage 'tuen' in '--tuen.beta'; did you mean 'tune'?"),
        ("sweep measured:measured --tune.bta 1 2", "stage 'tune' has no field 'bta'; did you mean 'beta'?"),
        ("sweep measured:measured --tune.beta 0.1 x", "--tune.beta: got 'x', expected float"),
        ("sweep measured:measured --tune.beta", "--tune.beta needs a value: float"),
        ("sweep measured:measured --beta 1 2", "unknown option '--beta' of recipe 'measured:measured'; did you mean '--tune.beta'?"),
        ("sweep measured:measured --tune.beta 0.1 0.10", "tune.beta 0.1 and tune.beta 0.10 would run the same: a value stands there twice"),
        ("sweep measured:measured --tune.beta 0.1 0.2 --seeds 0", "got 0 seeds; expected at least 1, and 3 for an interval over seeds"),
        ("sweep measured:measured --tune.beta 0.1 0.2 --seeds x", "--seeds: got 'x', expected int"),
        ("sweep measured:measured --tune.beta 0.1 0.2 --baseline 0.3", "no point '0.3' to compare with; known: beta-0.1, beta-0.2"),
        ("sweep measured:measured --tune.beta 0.1 0.2 --name a/b", "got the run name 'a/b'"),
        ("sweep measured:measured --data none.jsonl --tune.beta 0.1 0.2", "can't read the data file 'none.jsonl'"),
        ("sweep toys:chain --last.label nobody --last.rate 1 2", "unknown label 'nobody'; expected somebody"),
        ("sweep measured:measured extra --tune.beta 0.1 0.2", "unexpected 'extra'"),
    ],
)  # fmt: skip
def test_a_fault_of_usage_is_one_line_and_writes_nothing(
    args: str, message: str, capsys: pytest.CaptureFixture[str], here: Path
):
    assert cli.main(args.split()) == 2
    output = capsys.readouterr()
    assert output.err.startswith(f"posttrain: {message}") and output.err.count("\n") == 1 and output.out == ""
    assert not list(here.iterdir())


def test_a_wrong_metric_lists_those_there_after_one_run(capsys: pytest.CaptureFixture[str]):
    assert sweep("--tune.beta 0.1 0.2 --metric policies/tuned/rewrad") == 2
    error = capsys.readouterr().err
    assert error == (
        "posttrain: unknown metric 'policies/tuned/rewrad'; did you mean 'policies/tuned/reward'? known: "
        "differences/tuned - start/reward, policies/start/reward, policies/tuned/reward, tune:loss/nll, tune:optim/lr\n"
    )
    assert len(calls(SWEEP)) == 3
    assert sweep("--tune.beta 0.1 0.2 --metric reward --seeds 1") == 2
    assert "may be policies/start/reward or policies/tuned/reward or differences" in capsys.readouterr().err
    assert sweep("--tune.beta 0.1 0.2 --metric tuned/reward --seeds 1") == 0
    assert found()["metric"] == "policies/tuned/reward"


def test_a_directory_of_another_sweep_or_of_a_run_is_left_alone(capsys: pytest.CaptureFixture[str]):
    assert sweep("--tune.beta 0.1 0.2 --seeds 1") == 0
    capsys.readouterr()
    assert sweep("--tune.beta 0.1 0.2 --seeds 1 --tune.effect 3") == 2
    line = "runs/s is a sweep with no options beside the swept ones, not --tune.effect 3; choose another --name"
    assert capsys.readouterr().err == f"posttrain: {line}\n"
    assert command("run measured:measured --name t") == 0
    capsys.readouterr()
    assert command("sweep measured:measured --name t --tune.beta 0.1 0.2") == 2
    assert capsys.readouterr().err == "posttrain: runs/t is a single run; choose another --name\n"
