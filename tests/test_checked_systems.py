"""Systems on checked answers: dapo, deepseek_r1, deepseek_v2 and tool_use, each from end to end; several rewards as one."""

from __future__ import annotations

import json

import pytest

from caches import own_cache
from posttrain.cli import main
from posttrain.data.smallworld_sums import demonstrations, prompts
from posttrain.errors import ConfigError
from posttrain.registry import RECIPES
from posttrain.rewards.base import Completion, Score
from posttrain.rewards.tagged import checkable, finished, thought
from posttrain.stages.checked import MixRewards
from posttrain.types import Example, Message
from posttrain.work.mix_rewards import by_prompt

FEW = "--{0}.steps 2 --{0}.prompts-per-step 4 --{0}.samples-per-prompt 4 --{0}.warmup-steps 0 --{0}.max-new-tokens 24"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checked")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        own_cache(patch, folder / "cache")
        yield folder


def said(example, text):
    return Completion(example=example, text=text, prompt_ids=(1,), ids=(2,), truncated=False, group=0)


def test_sums_have_worked_answers_that_the_reward_finds_right():
    rows = demonstrations(40)
    scores = thought()([said(e, e.responses[0].text) for e in rows])
    assert {s.value for s in scores} == {2.0}
    assert rows[0].responses[0].text.startswith("<think>") and demonstrations(5) == rows[:5]
    held = {tuple(sorted(e.prompt[0].content.split())) for e in prompts(200, split="heldout")}
    mine = {tuple(sorted(e.prompt[0].content.split())) for e in [*prompts(200), *rows]}
    assert held and not held & mine


def test_accuracy_and_form_are_scored_apart():
    example = demonstrations(1)[0]
    answer = example.target.answer
    wrong = "zero" if answer != "zero" else "one"
    texts = {
        f"<think>so</think><answer>{answer}</answer>": (1, 1),
        f"<think>so</think> <answer>{wrong}</answer>": (0, 1),
        f"<answer>{answer}</answer>": (1, 0),
        answer: (1, 0),
        f"<think></think><answer>{answer}</answer>": (1, 0),
        f"<think>a</think><answer>{answer}</answer> more": (1, 0),
        f"<think>a<think>b</think><answer>{answer}</answer>": (1, 0),
    }
    scores = thought()([said(example, text) for text in texts])
    assert [(s.parts["accuracy"], s.parts["format"]) for s in scores] == list(texts.values())
    assert [s.value for s in scores] == [sum(v) for v in texts.values()]


def test_several_rewards_as_one_by_prompt():
    sum_of, chat = demonstrations(1)[0], Example(prompt=(Message(role="user", content="hello"),))
    parts = [
        ("right", 1.0, checkable, lambda cs: [Score(1.0, {"by": 2.0}) for _ in cs]),
        ("nice", 2.0, lambda e: not checkable(e), lambda cs: [Score(None if c.text == "?" else 0.5) for c in cs]),
        ("tidy", 0.5, lambda e: True, lambda cs: [Score(finished("", c.text)) for c in cs]),
    ]
    scores = by_prompt(parts)([said(sum_of, "it is so."), said(chat, "it is so."), said(chat, "?"), said(chat, "no")])
    assert [s.value for s in scores] == [1.5, 1.5, None, 1.0]
    assert scores[0].parts == {"right": 1.0, "right/by": 2.0, "tidy": 1.0} and scores[1].parts == {
        "nice": 0.5,
        "tidy": 1.0,
    }
    with pytest.raises(ConfigError, match="got 1 rewards, 2 weights, 0 places; expected one of each a reward"):
        MixRewards(named=("accuracy",), weights=(1.0, 2.0))
    with pytest.raises(ConfigError, match="got where 'checks'; did you mean 'checked'"):
        MixRewards(named=("accuracy",), weights=(1.0,), where=("checks",))


