"""``posttrain score``, ``serve`` and ``eval reward`` as they are typed, on a reward model of two layers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from data.conftest import smol
from posttrain import cli
from posttrain.cli_reward import gather_models
from posttrain.data.load import read
from posttrain.models.load import new_reward, save_merged
from posttrain.rewards.panel import load_panel
from posttrain.rewards.remote import remote_scores
from posttrain.work.reward_bench import comparable, read_tests
from tiny import plain_net

TOKEN = "a-token-of-the-tests"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("rewards")
    plain_net(dtype=torch.float32, vocab_size=512, pad_token_id=9).save_pretrained(home / "base")
    for k in (1, 2):
        model = new_reward(str(home / "base"), dtype=torch.float32, seed=k)
        save_merged(model, str(home / "base"), home / f"rm{k}", smol())
        (home / f"rm{k}" / "reward.json").write_text('{"mean": 0.5}')
    pairs = [
        {"prompt": f"Count to {n}.", "chosen": "one, " * n + "done!", "rejected": "No " * (9 - n), "kind": kind}
        for n, kind in enumerate(("plain", "hard") * 4)
    ]
    write(home / "pairs.jsonl", pairs)
    write(
        home / "styled.jsonl",
        [
            {
                "subset": "chat",
                "prompt": f"{n}?",
                "chosen": ["a", "b b", f"**c** {n}"],
                "rejected": ["x", "y y", f"**z** {n}"],
            }
            for n in range(4)
        ],
    )
    write(
        home / "rated.jsonl",
        [{"prompt": f"Rate {n}.", "completion": "word " * (n + 1), "score": n % 3} for n in range(9)],
    )
    golden = [
        {
            "prompt": [{"role": "user", "content": f"Say {n}."}],
            "responses": [
                {"messages": [{"role": "assistant", "content": "w " * (k + 1)}], "score": (k * 7 + n) % 5 / 4}
                for k in range(8)
            ],
        }
        for n in range(6)
    ]
    write(home / "golden.jsonl", golden)
    return home


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "150")
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    status = cli.main([str(a) for a in args])
    said = capsys.readouterr()
    return status, said.out, said.err


@pytest.mark.parametrize(
    "args, message",
    [
        ("score", "`posttrain score` needs a model: posttrain score MODEL FILE"),
        ("score nowhere pairs.jsonl", "no file 'pairs.jsonl'"),
        ("score nowhere x --out y.jsonl", "no reward model in 'nowhere' (no reward.json)"),
        ("score nowhere x --out y.csv", "expected a name ending in .jsonl"),
        ("score a x --out y.jsonl --rule medain", "unknown ensemble rule 'medain'; did you mean 'mean'?"),
        ("serve nowhere", "no reward model in 'nowhere'"),
        ("eval reward", "`posttrain eval` needs a model: posttrain eval WHAT MODEL"),
        ("eval reward a", "needs test data: posttrain eval reward MODEL... --data FILE..."),
        ("eval rewrad a --data x", "unknown evaluation 'rewrad'; did you mean 'reward'?"),
        ("eval reward a b --data x", "no reward model in 'a'"),
    ],
)
def test_faults_of_usage_are_one_line(args, message, capsys):
    status, out, err = run(capsys, *args.split())
    assert (status, out, err.count("\n")) == (2, "", 1) and message in err


def test_several_models_and_files_are_one_argument_each():
    typed = ["reward", "a", "b,c", "--limit", "3", "--data", "x", "y", "--out", "z"]
    assert gather_models(typed) == ["reward", "a\x1fb,c", "--limit", "3", "--data=x\x1fy", "--out", "z"]
    assert gather_models([]) == []


def test_score_writes_data_that_the_library_reads(home, capsys):
    status, out, _ = run(capsys, "score", home / "rm1", home / "pairs.jsonl", "--limit", 5)
    assert status == 0 and out == "pairs.scored.jsonl: 5 examples, 10 answers scored\n"
    panel = load_panel(str(home / "rm1"), dtype=torch.float32)
    given = panel.score(read(home / "pairs.jsonl", limit=5))
    for example, wanted in zip(read("pairs.scored.jsonl"), given, strict=True):
        assert [r.score for r in example.responses] == pytest.approx(wanted.scores, abs=1e-5)
    status, out, err = run(capsys, "score", home / "rm1", home / "pairs.jsonl", "--limit", 5)
    assert status == 2 and "is there already" in err
    both = f"{home / 'rm1'},{home / 'rm2'}"
    status, out, _ = run(capsys, "score", both, home / "pairs.jsonl", "--rule", "minimum", "--out", "both.jsonl")
    least = [
        [min(a, b) for a, b in zip(x.scores, y.scores, strict=True)]
        for x, y in zip(
            panel.score(read(home / "pairs.jsonl")),
            load_panel(str(home / "rm2"), dtype=torch.float32).score(read(home / "pairs.jsonl")),
            strict=True,
        )
    ]
    for example, wanted in zip(read("both.jsonl"), least, strict=True):
        assert [r.score for r in example.responses] == pytest.approx(wanted, abs=1e-5)
        assert all("disagreement" in r.attributes for r in example.responses)


def test_what_can_be_compared(tmp_path):
    rows = [
        {"prompt": "a", "completion": "1", "score": 1},
        {"prompt": "a", "completion": "2", "score": 3},
        {"prompt": "b", "completion": "1", "score": 1},
        {"prompt": "c", "completion": "x", "score": 2},
        {"prompt": "c", "completion": "y", "score": 2},
    ]
    write(tmp_path / "rated.jsonl", rows)
    found, left_out = comparable(read(tmp_path / "rated.jsonl"))
    assert [[r.rank for r in e.responses] for e in found] == [[1, 0]]
    assert left_out == {"prompts with one answer": 1, "rows all tied": 1}
    tests = read_tests([str(tmp_path / "rated.jsonl")])
    assert (len(tests.examples), len(tests.rated), tests.subsets) == (1, 5, ["rated"])


def test_eval_reward_measures_models_side_by_side(home, capsys):
    both = f"{home / 'rm1'},{home / 'rm2'}"
    files = [home / name for name in ("pairs.jsonl", "styled.jsonl", "rated.jsonl")]
    command = ["eval", "reward", home / "rm1", both, "--data", *files, "--train", home / "pairs.jsonl"]
    status, out, err = run(capsys, *command, "--best-of", home / "golden.jsonl", "--edits", 4, "--out", "found")
    assert status == 0, err
    results = json.loads(Path("found/results.json").read_text())
    models = results["models"]
    assert list(models) == ["rm1", "rm1 and 1 more", "length (longer is better)", "bag of words"]
    one = models["rm1"]
    assert list(one["accuracy"]) == ["all", "plain", "hard", "chat"]
    assert [one["accuracy"][s]["pairs"] for s in one["accuracy"]] == [8 + 36, 4, 4, 36]
    panel = load_panel(str(home / "rm1"), dtype=torch.float32)
    scores = [s.scores for s in panel.score(read(home / "pairs.jsonl"))]
    right = [a > b for a, b in scores]
    assert one["accuracy"]["plain"]["accuracy"] == pytest.approx(sum(right[::2]) / 4)
    assert one["styles"]["chat"]["rows"] == 4 and len(one["styles"]["chat"]["matrix"]) == 3
    assert "disagreement" not in one and models["rm1 and 1 more"]["disagreement"]["gap_deviation"] > 0
    assert 0 <= one["outliers"]["auroc_shuffled"] <= 1
    assert [row["n"] for row in one["best_of_n"]["curve"]] == [1, 2, 4, 8]
    assert one["best_of_n"]["curve"][0]["gold"] == pytest.approx(
        sum(r.score or 0 for e in read(home / "golden.jsonl") for r in e.responses) / 48
    )
    assert len(one["edits"]) == 7 and one["ratings"]["rated"]["n"] == 9
    length = models["length (longer is better)"]
    assert length["correlations"]["length"]["mean"] == pytest.approx(1)
    assert length["baseline"] and "edits" not in length
    page = Path("found/report.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and "<script" not in page
    for title in ("in the right order", "By style", "Calibration", "Edits", "best of n", "Agreement with ratings"):
        assert title in out and title in page, title


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_prints_where_it_is_and_stops_when_asked(home, number):
    command = [sys.executable, "-m", "posttrain.cli", "serve", str(home / "rm1"), "--port", "0"]
    given = ["--token", TOKEN] if number == signal.SIGTERM else []
    process = subprocess.Popen([*command, *given], stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        url, token = line.split()[2].rstrip(","), TOKEN if given else line.split()[-1]
        assert len(token) >= 16 and (TOKEN not in line)
        examples = read(home / "pairs.jsonl", limit=3)
        wanted = [s.scores for s in load_panel(str(home / "rm1"), dtype=torch.float32).score(examples)]
        got = remote_scores(url, token, examples)
        assert [x for row in got for x in row] == pytest.approx([x for row in wanted for x in row], abs=1e-5)
        process.send_signal(number)
        rest, _ = process.communicate(timeout=60)
        assert process.returncode == 0 and "every request that was taken is answered" in rest
    finally:
        process.kill()
        time.sleep(0)
