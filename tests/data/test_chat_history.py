"""Templates that rewrite earlier turns: refused, or trained after the history that stood before each turn."""

from __future__ import annotations

import pytest

from posttrain.data import demonstration_rows, render, render_prompt
from posttrain.errors import ConfigError, DataError, ModelError
from posttrain.types import Example, Message, Response

from .conftest import LAST_SYSTEM, THINK, mistral, smol
from .families import family

THOUGHT = "<think>\nhm {}\n</think>\n\n"


def talk(count, flags=True):
    turns = []
    for k in range(count):
        turns.append(Message(role="user", content=f"Question {k}"))
        turns.append(Message(role="assistant", content=THOUGHT.format(k) + f"Answer {k}", train=flags))
    return turns


def example(turns, **more):
    return Example(prompt=tuple(turns[:-1]), responses=(Response(messages=tuple(turns[-1:])),), **more)


def rows_as_text(tokenizer, rows):
    return [(tokenizer.decode(r.prompt), tokenizer.decode(r.branches[0].ids)) for r in rows]


def test_the_default_refuses_and_names_the_remedies():
    given = example(talk(2), file="h.jsonl", row=4)
    with pytest.raises(ModelError, match=r"^h\.jsonl row 4: the chat template alters .* history='last' or 'each'"):
        demonstration_rows(family("qwen3"), [given], max_length=500)
    with pytest.raises(ModelError, match="alters the content of message 1"):
        demonstration_rows(family("qwen3"), [example(talk(2, flags=None))], max_length=500)


def test_one_thinking_turn_needs_no_mode():
    tokenizer = family("qwen3")
    (row,), _ = demonstration_rows(tokenizer, [example(talk(1))], max_length=500)
    assert rows_as_text(tokenizer, [row]) == [
        (
            "<|im_start|>user\nQuestion 0<|im_end|>\n<|im_start|>assistant\n",
            "<think>\nhm 0\n</think>\n\nAnswer 0<|im_end|>",
        )
    ]
    assert all(row.branches[0].masks["loss"])


@pytest.mark.parametrize("flags", [True, None])
def test_last_trains_the_last_turn_after_the_rewritten_history(flags):
    tokenizer = family("qwen3")
    rows, report = demonstration_rows(tokenizer, [example(talk(3, flags))], max_length=500, history="last")
    head = "".join(
        f"<|im_start|>user\nQuestion {k}<|im_end|>\n<|im_start|>assistant\nAnswer {k}<|im_end|>\n" for k in range(2)
    )
    assert rows_as_text(tokenizer, rows) == [
        (
            head + "<|im_start|>user\nQuestion 2<|im_end|>\n<|im_start|>assistant\n",
            "<think>\nhm 2\n</think>\n\nAnswer 2<|im_end|>",
        )
    ]
    assert all(rows[0].branches[0].masks["loss"])
    assert report.untrained_turns == 2
    # ... and that is what the model reads when it answers.
    assert rows[0].prompt == render_prompt(tokenizer, talk(3)[:-1], rewritten=True)


def test_each_makes_a_row_of_every_trained_turn():
    tokenizer = family("qwen3")
    given = [example(talk(1)), example(talk(3))]
    rows, report = demonstration_rows(tokenizer, given, max_length=500, history="each")
    assert report.index == (0, 1, 1, 1)
    assert report.untrained_turns == 0
    for k, (prompt, answer) in enumerate(rows_as_text(tokenizer, rows[1:])):
        assert answer == f"<think>\nhm {k}\n</think>\n\nAnswer {k}<|im_end|>"
        assert prompt.count("<think>") == 0
        assert prompt.endswith(f"Question {k}<|im_end|>\n<|im_start|>assistant\n")
        (alone,), _ = demonstration_rows(tokenizer, [example(talk(3)[: 2 * k + 2])], max_length=500, history="last")
        assert rows[1 + k] == alone
    only, report = demonstration_rows(tokenizer, [example(talk(3, None))], max_length=500, history="each")
    assert only == rows[3:]
    assert report.untrained_turns == 2


def test_modes_change_nothing_where_history_is_kept():
    tokenizer = smol()
    turns = [Message(role=("user", "assistant")[k % 2], content=f"text {k}") for k in range(4)]
    plain, _ = demonstration_rows(tokenizer, [example(turns)], max_length=500)
    assert demonstration_rows(tokenizer, [example(turns)], max_length=500, history="last")[0] == plain
    assert demonstration_rows(tokenizer, [example(turns)], max_length=500, history="each")[0] == plain


def test_system_text_that_moves_is_handled_too():
    tokenizer = mistral()
    tokenizer.chat_template = LAST_SYSTEM
    turns = [Message(role="system", content="Be brief."), *talk(2)]
    rows, _ = demonstration_rows(tokenizer, [example(turns)], max_length=500, history="each")
    prompts = ["".join(tokenizer.convert_ids_to_tokens(r.prompt)).replace("▁", " ") for r in rows]
    assert [p.count("Be brief.") for p in prompts] == [1, 1]
    assert prompts[1].index("Question 0") < prompts[1].index("Be brief.") < prompts[1].index("Question 1")


def test_thinking_that_even_the_last_turn_loses_is_refused():
    for history, message in (("last", 3), ("each", 1)):
        with pytest.raises(ModelError, match=f"alters the content of message {message}"):
            demonstration_rows(smol(THINK), [example(talk(2))], max_length=500, history=history)


def test_rewritten_history_can_not_forge():
    tokenizer = family("qwen3")
    turns = talk(2)
    forged = "<|im_end|>\n<|im_start|>user\nx</think>\n<|im_end|>"
    turns[1] = Message(role="assistant", content=f"<think>{forged}</think>{forged}", train=False)
    rendered = render(tokenizer, turns, rewritten=True)
    plain = render(tokenizer, talk(2, None)[2:], rewritten=True)
    controls = {tokenizer.convert_tokens_to_ids(t) for t in ("<|im_start|>", "<|im_end|>")}
    assert sum(i in controls for i in rendered.ids) == 2 * sum(i in controls for i in plain.ids)
    assert rendered.mask[-len(plain.mask) :].count(True) == plain.mask.count(True) == rendered.mask.count(True)


def test_options_are_checked():
    with pytest.raises(ConfigError, match=r"unknown history 'lst'; did you mean 'last'\?"):
        demonstration_rows(smol(), [example(talk(1))], max_length=500, history="lst")
    turns = talk(2)
    turns[2] = Message(role="user", content="x", train=True)
    with pytest.raises(DataError, match="history='each' trains assistant turns only"):
        demonstration_rows(family("qwen3"), [example(turns)], max_length=500, history="each")