def test_the_papers_numbers_stand_in_the_recipes():
    dapo, r1 = RECIPES["dapo"]().stages["tuned"], RECIPES["deepseek_r1"]().stages["learnt1"]
    assert (dapo.algorithm, dapo.options, dapo.overlong_share, dapo.mask_cut) == (
        "dapo",
        {"low": 0.2, "high": 0.28},
        0.2,
        True,
    )
    assert (r1.algorithm, r1.kl, r1.reward) == ("grpo", 0.001, "thought")
    stages = RECIPES["deepseek_v2"]().stages
    assert stages["learnt2"].model is stages["reason"] and stages["learnt1"].model is stages["sft"]


def run(folder, recipe, *stages, more=""):
    options = " ".join([more, *(FEW.format(stage) for stage in stages)])
    assert main(["run", recipe, "--tiny", *options.split()]) == 0
    return folder / f"runs/{recipe}-tiny"


def test_dapo(folder):
    more = (
        "--cold.data sums:32 --tuned.data sums:32 --evaluate.data sums:32 --cold.epochs 1 --tuned.updates-per-rollout 1"
    )
    directory = run(folder, "dapo", "tuned", more=f"{more} --tuned.rounds 1 --tuned.mask-cut false")
    results = json.loads((directory / "evaluate/results.json").read_text())
    assert set(results["policies"]) == {"cold", "policy"} and results["prompts"] == 8
    assert {"reward", "length", "truncated"} < set(results["policies"]["policy"])


def test_deepseek_r1(folder):
    data = " ".join(f"--{s}.data sums:32" for s in ("cold", "learnt1", "samples", "checked", "evaluate"))
    more = f"{data} --cold.epochs 1 --sft.epochs 1 --helpful.limit 8 --helpful.epochs 1 --samples.samples 1"
    more += (
        " --kept.options most,4,least,0 --samples.max-new-tokens 24 --evaluate.max-new-tokens 24 --evaluate.samples 1"
    )
    directory = run(folder, "deepseek_r1", "learnt1", "learnt2", more=more)
    results = json.loads((directory / "evaluate/results.json").read_text())
    assert list(results["policies"]) == ["cold", "reason", "sft", "final"]
    assert {"accuracy", "format", "reward"} < set(results["policies"]["sft"])
    parts = [json.loads(x)["parts"] for x in (directory / "learnt2/samples.jsonl").read_text().splitlines()]
    assert {frozenset(p) for p in parts} <= {
        frozenset({"helpful"}), frozenset({"thought", "thought/accuracy", "thought/format"})
    }  # fmt: skip


def test_deepseek_v2(folder):
    data = " ".join(f"--{s}.data sums:32" for s in ("worked", "learnt1", "checks"))
    more = f"{data} --sft.epochs 1 --helpful.limit 8 --helpful.epochs 1 --safe.limit 8 --safe.epochs 1"
    more += " --checks.max-new-tokens 24 --checks.samples 1 --tastes.max-new-tokens 24 --tastes.samples 1"
    directory = run(folder, "deepseek_v2", "learnt1", "learnt2", more=more)
    tastes = json.loads((directory / "tastes/results.json").read_text())["policies"]
    assert list(tastes) == ["sft", "reason", "prefer"] and {"helpful", "safe", "finished"} < set(tastes["prefer"])
    record = json.loads((directory / "reward/reward.json").read_text())
    assert [(p["name"], p["weight"], p["where"]) for p in record["parts"]] == [
        ("helpful", 1.0, "open"), ("safe", 0.5, "open"), ("finished", 0.5, "open"), ("accuracy", 1.0, "checked"),
    ]  # fmt: skip


def test_tool_use(folder):
    more = "--cold.data notes:32 --tuned.data notes:32 --evaluate.data notes:32 --cold.epochs 1 --evaluate.samples 1"
    directory = run(folder, "tool_use", "tuned", more=more)
    results = json.loads((directory / "evaluate/results.json").read_text())
    assert {"accuracy", "supported", "looked"} < set(results["policies"]["policy"])
