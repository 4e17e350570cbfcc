"""A gold reward beside the one that is trained on, and rewards relative to the start's own answers."""

from __future__ import annotations

import math

import pytest

from posttrain.errors import ConfigError, RewardError
from posttrain.rewards.base import Completion, Score
from posttrain.rewards.gold import GOLD, RAW, Relative, WithGold, gold_metrics, mean_scores
from posttrain.types import Example, Message


def completions(*texts):
    examples = [Example(prompt=(Message(role="user", content=t.partition("/")[0]),)) for t in texts]
    return [
        Completion(example=e, text=t, prompt_ids=(1,), ids=(2,), truncated=False, group=k)
        for k, (e, t) in enumerate(zip(examples, texts, strict=True))
    ]


def of(*values):
    return lambda given: [Score(v) for v in values[: len(given)]]


def test_gold_is_a_part_and_values_are_the_rewards_own():
    given = completions("a/1", "a/2", "b/3", "b/4")
    found = WithGold(of(1.0, None, 2.0, 3.0), of(10.0, 20.0, None, math.nan))(given)
    assert [s.value for s in found] == [1.0, None, 2.0, 3.0]
    assert [dict(s.parts) for s in found] == [{GOLD: 10.0}, {GOLD: 20.0}, {}, {}]
    assert gold_metrics([s.parts for s in found]) == {"gold/reward": 15.0, "gold/known": 0.5}
    assert gold_metrics([{}, {}]) == {}


def test_gold_is_asked_in_every_so_many_rollouts_and_both_are_told_the_step():
    told = []

    class Stepping:
        def begin(self, step):
            told.append(step)

        def __call__(self, given):
            return [Score(1.0)] * len(given)

    reward = WithGold(Stepping(), of(5.0), updates=2, every=3)
    measured = []
    for step in range(0, 16, 2):
        reward.begin(step)
        measured.append(GOLD in reward(completions("a"))[0].parts)
    assert measured == [True, False, False] * 2 + [True, False] and told == list(range(0, 16, 2))
    with pytest.raises(RewardError, match="the gold reward gave 2 scores for 1 responses"):
        WithGold(of(1.0), lambda given: [Score(1.0)] * 2)(completions("a"))


def test_a_relative_reward_is_less_the_starts_own():
    """``R = r(x, y) - r(x, y_ref)``: 0 on average where the policy is the start."""
    base = mean_scores(completions("a/1", "a/2", "b/1", "c/1"), [Score(1.0), Score(2.0), Score(-3.0), Score(None)])
    keys = [c.example.prompt_key for c in completions("a", "b", "c")]
    assert base == {keys[0]: 1.5, keys[1]: -3.0, keys[2]: None}
    found = Relative(of(2.0, -3.0, 7.0, None), base)(completions("a/x", "b/x", "c/x", "a/y"))
    assert [s.value for s in found] == [0.5, 0.0, None, None]
    assert found[0].parts == {RAW: 2.0} and found[2].parts == {}
    with pytest.raises(ConfigError, match="no answer of the start to 'z'; expected one a prompt"):
        Relative(of(1.0), base)(completions("z"))
