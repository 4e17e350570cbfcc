"""``posttrain train sft`` on data of one's own: templates that rewrite history, answers that are labelled."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from caches import own_cache
from posttrain.cli import main
from posttrain.data import demonstration_rows
from posttrain.errors import DataError
from posttrain.models.load import find_model
from posttrain.types import Example, Message, Response

STRIPS = (
    "<|bos|>{% for m in messages %}{% set said = m['content'] if loop.last else m['content'].split('so ')[-1] %}"
    "{{ '<|' ~ m['role'] ~ '|>' ~ said ~ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TURNS = ["add one and two.", "one and two so three.", "add two and two.", "two and two so four."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        own_cache(patch, folder / "cache")
        shutil.copytree(find_model("small").path, folder / "stripping")
        (folder / "stripping/chat_template.jinja").write_text(STRIPS)
        roles = ("user", "assistant", "user", "assistant")
        turns = [{"role": r, "content": c} for r, c in zip(roles, TURNS, strict=True)]
        turns[1]["train"] = True
        write("thinking.jsonl", [{"messages": turns}])
        answers = [("three.", True), ("five.", False)]
        write("labelled.jsonl", [{"prompt": TURNS[0], "completion": c, "label": label} for c, label in answers])
        yield folder


def write(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(*options):
    fixed = "--lora-rank 0 --prompts-per-step 1 --epochs 1 --dtype float32"
    return main(["train", "sft", *options, *fixed.split()])


def test_rewritten_history_is_refused_and_the_option_named(folder, capsys):
    assert train("--data", "thinking.jsonl", "--model", "stripping", "--name", "refused") == 2
    error = capsys.readouterr().err
    assert "thinking.jsonl row 1: the chat template alters the content of message 1 (assistant)" in error
    assert "say history='last' or 'each'" in error


@pytest.mark.parametrize(("history", "rows"), [("each", 2), ("last", 1)])
def test_rewritten_history_trains_as_asked(folder, capsys, history, rows):
    arguments = ["--data", "thinking.jsonl", "--model", "stripping", "--name", history, "--sft.history", history]
    assert train(*arguments) == 0
    assert f"kept {rows} of {rows}" in capsys.readouterr().out
    stage = json.loads((folder / f"runs/{history}/sft/stage.json").read_text())
    assert stage["config"]["history"] == history
    assert len((folder / f"runs/{history}/sft/metrics.jsonl").read_text().splitlines()) == rows


def test_an_unknown_way_is_named(folder, capsys):
    assert train("--data", "thinking.jsonl", "--model", "stripping", "--history", "lst") == 2
    assert "'refuse' or 'last' or 'each'" in capsys.readouterr().err


LACKS = "data 'labelled.jsonl' has no {}, but answers with a label or score each; "


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("sft", LACKS.format("demonstrations") + "keep the rows to imitate (label true) without the column 'label'"),
        (
            "reward",
            LACKS.format("rankings") + "give a good and a bad answer to the same prompt as 'chosen' and 'rejected'",
        ),
        (
            "dpo",
            LACKS.format("rankings") + "give a good and a bad answer to the same prompt as 'chosen' and 'rejected'",
        ),
        ("ppo --reward nowhere", LACKS.format("prompts") + "keep the column 'prompt' alone"),
    ],
)
def test_labelled_answers_are_told_what_is_missing(folder, capsys, method, said):
    assert main(["train", *method.split(), "--data", "labelled.jsonl", "--model", "small"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_bad_answer_is_no_demonstration(folder, tmp_path, capsys):
    (tmp_path / "demonstrations.jsonl").write_text((folder / "labelled.jsonl").read_text())
    assert train("--data", str(tmp_path), "--model", "small", "--name", "bad") == 2
    said = "demonstrations.jsonl row 2, field 'label': the response to imitate is labelled bad (false); remove the row"
    assert said in capsys.readouterr().err
    turn = Message(role="assistant", content="x")
    example = Example(prompt=(Message(role="user", content="a"),), responses=(Response(messages=(turn,), label=False),))
    with pytest.raises(DataError, match="labelled bad"):
        demonstration_rows(None, [example], max_length=10)  # before a tokenizer is asked
