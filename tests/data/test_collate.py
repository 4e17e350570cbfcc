from __future__ import annotations

import pytest

from posttrain.data import (
    demonstration_rows,
    parse_row,
    prompt_ids,
    ranking_rows,
    render,
    render_prompt,
    render_response,
)
from posttrain.errors import ConfigError, DataError, ModelError
from posttrain.forest import build_forest
from posttrain.types import Message

from .conftest import CHATML, smol


def demo(completion="General greeting!", row=1, **columns):
    return parse_row({"prompt": "Hello there", "completion": completion, **columns}, "d.jsonl", row)


def ranking(*completions, row=1, prompt="Hello there"):
    return parse_row({"prompt": prompt, "completions": list(completions)}, "r.jsonl", row)


def chat(*contents, row=1, **trained):
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": c, "train": trained.get(f"turn{i}")}
        for i, c in enumerate(contents)
    ]
    return parse_row({"messages": messages}, "m.jsonl", row)


def text(tokenizer, ids):
    return tokenizer.decode(ids)


def test_demonstration_rows(smol_tokenizer):
    example = demo()
    rows, report = demonstration_rows(smol_tokenizer, [example], max_length=100)
    assert rows[0].prompt == render_prompt(smol_tokenizer, example.prompt)
    (branch,) = rows[0].branches
    assert branch.ids == render_response(smol_tokenizer, example.prompt, example.responses[0].messages)
    assert branch.masks == {"loss": [True] * len(branch.ids)}
    assert not branch.truncated
    assert text(smol_tokenizer, branch.ids) == "General greeting!<|im_end|>"
    assert (report.index, report.kept, report.dropped, report.truncated) == ((0,), 1, {}, {})
    assert report.longest == len(rows[0].prompt) + len(branch.ids)


def test_earlier_turns_train_only_when_they_say_so(smol_tokenizer):
    contents = ("Hello there", "General greeting!", "Name a colour", "Red")
    (short,), report = demonstration_rows(smol_tokenizer, [chat(*contents)], max_length=100)
    assert text(smol_tokenizer, short.branches[0].ids) == "Red<|im_end|>"
    assert report.untrained_turns == 1
    assert "1 earlier assistant turns not trained" in str(report)
    (long,), report = demonstration_rows(smol_tokenizer, [chat(*contents, turn1=True)], max_length=100)
    assert report.untrained_turns == 0
    (branch,) = long.branches
    assert list(long.prompt) + list(branch.ids) == list(short.prompt) + list(short.branches[0].ids)
    assert text(smol_tokenizer, branch.ids) == (
        "General greeting!<|im_end|>\n<|im_start|>user\nName a colour<|im_end|>\n<|im_start|>assistant\nRed<|im_end|>"
    )
    kept = [i for i, on in zip(branch.ids, branch.masks["loss"], strict=True) if on]
    assert text(smol_tokenizer, kept) == "General greeting!<|im_end|>Red<|im_end|>"
    forest = build_forest([long])
    assert int(forest.masks["loss"].sum()) == len(kept)


def test_nothing_to_train_is_an_error(smol_tokenizer):
    with pytest.raises(DataError, match=r"m\.jsonl row 7, field 'train': no token is trained"):
        demonstration_rows(smol_tokenizer, [chat("a", "b", row=7, turn1=False)], max_length=100)


def test_ranking_rows_keep_order_and_share_the_prompt(smol_tokenizer):
    example = ranking("The sum is five.", "five", "Red")
    (row,), report = ranking_rows(smol_tokenizer, [example], max_length=100)
    assert row.prompt == render_prompt(smol_tokenizer, example.prompt)
    assert [text(smol_tokenizer, b.ids) for b in row.branches] == [
        "The sum is five.<|im_end|>",
        "five<|im_end|>",
        "Red<|im_end|>",
    ]
    assert all(all(b.masks["loss"]) and len(b.masks["loss"]) == len(b.ids) for b in row.branches)
    assert report.longest == len(row.prompt) + len(row.branches[0].ids)
    forest = build_forest([row])
    assert forest.ids[forest.end].tolist() == [2, 2, 2]


def test_ranking_prompts_can_not_be_trained(smol_tokenizer):
    prompt = [{"role": "user", "content": "a", "train": True}]
    with pytest.raises(DataError, match=r"r\.jsonl row 1, field 'train': a turn of a ranking's prompt says train=true"):
        ranking_rows(smol_tokenizer, [ranking("a", "b", prompt=prompt)], max_length=100)


def test_responses_that_read_the_same_are_refused(llama3_tokenizer):
    with pytest.raises(DataError, match=r"r\.jsonl row 3, field 'responses': differently ranked ones read the same"):
        ranking_rows(llama3_tokenizer, [ranking("same", "same ", row=3)], max_length=100)


LONG = "five " * 30


def lengths(tokenizer, example):
    prompt = len(render_prompt(tokenizer, example.prompt))
    return prompt, [len(render_response(tokenizer, example.prompt, r.messages)) for r in example.responses]


def test_overlong_is_an_error_by_default(smol_tokenizer):
    example = demo(LONG, row=5)
    prompt, (answer,) = lengths(smol_tokenizer, example)
    with pytest.raises(DataError) as caught:
        demonstration_rows(smol_tokenizer, [demo(), example], max_length=prompt + answer - 1)
    assert str(caught.value) == (
        f"d.jsonl row 5, field 'prompt and response': {prompt + answer} tokens ({prompt} prompt + "
        f"{answer} response), more than max_length {prompt + answer - 1}; raise max_length, or set overlong "
        "to drop, truncate_prompt_left or truncate_completion"
    )
    rows, _ = demonstration_rows(smol_tokenizer, [demo(), example], max_length=prompt + answer)
    assert len(rows) == 2


