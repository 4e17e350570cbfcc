"""Tasks of reasoning-gym and GSM8K by their names: rows, checkers, and policies trained on them by the command line."""

from __future__ import annotations

import json

import pytest

from caches import own_cache
from posttrain.cli import main
from posttrain.data import read, reasoning
from posttrain.data.reasoning import KEY, parse_task, score, write_task
from posttrain.errors import ConfigError, DataError
from posttrain.rewards.reasoning import check, is_number, said
from posttrain.work.inputs import data_files

SUMS = "chain_sum,size=24,max_terms=2,max_digits=2"
SMALL = [
    *("--model", "small", "--lora-rank", "0", "--dtype", "float32", "--lr", "1e-4", "--steps", "2"),
    *("--updates-per-rollout", "1", "--prompts-per-step", "4", "--samples-per-prompt", "2", "--max-new-tokens", "6"),
]


@pytest.fixture(autouse=True)
def cache(here, monkeypatch):
    own_cache(monkeypatch, here / "cache")
    return here / "cache"


def test_rows_are_made_from_task_fields_and_seed_alone(tmp_path):
    first = data_files(f"reasoning_gym:{SUMS}", None)
    again = tmp_path / "again"
    again.mkdir()
    write_task(parse_task(SUMS), again)
    for part, file in first.items():
        assert file.read_bytes() == (again / f"{part}.jsonl").read_bytes()
    prompts, held = (read(first[part]) for part in ("prompts", "heldout_prompts"))
    assert len(prompts) == 24 and len(held) == 6
    assert not {e.prompt_key for e in prompts} & {e.prompt_key for e in held}
    assert prompts[3].meta[KEY] == {
        "task": "chain_sum",
        "fields": {"max_digits": 2, "max_terms": 2, "seed": 0, "size": 24},
        "index": 3,
    }
    other = read(data_files(f"reasoning_gym:{SUMS},seed=5", None)["prompts"])
    assert [e.prompt for e in other] != [e.prompt for e in prompts]


def test_the_tasks_own_checker_scores_the_answer_that_is_marked():
    example = read(data_files(f"reasoning_gym:{SUMS}", None)["prompts"])[0]
    asked, meta = example.prompt[-1].content, dict(example.meta)
    first, sign, second = asked.partition("problem: ")[2].strip(" =").split()
    right = str(int(first) + int(second) * (1 if sign == "+" else -1))
    for text in (
        right,
        f"<think>hm</think><answer> {right} </answer>",
        f"The answer is {right}.",
        f"so\n#### {right}",
        f"it is, I think, {right}.",
    ):
        assert check(asked, text, meta) == 1.0, text
    assert check(asked, "<answer>12345</answer>", meta) == 0.0
    assert check(asked, right, {}) is None
    with pytest.raises(DataError, match="makes another entry 0 of 'chain_sum' than was asked"):
        check("What is 1 + 1?", right, meta)
    assert said("a <answer>1</answer> b <answer>2</answer>") == "2" and said("none") == "none"
    assert said("so 3 + 4 = 7.", number=True) == "7" and said("so 3 + 4 = 7.") == "so 3 + 4 = 7."
    assert is_number("-12") and is_number("3.5") and not is_number("12 apples") and not is_number("abc")


def test_a_checker_that_evaluates_gets_nothing_that_could_act(tmp_path):
    task = parse_task("countdown,size=2")
    asked, entry = (reasoning._example(task, 0).prompt[-1].content, reasoning._entries(task)[0])
    which = reasoning._example(task, 0).meta[KEY]
    assert score(asked, entry["metadata"]["expression"], which) == 1.0
    mark = tmp_path / "ran"
    for attack in (f"open('{mark}', 'w')", f"__import__('os').mknod('{mark}')", "().__class__", "x.y"):
        assert score(asked, attack, which) == 0.0
    assert not mark.exists()
    board = parse_task("n_queens,size=1")
    asked = reasoning._example(board, 0).prompt[-1].content
    solved = reasoning._entries(board)[0]["metadata"]["valid_answers"][0]
    assert score(asked, solved, reasoning._example(board, 0).meta[KEY]) == 1.0


def test_a_checker_that_can_not_read_an_answer_finds_it_wrong():
    task = parse_task("prime_factorization,size=1")
    asked = reasoning._example(task, 0).prompt[-1].content
    assert score(asked, "no", reasoning._example(task, 0).meta[KEY]) == 0.0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("chain_sums", "reasoning-gym has no task 'chain_sums'; did you mean 'chain_sum'?"),
        ("chain_sum,sizes=3", "the task 'chain_sum' has no field 'sizes'; did you mean 'size'?"),
        ("chain_sum,size", "got 'size' in reasoning_gym:chain_sum,size; expected FIELD=VALUE, such as size=500"),
        ("chain_sum,min_terms=0", "min_terms must be positive; correct the fields"),
        ("chain_sum,size=1000,max_terms=2,max_digits=1", "prompts that are not among its first 1000, expected 250"),
        ("list_functions,size=2", "makes other entries of 'list_functions' each time"),
    ],
)
def test_tasks_that_can_not_be(name, said):
    with pytest.raises(ConfigError) as caught:
        data_files(f"reasoning_gym:{name}", None)
    assert said in str(caught.value)


def test_a_policy_on_a_task_by_the_command_line(here):
    assert main(["train", "grpo", "--data", f"reasoning_gym:{SUMS}", "--reward", "reasoning_gym", *SMALL]) == 0
    samples = [json.loads(x) for x in (here / "runs/train-grpo/grpo/samples.jsonl").read_text().splitlines()]
    assert len(samples) == 16 and all("arithmetic problem" in s["prompt"] for s in samples)
    assert {s["reward"] for s in samples if not s["truncated"]} <= {0.0, 1.0}


def test_gsm8k_by_its_name(here, cache, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    train = ["train", "grpo", "--data", "gsm8k", "--reward", "math", *SMALL]
    assert main(train) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said and said.startswith("posttrain: data 'gsm8k' is not in '")
    assert "openai/gsm8k can't be fetched from the hub (URLError)" in said and "train.jsonl" in said
    folder = cache / "data/gsm8k"
    folder.mkdir(parents=True)
    rows = [{"question": f"What is {k} plus 1?", "answer": f"{k} + 1 = {k + 1}\n#### {k + 1}"} for k in range(2, 8)]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert data_files("gsm8k", None)["demonstrations"] == folder / "train.jsonl"
    assert main(train) == 0
    samples = [json.loads(x) for x in (here / "runs/train-grpo/grpo/samples.jsonl").read_text().splitlines()]
    assert len(samples) == 16 and {s["reward"] for s in samples if not s["truncated"]} <= {0.0, 1.0}
