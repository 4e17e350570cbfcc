"""Conversations of any lengths, packed into a forest, are what they are as plain rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from posttrain.data import demonstration_rows, ranking_rows, render
from posttrain.forest import build_forest
from posttrain.models.policy import Model, forward_stats
from posttrain.types import Example, Message, Response
from tiny import ours, plain_net

from .conftest import llama3


@pytest.fixture(scope="module")
def tools():
    tokenizer = llama3()
    net = plain_net("llama", vocab_size=len(tokenizer))
    return tokenizer, net, Model(ours(net))


words = st.lists(st.sampled_from(["hello", "sum", " ", "five.\n", "é", "<|eot_id|>"]), max_size=12)
texts = words.map(lambda parts: "x" + "".join(parts))


def turns(contents):
    return tuple(Message(role=("user", "assistant")[k % 2], content=c) for k, c in enumerate(contents))


def demonstration(contents):
    said = turns(contents[: len(contents) // 2 * 2])
    trained = [Message(role=m.role, content=m.content, train=m.role == "assistant" or None) for m in said[:-1]]
    return Example(prompt=tuple(trained), responses=(Response(messages=said[-1:]),))


def ranking(contents):
    answers = [
        Response(messages=(Message(role="assistant", content=f"{k} {c}"),), rank=k) for k, c in enumerate(contents)
    ]
    return Example(prompt=turns(["ask"]), responses=tuple(answers))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    talks=st.lists(st.lists(texts, min_size=2, max_size=5), min_size=1, max_size=3),
    ranked=st.lists(st.lists(texts, min_size=2, max_size=3), max_size=2),
)
def test_packed_rows_equal_plain_rows(tools, talks, ranked):
    tokenizer, net, model = tools
    rows, _ = demonstration_rows(tokenizer, [demonstration(t) for t in talks], max_length=1000)
    rows += ranking_rows(tokenizer, [ranking(r) for r in ranked], max_length=1000)[0]
    forest = build_forest(rows)
    plain = [([*r.prompt, *b.ids], len(r.prompt), b) for r in rows for b in r.branches]
    for talk, (ids, _, branch) in zip(talks, plain, strict=False):
        example = demonstration(talk)
        whole = render(tokenizer, [*example.prompt, *example.responses[0].messages])
        assert ids == whole.ids[: len(ids)] and not any(whole.mask[len(ids) :])
        assert sum(branch.masks["loss"]) == sum(whole.mask)
    at = 0
    logps = []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(nn.functional, "softmax", lambda x, dim, dtype=None: x.softmax(dim))  # in the states' own dtype
        packed = forward_stats(model, forest, frozenset({"logp"}))["logp"]
        for ids, start, _ in plain:
            logits = net(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            logps.append(logits.log_softmax(1)[start - 1 : -1].gather(1, torch.tensor(ids)[start:, None])[:, 0])
    for (ids, start, branch), (low, high) in zip(plain, [b for t in forest.trees for b in t.branches], strict=True):
        assert forest.ids[low:high].tolist() == ids[start:]
        assert forest.positions[low:high].tolist() == list(range(start, len(ids)))
        assert forest.masks["loss"][at : at + len(branch.ids)].tolist() == list(branch.masks["loss"])
        at += len(branch.ids)
    torch.testing.assert_close(packed, torch.cat(logps), atol=1e-9, rtol=0)
