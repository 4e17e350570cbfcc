"""Rewards made of rewards, and rewards by name."""

from __future__ import annotations

import pytest

from posttrain.errors import ConfigError, RewardError
from posttrain.rewards.base import Completion, Score, from_function
from posttrain.rewards.combine import Scheduled, gate, ramp, when
from posttrain.rewards.named import REWARDS
from posttrain.rewards.text import length
from posttrain.types import Example, Message, Target


def said(text, target=None, kind=""):
    example = Example(prompt=(Message(role="user", content="?"),), target=target, kind=kind)
    return Completion(example=example, text=text, prompt_ids=(1,), ids=(2,), truncated=False, group=0)


words = from_function(lambda prompt, text: float(len(text.split())), "words")


def test_a_gate_asks_only_for_what_passes():
    seen = []

    def inner(completions):
        seen.extend(c.text for c in completions)
        return [Score(10.0, {"inner": 10.0}) for _ in completions]

    def key(completions):
        return [Score(None if c.text == "?" else float(len(c.text))) for c in completions]

    scores = gate(inner, key, least=2, otherwise=-1)([said(t) for t in ("a", "bb", "?")])
    assert [s.value for s in scores] == [-1.0, 10.0, None] and seen == ["bb"]
    assert [dict(s.parts) for s in scores] == [{"gate": 1.0}, {"inner": 10.0, "gate": 2.0}, {}]
    assert gate(inner, key, least=2, otherwise=0)([said("a")])[0].value == 0
    with pytest.raises(RewardError, match="the gate gave 0 scores for 1"):
        gate(inner, lambda completions: [], least=0, otherwise=0)([said("a")])


def test_a_condition_chooses_by_prompt():
    reward = when(lambda e: e.kind == "short", length(1, 1), words)
    assert [s.value for s in reward([said("a b", kind="short"), said("a b c")])] == [0.0, 3.0]
    assert [s.value for s in when(lambda e: False, words)([said("a")])] == [None]


def test_weights_move_with_the_step():
    reward = Scheduled({"words": (ramp(0.0, 2.0, begin=10, end=20), words)})
    found = []
    for step in (0, 10, 15, 20, 99):
        reward.begin(step)
        found.append(reward([said("a b")])[0].value)
    assert found == [0.0, 0.0, 2.0, 4.0, 4.0]
    with pytest.raises(ConfigError, match="an end after its beginning"):
        ramp(0, 1, begin=3, end=3)


RIGHT = {
    "number": (Target(kind="number", answer="4"), "#### 4", "5"),
    "exact": (Target(kind="text", answer="Paris"), "paris.", "Rome"),
    "choice": (Target(kind="choice", choices=("x", "y"), correct=(1,)), "B", "A"),
    "answer": (Target(kind="number", answer="4"), "It is 4.", "5"),
    "accuracy": (Target(kind="number", answer="4"), "<answer>4</answer>", "<answer>5</answer>"),
    "math": (Target(kind="text", answer="2x"), "\\boxed{x+x}", "\\boxed{x}"),
    "constraints": (Target(kind="constraints", constraints=(("punctuation:no_comma", {}),)), "a", "a,b"),
    "constraints_share": (Target(kind="constraints", constraints=(("punctuation:no_comma", {}),)), "a", "a,b"),
    "code": (Target(kind="code", tests=("assert f() == 1",)), "def f(): return 1", "def f(): return 2"),
    "code_share": (Target(kind="code", tests=("assert f() == 1",)), "def f(): return 1", "def f(): return 2"),
}


def test_every_named_reward_is_checked_here_or_with_its_tasks():
    assert set(REWARDS) - set(RIGHT) == {"reasoning_gym", "thought", "supported"}


@pytest.mark.parametrize("name", list(RIGHT))
def test_rewards_by_name(name):
    if name == "math":
        pytest.importorskip("math_verify")
    target, right, wrong = RIGHT[name]
    reward = REWARDS[name]()
    assert [s.value for s in reward([said(right, target), said(wrong, target), said(right)])] == [1.0, 0.0, None]
    assert REWARDS[name].__doc__


def test_a_check_that_fits_no_row_is_an_error():
    with pytest.raises(RewardError, match="'number' checks none of these rows, whose targets are: none, text"):
        REWARDS["number"]()([said("4"), said("4", Target(kind="text", answer="4"))])
