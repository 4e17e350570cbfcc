"""Decoding written out, against the network's own forward pass over whole rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from posttrain.models import lora as adapters
from posttrain.models.attention import attend
from posttrain.models.decode import _checked_calls, decoder_of
from posttrain.models.policy import Model
from posttrain.models.slots import SlotLayout, by_products
from posttrain.ops.recorded import _graphs
from tiny import ours, plain_net

WRITTEN_OUT = ["llama", "mistral", "qwen2", "qwen3"]
TOKENS = torch.randint(3, 97, (4, 30), generator=torch.Generator().manual_seed(1))


def decoded(model, count=30):
    """States of the first ``count`` tokens of every row, fed one at a time."""
    decoder, layout = decoder_of(model), SlotLayout(4, torch.device("cpu"))
    layout.position -= 1
    with torch.no_grad():
        return torch.stack([decoder.states(ids, layout.advance(4), layout) for ids in TOKENS.T[:count]], 1)


@pytest.mark.parametrize("family", WRITTEN_OUT)
def test_states_are_those_of_whole_rows(family, monkeypatch):
    monkeypatch.setattr(nn.functional, "softmax", lambda x, dim, dtype=None: x.softmax(dim))  # theirs is in fp32
    net = plain_net(family)
    with torch.no_grad():
        whole = net.base_model(input_ids=TOKENS).last_hidden_state
    torch.testing.assert_close(decoded(Model(ours(net))), whole, atol=1e-9, rtol=0)


def test_states_in_fp32_and_bf16():
    exact = plain_net()
    with torch.no_grad():
        whole = exact.base_model(input_ids=TOKENS).last_hidden_state
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        got = decoded(Model(ours(plain_net(dtype=dtype))))
        assert got.dtype == dtype
        errors[dtype] = float((got.double() - whole).norm() / whole.norm())
    assert errors[torch.float32] < 1e-5 and 1e-3 < errors[torch.bfloat16] < 3e-2


def test_packed_products_are_the_products():
    net = ours(plain_net(dtype=torch.bfloat16))
    states = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        packed = decoder_of(Model(net)).head(states)
        exact = states.double() @ net.lm_head.weight.double().T
    assert packed.dtype == torch.bfloat16
    assert ((packed.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()


@pytest.mark.parametrize("family", ["gemma2", "phi3"])
def test_other_layers_decode_by_their_own_network(family):
    assert decoder_of(Model(ours(plain_net(family)))) is None


def test_a_network_that_computes_more_than_is_written_out_is_noticed():
    model = Model(ours(plain_net()))
    with torch.no_grad():
        calls = _checked_calls(model)
    assert calls == [(8**-0.5, None, None)] * 2
    model.trunk.layers[1].mlp.register_forward_hook(lambda _, args, out: 1.01 * out)
    with torch.no_grad():
        assert _checked_calls(model) is None
    scaled = Model(ours(plain_net()))
    scaled.trunk.layers[0].post_attention_layernorm = nn.LayerNorm(32).double()  # another norm of the same shape
    with torch.no_grad():
        assert _checked_calls(scaled) is None


def test_weights_are_read_anew_and_with_the_adapter_that_is_merged():
    net = ours(plain_net(dtype=torch.bfloat16))
    adapters.add_adapter(net, net.base_model, "a", adapters.Lora(rank=2, alpha=64), seed=0)
    for name, parameter in adapters.parameters(net, "a").items():
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    before = {k: p.clone() for k, p in net.named_parameters()}
    with adapters.merged(net, None):
        plain = decoded(Model(net), 3)
    with torch.no_grad(), adapters.merged(net, "a"):
        adapted = decoded(Model(net, adapter="a"), 3)
        whole = net.base_model(input_ids=TOKENS[:, :3]).last_hidden_state
    assert (adapted - plain).norm() > 0.1 * plain.norm()
    assert (adapted - whole).norm() < 0.03 * whole.norm()
    assert all(torch.equal(p, before[k]) for k, p in net.named_parameters())
    with adapters.merged(net, None):
        assert torch.equal(decoded(Model(net), 3), plain)


def testby_products_in_half_precision_is_as_close_as_its_factors():
    """Scores of 30, which bf16 holds to 0.06: a product rounded to bf16 would be off by several per cent."""
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, 2, n, 64, generator=draw).bfloat16() for n in (3, 50, 50))
    query = query * 8
    unseen = torch.arange(50)[None] > torch.tensor([10, 49, 30])[:, None]
    exact = attend(query.double(), key.double(), value.double(), ~unseen[:, None, None], 0.125, None)
    got = by_products(query, key, value, unseen, 0.125)
    rounded = (query @ key.transpose(2, 3)).double() * 0.125
    share = rounded.masked_fill(unseen[:, None, None], float("-inf")).softmax(-1)
    coarse = share @ value.double()
    error, usual = ((x.double() - exact).norm() / exact.norm() for x in (got, coarse))
    assert error < 2**-8 and usual > 3 * error


def test_a_cache_grows_and_shrinks_with_what_it_holds():
    layout, draw = SlotLayout(3, torch.device("cpu")), torch.Generator().manual_seed(0)
    key, value = (torch.randn(200, 2, 4, generator=draw) for _ in range(2))
    lengths = []
    for slot, span in enumerate([(0, 40), (40, 200), (10, 20)]):
        layout.load(slot, {0: (key, value)}, span)
        lengths.append(layout.length)
    assert lengths == [64, 192, 192] and layout.position.tolist() == [39, 159, 9]
    layout.move(2, 1)
    assert layout.advance(2).tolist() == [40, 10]
    assert layout.length == 64 and layout.cache[0][0].shape == (3, 2, 64, 4)
    for held, fresh in zip(layout.cache[0], (key, value), strict=True):
        assert torch.equal(held[0, :, :40], fresh[:40].transpose(0, 1))
        assert torch.equal(held[1, :, :10], fresh[10:20].transpose(0, 1))
        assert held.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_one_sequence_first_and_then_others(dtype):
    """What is recorded with one slot serves several, and the other way round."""
    _graphs.clear()
    model = Model(ours(plain_net(dtype=dtype)))
    with torch.no_grad():
        whole = model.net.base_model(input_ids=TOKENS[:, :5]).last_hidden_state.double()
        for count in (1, 4, 2, 1):
            layout, decoder = SlotLayout(4, torch.device("cpu")), decoder_of(model)
            layout.position -= 1
            for at, ids in enumerate(TOKENS.T[:5]):
                got = decoder.states(ids[:count], layout.advance(count), layout).double()
                wanted = whole[:count, at]
                assert (got - wanted).norm() < (1e-9 if dtype == torch.float64 else 0.03) * wanted.norm()
