"""Estimates of steps by completions, and where steps end."""

from __future__ import annotations

import pytest

from posttrain.data.judged_rows import step_chances, step_ends, steps_of
from posttrain.errors import ConfigError
from posttrain.models.load import load_tokenizer
from posttrain.models.small import small_path
from posttrain.rewards.steps import monte_carlo_steps
from posttrain.rewards.trained import said
from posttrain.types import Example, Message, Step

ONE = Example(prompt=(Message(role="user", content="p"),), responses=(said("two\n\nthree \nfour"), said("five")))


def test_steps_are_estimated_by_what_comes_of_them():
    asked = []

    def complete(example, text, count):
        asked.append((text, count))
        return [len(text) > 5 and k % 4 == 0 for k in range(count)]

    (found,) = monte_carlo_steps([ONE], complete, samples=8)
    assert asked == [("two\n", 8), ("two\nthree \n", 8), ("two\nthree \nfour", 1), ("five", 1)]
    first, second = found.responses
    assert step_chances(first) == [0.0, 0.25, 1.0] and [s.label for s in first.steps] == [-1, 1, 1]
    assert step_chances(second) == [0.0] and second.steps[0].label == -1
    with pytest.raises(ConfigError, match="got 1 verdicts on completions, asked for 8"):
        monte_carlo_steps([ONE], lambda *_: [True], samples=8)


def test_labels_of_people_are_chances():
    steps = tuple(Step(text=f"{k}\n", label=label) for k, label in enumerate((1, 0, -1, None)))
    assert step_chances(said("x")) == []
    (response,) = ONE.responses[:1]
    assert [s.text for s in steps_of(response)] == ["two\n", "three \n", "four"]
    assert step_chances(type(response)(messages=response.messages, steps=steps)) == [1.0, 1.0, 0.0, None]


def test_a_step_that_was_cut_off_has_no_end():
    tokenizer = load_tokenizer(str(small_path()))
    text = "two plus three is five.\nfive plus one is six.\nso it is six"
    steps = steps_of(said(text))
    ids = tokenizer.encode(text, add_special_tokens=False)
    ends = step_ends(tokenizer, ids, steps)
    assert [tokenizer.decode(ids[: e + 1]) for e in ends] == [
        "two plus three is five.", "two plus three is five.\nfive plus one is six.", text
    ]  # fmt: skip
    cut = step_ends(tokenizer, ids[: ends[1]], steps)
    assert cut[0] == ends[0] and cut[1:] == [None, None]
    assert step_ends(tokenizer, tokenizer.encode("another text", add_special_tokens=False), steps) == [None] * 3
