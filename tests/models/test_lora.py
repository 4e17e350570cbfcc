"""Adapters as roles: switching, saving in peft's format, loading."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from posttrain.errors import ModelError
from posttrain.forest import build_forest
from posttrain.models import lora
from posttrain.models.load import load_policy
from posttrain.models.policy import Model, forward_stats, hidden_states
from posttrain.ops.token_stats import logits_of
from tiny import FAMILIES, ours, plain_net, random_rows

LOGP = frozenset({"logp"})


def adapted(names=("a",), family="llama", dtype=torch.float64, rank=4):
    """A network with random adapters; fresh ones would change nothing."""
    net = ours(plain_net(family, dtype=dtype))
    for seed, name in enumerate(names):
        lora.add_adapter(net, net.base_model, name, lora.Lora(rank=rank, alpha=2 * rank), seed=seed)
        stir(net, name, seed)
    return net


def stir(net, name, seed=0):
    """Random adapter weights, trainable."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in lora.parameters(net, name).values():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)
        parameter.requires_grad_(True)


def logits(model, ids):
    """Logits of one row, as the library computes them."""
    row = random_rows(0)[0]._replace(prompt=ids)
    with torch.no_grad():
        return logits_of(hidden_states(model, build_forest([row]))[: len(ids)], model.head)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_adapter_covers_every_linear_layer_and_changes_nothing(family):
    net = ours(plain_net(family))
    linears = sum(isinstance(m, torch.nn.Linear) for m in net.base_model.modules())
    before = logits(Model(net), [5, 6, 7])
    lora.add_adapter(net, net.base_model, "a", lora.Lora(rank=4), seed=0)
    assert len(lora.layers(net)) == linears and not any("lm_head" in path for path in lora.layers(net))
    assert torch.equal(logits(Model(net, adapter="a"), [5, 6, 7]), before)
    first = {k: v.clone() for k, v in lora.parameters(net, "a").items()}
    assert {p.dtype for p in first.values()} == {torch.float64}
    lora.add_adapter(net, net.base_model, "b", lora.Lora(rank=4), seed=0)
    lora.add_adapter(net, net.base_model, "c", lora.Lora(rank=4), seed=1)
    same = {k.replace(".b.", ".a."): v for k, v in lora.parameters(net, "b").items()}
    other = {k.replace(".c.", ".a."): v for k, v in lora.parameters(net, "c").items()}
    assert all(torch.equal(first[k], same[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_roles_compute_their_own_function():
    net = adapted(("a", "b"))
    plain = logits(Model(ours(plain_net())), [5, 6, 7])
    seen = {name: logits(Model(net, adapter=name), [5, 6, 7]) for name in ("a", "b", None)}
    torch.testing.assert_close(seen[None], plain, atol=1e-12, rtol=0)
    assert (seen["a"] - plain).abs().max() > 0.01 and (seen["a"] - seen["b"]).abs().max() > 0.01
    # what the deltas say is what the adapter adds
    merged = ours(plain_net())
    state = merged.state_dict()
    for name, delta in lora.deltas(net, "a").items():
        state[name].add_(delta)
    torch.testing.assert_close(logits(Model(merged), [5, 6, 7]), seen["a"], atol=1e-6, rtol=0)


def test_switching_cuts_no_gradient_of_a_graph_built_before():
    forest = build_forest(random_rows(0))

    def gradients(switch):
        net = adapted(("a", "b"))
        loss = forward_stats(Model(net, adapter="a", trained=True), forest, LOGP)["logp"].sum()
        if switch:
            with torch.no_grad():
                forward_stats(Model(net), forest, LOGP)
            loss = loss + 2 * forward_stats(Model(net, adapter="b", trained=True), forest, LOGP)["logp"].sum()
            forward_stats(Model(net), forest, LOGP)
        loss.backward()
        return {n: {k: p.grad for k, p in lora.parameters(net, n).items()} for n in ("a", "b")}, net

    alone, _ = gradients(False)
    switched, net = gradients(True)
    for path, grad in alone["a"].items():
        assert grad.abs().max() > 0
        torch.testing.assert_close(switched["a"][path], grad, atol=1e-12, rtol=1e-12)
    assert all(g is None for g in alone["b"].values())
    assert all(g.abs().max() > 0 for g in switched["b"].values())
    assert all(p.grad is None for k, p in net.named_parameters() if "lora_" not in k)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_saved_adapter_loads_in_plain_peft_and_here(tmp_path, family):
    base = str(tmp_path / "base")
    plain_net(family, dtype=torch.float32).save_pretrained(base)
    shape = lora.Lora(rank=3, alpha=12)
    model = load_policy(base, dtype=torch.float32, lora=shape, train=True)
    stir(model.net, "policy")
    lora.save_adapter(model.net, "policy", tmp_path / "adapter", base, shape)
    mine = logits(model, [5, 6, 7, 8])

    theirs = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    theirs = PeftModel.from_pretrained(theirs, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        out = theirs(input_ids=torch.tensor([[5, 6, 7, 8]])).logits[0]
    torch.testing.assert_close(out, mine, atol=1e-5, rtol=0)

    again = load_policy(base, dtype=torch.float32)
    assert (logits(again, [5, 6, 7, 8]) - mine).abs().max() > 0.01
    lora.load_adapter(again.net, again.trunk, "reference", tmp_path / "adapter")
    assert torch.equal(logits(Model(again.net, adapter="reference"), [5, 6, 7, 8]), mine)
    assert not any(p.requires_grad for p in again.net.parameters())


def test_an_adapter_of_another_shape_is_refused(tmp_path):
    lora.save_adapter(adapted(), "a", tmp_path, "base", lora.Lora(rank=4, alpha=8))
    deeper = ours(plain_net(num_hidden_layers=3))
    with pytest.raises(ModelError, match="does not fit this network"):
        lora.load_adapter(deeper, deeper.base_model, "x", tmp_path)
