"""`posttrain compare`: losses on the same rows as ordinary runs, one table, one picture."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from caches import own_cache
from posttrain.cli import main
from posttrain.cli_compare import gather_losses, prepared, read_loss, target
from posttrain.cli_runs import SEPARATOR
from posttrain.data import read
from posttrain.data.views import best_and_worst
from posttrain.errors import ConfigError
from posttrain.evals.compare_view import compare_grid, compare_page, compare_png, over_seeds
from posttrain.evals.tables import rich_grid
from posttrain.stages import Prefer, PreferLabelled
from posttrain.types import Example, Message, Response

WORDS = ["tree", "stone", "river", "cloud", "apple", "horse", "chair", "lamp", "boat", "bread", "snow", "wind"]
PAIRS = [
    {"prompt": f"copy these words: {w}", "chosen": f"{w}.", "rejected": f"go away, not {w}"} for w in WORDS
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        own_cache(patch, folder / "cache")
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
        yield folder


COMMAND = (
    "compare dpo:beta=0.5 --data pairs.jsonl simpo kto --model small --lora-rank 0 --lr 1e-3 --epochs 1 --seeds 1 "
    "--measure.max-new-tokens 8"
)


@pytest.fixture(scope="module")
def found(folder):
    assert main(COMMAND.split()) == 0
    return json.loads((folder / "runs/compare/sweep.json").read_text())


def test_every_loss_is_an_ordinary_run_on_the_same_rows(folder: Path, found, capsys: pytest.CaptureFixture[str]):
    runs = folder / "runs/compare"
    assert [p["options"]["loss"] for p in found["points"]] == ["dpo:beta=0.5", "simpo", "kto"]
    dpo = json.loads((runs / "loss-dpo-beta-0.5-seed0/run.json").read_text())
    assert dpo["stages"]["train"]["config"]["options"] == {"beta": 0.5}
    steps = [
        len((runs / f"loss-{name}-seed0/train/metrics.jsonl").read_text().splitlines()) for name in ("simpo", "kto")
    ]
    (data,) = runs.glob("data-*")
    held, trained = (read(data / f"{part}.jsonl") for part in ("heldout_rankings", "rankings"))
    assert len(held) + len(trained) == len(PAIRS) and not {e.prompt_key for e in held} & {e.prompt_key for e in trained}
    assert steps == [-(-len(trained) // 8), -(-2 * len(trained) // 8)]
    labels = [e.responses[0].label for e in read(data / "labelled.jsonl")]
    assert labels == [True, False] * len(trained)
    assert main(COMMAND.split()) == 0
    assert capsys.readouterr().out.count("finished earlier, skipped") == 3


def test_single_answers_are_the_best_and_the_worst_of_a_row():
    def answer(text, rank, score):
        return Response(messages=(Message(role="assistant", content=text),), rank=rank, score=score)

    def row(*scores):
        answers = tuple(answer(f"answer {k}", k, s) for k, s in enumerate(scores))
        return Example(prompt=(Message(role="user", content="say"),), responses=answers)

    def told(example):
        return [(r.text, r.label, r.score, r.rank) for e in best_and_worst([example]) for r in e.responses]

    assert told(row(None, None, None)) == [("answer 0", True, 1.0, None), ("answer 2", False, 0.0, None)]
    assert told(row(3.0, 2.0, -1.0)) == [("answer 0", True, 3.0, None), ("answer 2", False, -1.0, None)]
    assert told(row(3.0, None)) == [("answer 0", True, 1.0, None), ("answer 1", False, 0.0, None)]


def test_the_table_says_what_each_loss_did(found):
    numbers = found["points"][0]["numbers"]
    assert numbers["policies/start/margin"] == [0.0] and numbers["policies/start/accuracy"] == [0.5]
    assert numbers["policies/start/kl"] == [0.0] and numbers["policies/trained/kl"][0] > 0
    assert numbers["policies/trained/margin"][0] > 0.1 and numbers["policies/trained/accuracy"][0] > 0.5
    grid = compare_grid(found)
    assert [row[0] for row in grid.rows] == [
        "dpo:beta=0.5\nlog-ratio of answers", "simpo\nlog-prob a token", "kto\ngood up, bad down",
    ]  # fmt: skip
    assert all(len(row) == len(grid.header) == 8 and "–" not in row for row in grid.rows)
    console = Console(file=io.StringIO(), width=100)
    console.print(rich_grid(grid))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "with 1 seed no interval over seeds can be given" in text and "log-ratio of answers" in text


def test_the_picture_the_page_and_the_record_show_it_again(folder: Path, found, capsys: pytest.CaptureFixture[str]):
    runs = folder / "runs/compare"
    assert (runs / "compare.png").read_bytes().startswith(b"\x89PNG\r\n") and compare_png(found).startswith(b"\x89PNG")
    page = (runs / "compare.html").read_text()
    assert page == compare_page(found) and "<script" not in page and "dpo:beta=0.5" in page
    assert main(["show", "compare"]) == 0
    assert "Preference losses on the same rows, mean of 1 seed" in capsys.readouterr().out


def test_intervals_over_seeds_are_wider_than_the_values():
    few = over_seeds([1.0, 2.0])
    assert few.mean == 1.5 and few.low == -float("inf")
    three = over_seeds([1.0, 2.0, 3.0])
    assert three.mean == 2 and three.low < 1 and three.high > 3


def test_losses_may_stand_anywhere_and_carry_options():
    joined = gather_losses(["dpo", "--data", "x.jsonl", "simpo", "--tiny", "ipo:tau=0.2", "--seeds=2"])
    assert joined == [f"dpo{SEPARATOR}simpo{SEPARATOR}ipo:tau=0.2", "--data", "x.jsonl", "--tiny", "--seeds=2"]
    assert read_loss("cdpo:beta=0.2,label_smoothing=0.1") == ("cdpo", {"beta": 0.2, "label_smoothing": 0.1})
    assert read_loss("mine:loss") == ("mine:loss", {}) and read_loss("mine:loss:beta=1") == ("mine:loss", {"beta": 1.0})


def test_what_a_loss_compares():
    assert target(Prefer(loss="dpo")) == {"targets": "log-ratio of answers", "accuracy": "accuracy"}
    assert target(Prefer(loss="ipo")) == {"targets": "log-ratio a token", "accuracy": "accuracy_token"}
    assert target(Prefer(loss="slic")) == {"targets": "log-prob of answers", "accuracy": "accuracy_gap"}
    assert target(PreferLabelled(loss="kto"))["targets"] == "good up, bad down"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("compare", "`posttrain compare` needs a loss"),
        ("compare dpo dppo", "unknown preference loss 'dppo'; did you mean 'dpo'?"),
        ("compare dpo sft", "'sft' is no preference loss"),
        ("compare dpo rloo", "'rloo' needs --reward; compare takes losses that learn from data that is there"),
        ("compare dpo:beta=x", "--dpo:beta: got 'x', expected float"),
        ("compare dpo:btea=1 --model small", "preference loss 'dpo' has no option 'btea'"),
        ("compare dpo --train.beta 0.1 --model small", "a loss is given its options by name"),
        ("compare dpo --nothing 1 --model small", "stage 'train' has no field 'nothing'"),
    ],
)
def test_a_fault_of_usage_is_one_line(args: str, message: str, capsys: pytest.CaptureFixture[str], folder: Path):
    assert main([*args.split(), *(["--name", "faulty"] if len(args.split()) > 1 else [])]) == 2
    output = capsys.readouterr()
    assert message in output.err and output.err.count("\n") == 1
    assert not (folder / "runs/faulty/sweep.json").exists()


def test_too_few_rows_to_hold_some_out(folder: Path):
    (folder / "one.jsonl").write_text(json.dumps(PAIRS[0]) + "\n")
    with pytest.raises(ConfigError, match="too small to hold one prompt in five out"):
        prepared("one.jsonl", None, "small", ["dpo"], folder / "none")
