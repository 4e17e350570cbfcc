"""Rewards: functions, sums, and models of whole groups."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from posttrain.errors import RewardError
from posttrain.forest import Branch, Row, build_forest
from posttrain.models.load import value_role
from posttrain.models.policy import Model, forward_stats, hidden_states
from posttrain.rewards.base import Completion, Score, from_function, weighted_sum
from posttrain.rewards.model import group_rows, reward_model, score_rows
from posttrain.types import Example, Message
from tiny import ours, plain_net, random_rows


def completion(prompt=(5, 6), ids=(7,), text="yes", said="hello", group=0):
    turns = (Message(role="system", content="be kind"), Message(role="user", content=said))
    return Completion(
        example=Example(prompt=turns), text=text, prompt_ids=prompt, ids=ids, truncated=False, group=group
    )


@pytest.fixture(scope="module")
def model():
    net = ours(plain_net())
    draw = torch.Generator().manual_seed(5)
    scalar = nn.Linear(32, 1, bias=False, dtype=torch.float64)
    scalar.weight.data = torch.randn(1, 32, generator=draw, dtype=torch.float64)
    return Model(net, scalar=scalar.requires_grad_(False))


def test_function_of_the_last_turn_and_the_text():
    reward = from_function(lambda prompt, text: len(prompt) * 10 + len(text), "size")
    assert reward([completion(), completion(text="")]) == [Score(53.0), Score(50.0)]
    assert reward([]) == []


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.float64(2), np.int64(2)])
def test_any_real_number_is_a_score(value):
    (score,) = from_function(lambda p, t: value)([completion()])
    assert score == Score(2.0) and type(score.value) is float


@pytest.mark.parametrize("bad", [math.nan, math.inf, "0.5", None, [1]])
def test_a_function_must_return_a_finite_number(bad):
    with pytest.raises(RewardError, match=r"reward 'judge' returned .* expected a finite number"):
        from_function(lambda p, t: bad, "judge")([completion()])


def test_weighted_sum_logs_parts_and_abstains():
    long = from_function(lambda p, t: len(t))
    shy = lambda cs: [Score(None if c.text == "no" else 2.0) for c in cs]  # noqa: E731
    total = weighted_sum({"long": (0.5, long), "shy": (-1.0, shy)})
    assert total([completion(text="yes"), completion(text="no")]) == [
        Score(-0.5, {"long": 3.0, "shy": 2.0}),
        Score(None, {"long": 2.0}),
    ]


def test_weighted_sum_names_the_part_with_the_wrong_length():
    total = weighted_sum({"ok": (1.0, from_function(lambda p, t: 0)), "short": (1.0, lambda cs: [])})
    with pytest.raises(RewardError, match="reward 'short' gave 0 scores, expected 1"):
        total([completion()])


def test_completions_are_grouped_by_prompt_and_scores_come_back_in_order(model):
    prompts = [(5, 6), (9,), (5, 6), (20, 21, 22), (9,), (5, 6)]
    given = [completion(p, (30 + i, 40 + i)[: 1 + i % 2], group=i) for i, p in enumerate(prompts)]
    rows, places = group_rows(given)
    assert [tuple(r.prompt) for r in rows] == [(5, 6), (9,), (20, 21, 22)]
    assert [len(r.branches) for r in rows] == [3, 2, 1]
    assert places == [(0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2)]
    got = reward_model(model, mean=0.25)(given)
    for c, score in zip(given, got, strict=True):
        ((alone,),) = score_rows(model, [Row(c.prompt_ids, [Branch(c.ids, {})])])
        assert score.value == pytest.approx(alone - 0.25, abs=1e-12)
        assert score.parts == {}
    assert len({s.value for s in got}) == 6


def test_scores_do_not_depend_on_how_rows_are_cut(model):
    rows = random_rows(1, 6)
    whole = score_rows(model, rows, max_tokens=10**6)
    assert [len(s) for s in whole] == [len(r.branches) for r in rows]
    for max_tokens in (1, 17, 40, 100):
        heard = []
        cut = score_rows(model, rows, max_tokens=max_tokens, on_done=heard.append)
        assert heard[-1] == sum(map(len, whole)) and heard == sorted(heard)
        for a, b in zip(cut, whole, strict=True):
            assert a == pytest.approx(b, abs=1e-12)


def test_scores_are_read_at_the_last_token(model):
    row = Row([5, 6, 7], [Branch([8, 9], {}), Branch([10], {})])
    states = model.net.base_model(torch.tensor([[5, 6, 7, 8, 9]])).last_hidden_state[0, -1]
    assert score_rows(model, [row])[0][0] == pytest.approx(model.scalar(states).item(), abs=1e-9)


def test_a_head_only_critic_trains_beside_the_reward(model):
    rows = random_rows(2)
    before = score_rows(model, rows)
    states = hidden_states(model, build_forest(rows))
    value = value_role(model, lora=None, seed=0, head_only=True)
    optimizer = torch.optim.SGD(value.parameters().values(), lr=0.01)
    losses = []
    for _ in range(3):
        loss = forward_stats(value, build_forest(rows), frozenset({"value"}))["value"].sub(1.0).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    assert score_rows(model, rows) == before
    assert torch.equal(hidden_states(model, build_forest(rows)), states)
    assert not any(p.requires_grad for p in model.net.parameters())
