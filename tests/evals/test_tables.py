from __future__ import annotations

import copy
import io
import re

from rich.console import Console

from posttrain.evals.grids import Grid, clean_text, clip_text, closing_grids, duration, number, signed, verdict
from posttrain.evals.results import closing_results, machine_section, policy_section
from posttrain.evals.tables import closing_tables, rich_grid, worst_tables


def printed(drawn: list, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    for part in drawn:
        console.print(part)
    return console.file.getvalue()


def test_closing_tables_fit_100_columns_and_cut_no_number(closing):
    text = printed([*closing_tables(closing), *worst_tables(closing)])
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text  # rich writes this where a cell does not fit
    for name in (
        "reward_unseen",
        "bag_of_words",
        "frozen_base",
        "reward - length",
        "ppo - base",
        "truncated",
    ):
        assert name in text
    accuracy = closing["reward_accuracy"]["reward"]
    assert f"{accuracy['accuracy']:.3f}   [{accuracy['low']:.3f}, {accuracy['high']:.3f}]     360" in text
    assert "the other way round it scores" in text
    assert "matrix products at 96 GFLOP/s in fp32, 41 in bf16" in text
    assert text.count("Before and after, ") == 6 and text.count("Made worse by training, ") == 5
    assert "fell by" in text and "cut at the length limit" in text


def test_what_an_interval_does_not_show_is_said(closing):
    rows = {(d["name"], d["scorer"]): d for d in closing["differences"]}
    shown, hidden = rows["ppo - sft", "reward"], rows["ppo - sft", "reward_unseen"]
    assert verdict(shown) == "higher" and hidden["low"] < 0 < hidden["high"]
    assert verdict(hidden) == "not shown at this scale"
    assert verdict({"mean": -1.0, "excludes_zero": True}) == "lower"
    expected = sum(not d["excludes_zero"] for d in closing["differences"] + closing["reward_comparisons"])
    assert expected >= 1 and printed(closing_tables(closing)).count("not shown at this scale") == expected


def test_few_prompts_show_nothing_and_one_has_no_interval():
    machine = machine_section(device="cpu", threads=1, fp32_gflops=1.0, bf16_gflops=1.0)
    scores = {"sft": {"reward": [[0.0]] * 5}, "ppo": {"reward": [[1.0]] * 5}}
    text = printed(closing_tables(closing_results(machine=machine, policy=policy_section(scores))))
    assert "not shown at this scale" in text and "under 6 prompts" in text and "1 sample each" in text
    one = {policy: {"reward": row["reward"][:1]} for policy, row in scores.items()}
    text = printed(closing_tables(closing_results(machine=machine, policy=policy_section(one))))
    assert "[none: 1 unit]" in text
    assert printed(closing_tables({"schema": 1, "machine": machine})).strip().startswith("Measured on cpu, 1 thread,")


def test_model_text_is_neither_markup_nor_a_terminal_escape(closing):
    closing = copy.deepcopy(closing)
    row = closing["samples"][0]
    row["prompt"] = "[bold]p[/bold] [/] \x1b[2J"
    row["answers"]["ppo"]["text"] = "[red]x[/red] \x1b]0;t\x07 \u202eabc " + "y" * 600
    text = printed(closing_tables(closing))
    assert "[bold]p[/bold] [/] \\x1b[2J" in text and "[red]x[/red]" in text
    assert "\x1b" not in text and "\x07" not in text and "\u202e" not in text
    assert re.search(r"\(\d+ more", text)


def test_a_name_too_long_for_the_terminal_is_folded_and_not_cut():
    name = "policies/" + "x" * 60 + "/reward"
    text = printed([rich_grid(Grid(title="t", header=("number", "a"), rows=((name, "1.5"),)))], width=40)
    assert "…" not in text and "".join(re.findall(r"[a-z/]+", text.split("─")[-1])) == name


def test_texts_and_numbers():
    assert clean_text("a\r\nb\tc\x00\x9f\ud800") == "a\nb\tc\\x00\\x9f\\ud800"
    assert clean_text("naïve 日本 🙂") == "naïve 日本 🙂"
    assert clip_text("abcdef", 4) == "abcd … (2 more characters)" and clip_text("abcd", 4) == "abcd"
    assert [duration(s) for s in (9.96, 61, 7380)] == ["10.0 s", "1 min 01 s", "2 h 03 min"]
    assert [number(x) for x in (-0.001, 1.234, 123.45, 4567.8)] == ["0.00", "1.23", "123.5", "4568"]
    assert [signed(x) for x in (0.5, -0.25, -0.0001)] == ["+0.500", "-0.250", "+0.000"]


def test_failure_grid_is_left_out_without_labels(closing):
    closing = copy.deepcopy(closing)
    titles = [grid.title for grid in closing_grids(closing)]
    assert len(titles) == 5 and "Accuracy by how the worse answer fails" in titles
    for entry in closing["reward_accuracy"].values():
        entry["by_failure"] = {"(no label)": next(iter(entry["by_failure"].values()))}
    assert len(closing_grids(closing)) == 4
