from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain import cli
from posttrain.data.load import read
from posttrain.errors import printable

PAIRS = [
    {"prompt": "Name a colour.", "chosen": "Red.", "rejected": "Tuesday."},
    {"prompt": "What is 2 + 3?", "chosen": "It is 5.", "rejected": "It is 6, I think."},
    {"prompt": "Say hello.", "chosen": "Hello!", "rejected": "Go away, please."},
]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


def jsonl(name: str, rows: list[Any]) -> str:
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    Path(name).write_text(text + "\n", encoding="utf-8")
    return name


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    status = cli.main(["data", *args])
    output = capsys.readouterr()
    return status, output.out, output.err


# ---------------------------------------------------------------------------- faults of usage


@pytest.mark.parametrize(
    "args, message",
    [
        ("chekc", "unknown command 'data chekc'; did you mean 'check'?"),
        ("check", "`posttrain data check` needs FILES...: posttrain data check FILES..."),
        ("check none.jsonl", "no file 'none.jsonl'; "),
        (
            "check a.jsonl --skipbad 3",
            "unknown option '--skipbad' of `posttrain data check`; did you mean '--skip-bad'?",
        ),
        ("check a.jsonl --skip-bad x", "--skip-bad: got 'x', expected int"),
        ("check a.jsonl --map prompt", "--map: got 'prompt', expected THEIRS=OURS,... such as question=prompt"),
        ("check a.jsonl --model smolm2", "unknown model 'smolm2'"),
        ("check a.jsonl --out no/such/place.json", "can't write 'no/such/place.json' (No such file or directory)"),
        ("head a.jsonl b.jsonl", "unexpected 'b.jsonl'; options start with --, see posttrain data head --help"),
        ("head a.jsonl -n 0", "-n 0: expected at least 1"),
        ("convert a.jsonl", "`posttrain data convert` needs OUTPUT: posttrain data convert FILE OUTPUT"),
        ("convert a.jsonl a.jsonl", "'a.jsonl' is read and would be overwritten; name another file"),
        ("convert a.jsonl b.xml", "can't write 'b.xml'; expected a name ending in .jsonl"),
        (
            "split a.jsonl --shares train=.9",
            "the shares train=0.9 add up to 0.9; expected 1, such as train=0.9, test=0.1",
        ),
        ("split a.jsonl --shares train", "--shares: got 'train', expected NAME=NUMBER,... such as train=0.9,test=0.1"),
        ("split a.jsonl --shares ../x=1", "--shares: got '../x=1', expected NAME=NUMBER"),
        ("split a.jsonl --by prmpt", "--by: got 'prmpt', expected 'prompt' or 'opening'"),
        ("mix a.jsonl", "`posttrain data mix` needs --out OUTPUT.jsonl"),
        ("mix a.jsonl a.jsonl=2 --out b.jsonl", "'a.jsonl' is given twice; give it once, with a larger weight"),
        ("mix a.jsonl=x --out b.jsonl", "got 'a.jsonl=x', expected FILE or FILE=WEIGHT; 'x' is no number"),
        ("mix a.jsonl=0 --out b.jsonl", "the weight of 'a.jsonl' is 0.0; expected a number above 0"),
        ("mix a.jsonl=2 --temperature 2 --out b.jsonl", "--temperature takes the weights from the files' sizes; "),
        ("mix a.jsonl --when-out loop --out b.jsonl", "--when-out: got 'loop', expected 'stop' or 'repeat'"),
        ("export a.jsonl b.csv", "can't export to 'b.csv'; expected a name that ends with .jsonl or .parquet"),
        (
            "export a.jsonl b.jsonl --columns pairs",
            "--columns: got 'pairs', expected 'prompt' or 'prompt-completion' or ",
        ),
        (
            "export a.jsonl b.jsonl --columns messages",
            "a.jsonl row 1, field 'responses': can't be exported: these columns hold one",
        ),
    ],
)
def test_a_fault_of_usage_is_one_line_and_exit_status_2(
    args: str, message: str, capfd: pytest.CaptureFixture[str], here: Path
):
    jsonl("a.jsonl", PAIRS)
    assert cli.main(["data", *args.split()]) == 2
    output = capfd.readouterr()
    assert output.err.startswith(f"posttrain: {message}") and output.err.count("\n") == 1
    assert [p.name for p in here.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("args", ["", "--help", "-h", "check --help", "mix -h", "export --help"])
def test_help(args: str, capsys: pytest.CaptureFixture[str]):
    status, out, _ = run(capsys, *args.split())
    assert status == 0 and out.startswith("usage: posttrain data")


def test_help_lists_every_command_and_option(capsys: pytest.CaptureFixture[str]):
    from posttrain.arguments import flag, keyword_options
    from posttrain.cli_data import COMMANDS

    overview = run(capsys)[1]
    for name, function in COMMANDS.items():
        assert f"\n  {name} " in overview
        text = run(capsys, name, "--help")[1]
        options = [flag(key).replace("--n", "-n") if key == "n" else flag(key) for key in keyword_options(function)]
        assert all(f"\n{option} " in text for option in options), text
        assert max(map(len, text.splitlines())) <= 110
    assert "  data " in (cli.main(["--help"]), capsys.readouterr().out)[1]


# ---------------------------------------------------------------------------- check


def test_a_clean_file(capsys: pytest.CaptureFixture[str]):
    status, out, err = run(capsys, "check", jsonl("a.jsonl", PAIRS))
    assert status == 0 and err == ""
    assert out.splitlines()[0] == "a.jsonl: clean; rows 3: pairs 3"
    assert "no prompt stands twice" in out
    assert "better against worse answer: 1.7 against 3.0 words, longer in 16.7% of 3 pairs, tau -0.82" in out
    assert "[[Red.<end>]]" in out.replace(" ", "") or "[[" in out
    report = json.loads(Path("a.jsonl.check.json").read_text())
    assert report["clean"] and report["files"][0]["shapes"] == {"pairs": 3} and report["overlaps"] == []
    assert report["files"][0]["compared"]["pairs"] == 3
    assert out.splitlines()[-1] == "report: a.jsonl.check.json"


FAULTY: list[Any] = [
    PAIRS[0],
    {"prompt": "Name a colour.", "chosen": "Tuesday.", "rejected": "Red."},  # contradicts row 1
    "",
    {"prompt": "x", "chosen": "same", "rejected": "same"},
    {"prompt": "y", "chosen": "a"},
    "{not json",
    {"prompt": "  name a COLOUR. ", "chosen": "Red.", "rejected": "Tuesday."},  # repeats row 1
    {"prompt": "z", "chosen": "", "rejected": "b"},
]


def test_a_faulty_file(capsys: pytest.CaptureFixture[str]):
    status, out, err = run(capsys, "check", jsonl("bad.jsonl", FAULTY), "--out", "report.json")
    assert status == 1 and err == ""
    assert out.splitlines()[0] == "bad.jsonl: faults; rows 7: pairs 3"
    report = json.loads(Path("report.json").read_text())["files"][0]
    assert (report["rows"], report["examples"]) == (7, 3)
    assert [tally["first"] for tally in report["bad"].values()] == [f"bad.jsonl row {n}" for n in (5, 6, 8)]
    assert report["useless"] == {"identical answers": {"count": 1, "first": "bad.jsonl row 4", "other": ""}}
    both = report["contradictions"]["the same two answers are ordered both ways"]
    assert both == {"count": 1, "first": "bad.jsonl row 1", "other": "bad.jsonl row 2"}
    assert report["duplicates"]["row, but for case and white space"]["other"] == "bad.jsonl row 7"
    assert "row 1 and row 2" in out and not Path("bad.jsonl.check.json").exists()


def test_a_number_of_faulty_rows_can_be_let_pass(capsys: pytest.CaptureFixture[str]):
    file = jsonl("a.jsonl", [*PAIRS, "{", "{"])
    assert run(capsys, "check", file)[0] == 1
    assert run(capsys, "check", file, "--skip-bad", "1")[0] == 1
    status, out, _ = run(capsys, "check", file, "--skip-bad", "2")
    assert status == 0 and "note" in out and out.startswith("a.jsonl: clean; rows 5: pairs 3\n")


def test_several_files_and_what_they_share(capsys: pytest.CaptureFixture[str]):
    train, test = jsonl("train.jsonl", PAIRS), jsonl("test.jsonl", [{"prompt": "say  HELLO."}, {"prompt": "New?"}])
    status, out, _ = run(capsys, "check", train, test)
    assert status == 1
    said = " ".join(out.split())
    assert "leak: prompts of train.jsonl (1 of its rows) that test.jsonl has too (1 of its rows): 1; first" in said
    assert "clean: 2 of 2 sources; leaks between them: 1" in out
    for name in (train, test):
        report = json.loads(Path(f"{name}.check.json").read_text())
        assert [file["source"] for file in report["files"]] == [name] and len(report["overlaps"]) == 1
    assert run(capsys, "check", train, jsonl("more.jsonl", PAIRS))[0] == 0  # both are for training


def test_columns_under_other_names(capsys: pytest.CaptureFixture[str]):
    rows = [{"q": row["prompt"], "good": row["chosen"], "poor": row["rejected"]} for row in PAIRS]
    status, out, _ = run(capsys, "check", jsonl("a.jsonl", rows), "--map", "q=prompt,good=chosen,poor=rejected")
    assert status == 0 and "pairs 3" in out


def test_lengths_in_tokens_of_a_named_model(capsys: pytest.CaptureFixture[str]):
    _, out, _ = run(capsys, "check", jsonl("a.jsonl", PAIRS), "--model", "small")
    assert "\ntokens " in out
    tokens = json.loads(Path("a.jsonl.check.json").read_text())["files"][0]["tokens"]
    assert tokens["count"] == 3 and tokens["longest"] > 8


def test_a_damaged_file_is_a_fault_and_the_others_are_still_checked(capsys: pytest.CaptureFixture[str]):
    Path("cut.jsonl.gz").write_bytes(b"\x1f\x8b\x08\x00broken")
    status, out, _ = run(capsys, "check", "cut.jsonl.gz", jsonl("a.jsonl", PAIRS))
    assert status == 1 and "not a whole gzip file" in " ".join(out.split()) and "a.jsonl: clean" in out


def test_the_shipped_data_is_clean(capsys: pytest.CaptureFixture[str]):
    status, out, _ = run(capsys, "check", "default")
    assert status == 0, out
    assert "clean: 5 of 5 sources" in out and len(json.loads(Path("default.check.json").read_text())["files"]) == 5


NASTY = "\x1b]0;owned\x07\x1b[31m\u202etxt\u2066\x9b2J\r\x00\u2028"


def test_control_characters_never_reach_the_terminal(capsys: pytest.CaptureFixture[str]):
    row = {"prompt": f"p {NASTY}", "chosen": f"a {NASTY}", "rejected": f"b {NASTY}", "kind": NASTY, NASTY: NASTY}
    file = jsonl("a.jsonl", [row, {"prompt": "p", NASTY + "x": 3}, {"messages": [{"role": NASTY, "content": "x"}]}])
    for args in (["check", file], ["head", file], ["head", file, "--model", "small"], ["convert", file, "b.jsonl"]):
        _, out, err = run(capsys, *args)
        raw = {c for c in out + err if not c.isprintable() and c != "\n"}
        assert not raw, (args, raw)
    assert printable("\x1b[0m\tA\u00a0\u200d\udc80\n") == "\\x1b[0m\\tA\u00a0\u200d\\udc80\n"


@pytest.mark.parametrize("width", [80, 120])
def test_output_fits_the_terminal(width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", str(width))
    long = [{"prompt": f"{'word ' * 300} {i}", "completion": "x" * 3000} for i in range(3)]
    files = [jsonl("bad.jsonl", FAULTY), jsonl(f"{'long' * 12}.jsonl", long)]
    _, out, _ = run(capsys, "check", *files, "--model", "small")
    lines = [line for line in out.splitlines() if not line.startswith("report: ")]
    assert max(map(len, lines)) <= width


# ---------------------------------------------------------------------------- the other commands


def test_head_shows_what_was_understood(capsys: pytest.CaptureFixture[str]):
    status, out, _ = run(capsys, "head", jsonl("a.jsonl", ["{", *PAIRS]), "-n", "1")
    assert status == 0
    assert out == (
        "a.jsonl row 2: pairs\nuser: Name a colour.\nassistant 1 of 2 (rank 0): Red.\nassistant 2 of 2 (rank 1): Tuesday.\n"
        "faulty rows left out: 1; `posttrain data check` says which\n"
    )


def test_head_with_a_model_marks_what_is_trained(capsys: pytest.CaptureFixture[str]):
    status, out, _ = run(capsys, "head", jsonl("a.jsonl", PAIRS), "-n", "1", "--model", "small")
    assert status == 0 and out.count("[[") == out.count("]]") == 2
    assert "[[Red." in out and "[[Tuesday." in out


def test_convert_keeps_everything(capsys: pytest.CaptureFixture[str]):
    rows = [{**PAIRS[0], "weight": 2, "kind": "k", "extra": [1, {"a": None}]}, "{", {"prompt": "p", "completion": "c"}]
    file = jsonl("a.jsonl", rows)
    status, _, err = run(capsys, "convert", file, "b.jsonl")
    assert status == 2 and err.startswith("posttrain: a.jsonl row 2") and not Path("b.jsonl").exists()
    status, out, _ = run(capsys, "convert", file, "b.jsonl", "--skip-bad", "1")
    assert status == 0
    assert out == "b.jsonl: 2 examples\nfaulty rows left out: 1; `posttrain data check` says which\n"
    one, two = read("b.jsonl")
    assert (one.weight, one.kind, dict(one.meta), two.responses[0].text) == (2.0, "k", {"extra": [1, {"a": None}]}, "c")


def test_split_keeps_duplicates_together_and_says_how_it_came_out(capsys: pytest.CaptureFixture[str]):
    rows = [{"prompt": f"prompt {i % 200}" if i < 200 else f" PROMPT {i % 200}"} for i in range(400)]
    status, out, _ = run(capsys, "split", jsonl("a.jsonl", rows), "--shares", "train=.8,test=.2", "--out", "parts")
    assert status == 0
    sides = {name: read(f"parts/{name}.jsonl") for name in ("train", "test")}
    said = [f"parts/{n}.jsonl: {len(s)} examples, {len(s) / 4:.2f}% of them" for n, s in sides.items()]
    assert out.splitlines() == [f"{said[0]} (80.00% asked for)", f"{said[1]} (20.00% asked for)"]
    texts = {name: {e.prompt[0].content.lower().strip() for e in side} for name, side in sides.items()}
    assert not texts["train"] & texts["test"] and len(sides["train"]) + len(sides["test"]) == 400
    assert 40 < len(sides["test"]) < 120


def test_mix_counts_and_origins(capsys: pytest.CaptureFixture[str]):
    a = jsonl("a.jsonl", [{"prompt": f"a{i}"} for i in range(300)])
    b = jsonl("b=1.jsonl", [{"prompt": f"b{i}"} for i in range(300)])  # a name with = in it
    status, out, _ = run(capsys, "mix", f"{a}=3", b, "--total", "128", "--out", "m.jsonl")
    assert status == 0
    assert out.splitlines() == [
        "m.jsonl: 128 examples; 128 examples were asked for",
        "  a.jsonl: 96 examples at rate 0.750",
        "  b=1.jsonl: 32 examples at rate 0.250",
    ]
    rows = read("m.jsonl")
    assert {e.meta["origin"]["file"] for e in rows} == {a, b} and len(rows) == 128
    small = jsonl("small.jsonl", [*({"prompt": f"s{i}"} for i in range(75)), "{"])
    status, out, _ = run(
        capsys, "mix", a, small, "--temperature", "2", "--when-out", "repeat", "--skip-bad", "1", "--out", "m.jsonl"
    )
    lines = out.splitlines()
    assert lines[3] == "faulty rows left out: 1; `posttrain data check` says which"
    assert "a.jsonl: 300 examples at rate 0.667, gone through once" in lines[1]
    assert "at rate 0.333, gone through" in lines[2]


# ---------------------------------------------------------------------------- export


def exported(capsys: pytest.CaptureFixture[str], rows: list[Any], *options: str) -> list[dict[str, Any]]:
    status, out, err = run(capsys, "export", jsonl("in.jsonl", rows), "out.jsonl", *options)
    assert status == 0, err
    found = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert out == f"out.jsonl: {len(found)} rows\n"
    return found


USER, GOOD, POOR = (
    [{"role": role, "content": text}] for role, text in (("user", "Hi"), ("assistant", "Yo"), ("assistant", "No"))
)


def test_export_of_each_type(capsys: pytest.CaptureFixture[str]):
    assert exported(capsys, [{"prompt": "Hi", "kind": "k"}]) == [{"prompt": USER, "meta": '{"kind": "k"}'}]
    assert exported(capsys, [{"prompt": "Hi", "completion": "Yo"}]) == [{"prompt": USER, "completion": GOOD}]
    rows = [{"prompt": "Hi", "completion": "Yo"}]
    assert exported(capsys, rows, "--columns", "messages") == [{"messages": USER + GOOD}]
    pair = {"prompt": "Hi", "chosen": "Yo", "rejected": "No"}
    assert exported(capsys, [pair]) == [{"prompt": USER, "chosen": GOOD, "rejected": POOR}]
    scored = exported(capsys, [{**pair, "score_chosen": 9, "score_rejected": 4.5}])
    assert scored == [{"prompt": USER, "chosen": GOOD, "rejected": POOR, "score_chosen": 9.0, "score_rejected": 4.5}]
    labelled = [
        {"prompt": "Hi", "completion": "Yo", "label": True},
        {"prompt": "Hi", "completion": "No", "label": False},
    ]
    assert exported(capsys, labelled) == [
        {"prompt": USER, "completion": GOOD, "label": True},
        {"prompt": USER, "completion": POOR, "label": False},
    ]


def test_export_keeps_judgements_that_have_no_column(capsys: pytest.CaptureFixture[str]):
    (rated,) = exported(capsys, [{"prompt": "Hi", "completion": "Yo", "score": 0}])
    assert json.loads(rated["meta"]) == {"responses": [{"score": 0.0}]}
    answers = [{"messages": GOOD, "score": 2}, {"messages": POOR}]
    verdict = {"a": 0, "b": 1, "better": 1, "axis": "tone", "by": "me"}
    (pair,) = exported(capsys, [{"prompt": USER, "responses": answers, "preferences": [verdict]}])
    assert (pair["chosen"], pair["rejected"], "score_chosen" in pair) == (GOOD, POOR, False)
    assert json.loads(pair["meta"]) == {
        "responses": [{"score": 2.0}, {}],
        "preferences": [{"axis": "tone", "by": "me"}],
    }
    doubled = jsonl("in.jsonl", [{"prompt": "Hi", "completion": "Yo", "score": 1, "preferences": "x"}])
    assert run(capsys, "export", doubled, "out.jsonl")[0] == 0
    doubled = jsonl("in.jsonl", [{"prompt": "Hi", "chosen": "Yo", "rejected": "No", "responses": "x", "kind": "k"}])
    assert run(capsys, "export", doubled, "out.jsonl")[0] == 0
    rated_twice = {"prompt": "Hi", "completion": "Yo", "score": 1, "responses": "x"}
    status, _, err = run(capsys, "export", jsonl("in.jsonl", [rated_twice]), "out.jsonl", "--format", "rated")
    assert status == 2 and "field 'responses': can't be exported: a column of its own has the name" in err


@pytest.mark.parametrize(
    "row, message",
    [
        (
            {"prompt": "p", "completions": ["a", "b", "c"]},
            "field 'responses': can't be exported: a preference has two answers, not 3",
        ),
        ({"prompt": "p", "completion": "a", "weight": 0.5}, "field 'weight': can't be exported: 0.5"),
        (
            {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a", "train": False}]},
            "field 'train': can't be exported: train=false on a turn",
        ),
    ],
)
def test_what_the_columns_cannot_say_is_refused_by_name(row: Any, message: str, capsys: pytest.CaptureFixture[str]):
    for name in ("out.jsonl", "out.parquet"):
        status, _, err = run(capsys, "export", jsonl("in.jsonl", [row]), name)
        assert status == 2 and err.startswith(f"posttrain: in.jsonl row 1, {message}")
        assert not Path(name).exists() and not Path(f"{name}.part").exists()


def test_all_rows_have_to_fit_the_first_one_s_columns(capsys: pytest.CaptureFixture[str]):
    rows = [*PAIRS, {"prompt": "p", "completion": "a"}]
    status, _, err = run(capsys, "export", jsonl("in.jsonl", rows), "out.jsonl")
    assert (
        status == 2
        and "in.jsonl row 4, field 'responses': can't be exported: a preference has two answers, not 1" in err
    )


def test_parquet_reads_back(capsys: pytest.CaptureFixture[str]):
    import pyarrow.parquet as pq

    rows = [{**PAIRS[i % 3], "source": f"s{i}"} if i % 2 else PAIRS[i % 3] for i in range(1002)]
    status, out, _ = run(capsys, "export", jsonl("in.jsonl", rows), "out.parquet")
    assert status == 0 and out == "out.parquet: 1,002 rows\n"
    table = pq.read_table("out.parquet")
    assert table.column_names == ["prompt", "chosen", "rejected", "meta"] and table.num_rows == 1002
    assert table.slice(1, 1).to_pylist()[0] == {
        "prompt": [{"role": "user", "content": "What is 2 + 3?"}],
        "chosen": [{"role": "assistant", "content": "It is 5."}],
        "rejected": [{"role": "assistant", "content": "It is 6, I think."}],
        "meta": '{"source": "s1"}',
    }
    assert len(read("out.parquet")) == 1002


def test_the_command_loads_no_torch_to_say_what_it_can_do():
    import subprocess
    import sys

    code = "import sys; from posttrain.cli import main; code = main(['data', '--help']); "
    code += "sys.exit(code or 9 * any(name in sys.modules for name in ('torch', 'transformers', 'numpy', 'pyarrow')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