def test_drops_are_counted(smol_tokenizer):
    rows, report = demonstration_rows(smol_tokenizer, [demo(LONG), demo(), demo(LONG)], max_length=60, overlong="drop")
    assert len(rows) == 1
    assert report.index == (1,)
    assert report.dropped == {"longer than max_length": 2}
    assert str(report).startswith("kept 1 of 3, longest ")
    assert "dropped 2: longer than max_length" in str(report)


def test_truncating_completions_is_symmetric_and_loses_the_stop_token(smol_tokenizer):
    example = ranking(LONG, "Red " * 30, "five")
    prompt, answers = lengths(smol_tokenizer, example)
    limit = prompt + 8
    (row,), report = ranking_rows(smol_tokenizer, [example], max_length=limit, overlong="truncate_completion")
    assert [len(b.ids) for b in row.branches] == [8, 8, answers[2]]
    assert [b.truncated for b in row.branches] == [True, True, False]
    assert [b.ids[-1] == 2 for b in row.branches] == [False, False, True]
    assert [len(b.masks["loss"]) for b in row.branches] == [8, 8, answers[2]]
    assert build_forest([row]).truncated.tolist() == [True, True, False]
    assert report.truncated == {"completion cut, without stop token": 1}
    assert report.longest == prompt + max(answers)


def test_responses_alike_after_truncation_are_dropped_and_counted(smol_tokenizer):
    example = ranking(LONG, LONG + "six")
    prompt, _ = lengths(smol_tokenizer, example)
    rows, report = ranking_rows(smol_tokenizer, [example], max_length=prompt + 8, overlong="truncate_completion")
    assert rows == []
    assert report.dropped == {"responses equal after truncation": 1}
    assert report.truncated == {}


def test_truncating_prompts_keeps_their_end_and_bos(llama3_tokenizer):
    example = ranking("five", "Red", prompt=LONG)
    prompt, answers = lengths(llama3_tokenizer, example)
    (row,), report = ranking_rows(llama3_tokenizer, [example], max_length=30, overlong="truncate_prompt_left")
    whole = render_prompt(llama3_tokenizer, example.prompt)
    keep = 30 - max(answers)
    assert row.prompt == [llama3_tokenizer.bos_token_id, *whole[-(keep - 1) :]]
    assert [len(b.ids) for b in row.branches] == answers
    assert not any(b.truncated for b in row.branches)
    assert report.truncated == {"prompt cut on the left": 1}
    assert prompt > 30


def test_cuts_that_leave_nothing_are_errors(smol_tokenizer):
    with pytest.raises(DataError, match="no room for a response"):
        demonstration_rows(smol_tokenizer, [demo(LONG)], max_length=10, overlong="truncate_completion")
    with pytest.raises(DataError, match="no room for a prompt"):
        demonstration_rows(smol_tokenizer, [demo(LONG)], max_length=10, overlong="truncate_prompt_left")


def test_prompt_ids(smol_tokenizer):
    examples = [demo(), ranking("a", "b", prompt=LONG)]
    ids, report = prompt_ids(smol_tokenizer, examples, max_length=200)
    assert ids == [render_prompt(smol_tokenizer, e.prompt) for e in examples]
    assert report.index == (0, 1)
    ids, report = prompt_ids(smol_tokenizer, examples, max_length=40, overlong="drop")
    assert (len(ids), report.index) == (1, (0,))
    ids, report = prompt_ids(smol_tokenizer, examples, max_length=40, overlong="truncate_prompt_left")
    assert len(ids[1]) == 40
    with pytest.raises(ConfigError, match="no completion to truncate"):
        prompt_ids(smol_tokenizer, examples, max_length=60, overlong="truncate_completion")


def test_options_are_checked(smol_tokenizer):
    with pytest.raises(ConfigError, match=r"unknown overlong 'dropp'; did you mean 'drop'\?"):
        demonstration_rows(smol_tokenizer, [demo()], max_length=60, overlong="dropp")
    with pytest.raises(ConfigError, match="max_length is 1, expected at least 2"):
        demonstration_rows(smol_tokenizer, [demo()], max_length=1)


def test_template_faults_name_the_row():
    tokenizer = smol(CHATML.replace("m['content']", "m['content'].replace('!', '')"))
    with pytest.raises(ModelError, match=r"^d\.jsonl row 8: the chat template alters the content of message 1"):
        demonstration_rows(tokenizer, [demo(row=8)], max_length=60)


def test_rows_are_the_same_from_demonstration_and_ranking(smol_tokenizer):
    """The same text gives the same ids whichever method reads it."""
    (as_demo,), _ = demonstration_rows(smol_tokenizer, [demo("five")], max_length=60)
    (as_ranking,), _ = ranking_rows(smol_tokenizer, [ranking("five", "Red")], max_length=60)
    ids, _ = prompt_ids(smol_tokenizer, [demo("five")], max_length=60)
    assert as_demo.prompt == as_ranking.prompt == ids[0]
    assert as_demo.branches[0] == as_ranking.branches[0]
    whole = render(smol_tokenizer, [*demo().prompt, Message(role="assistant", content="five")])
    assert whole.ids[:-1] == [*as_demo.prompt, *as_demo.branches[0].ids]
