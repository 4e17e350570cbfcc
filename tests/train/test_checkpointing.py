"""Layers computed again in the backward pass: the same numbers to the bit, with less kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from posttrain.errors import ModelError
from posttrain.graph import describe
from posttrain.models.lora import Lora, add_adapter
from posttrain.models.policy import Model, forward_stats
from posttrain.models.recompute import recomputed
from posttrain.stages import SFT
from posttrain.train.diagnose import memory_forecast
from posttrain.train.loop import fit
from posttrain.train.objectives import Supervised
from posttrain.train.optim import Optim
from posttrain.train.sources import demonstration_source
from tiny import FAMILIES, ours, plain_net, random_forest

from .cases import gradients, make, names
from .tiny import equal, metrics, random_rows, role, run_in, weights

LOGP = frozenset({"logp"})


@pytest.mark.parametrize("name", names())
def test_gradients_of_every_objective_are_the_same_bits(name):
    models, objective, batch = make(name)
    again = {r: replace(m, checkpointing=True) for r, m in models.items()}
    for max_tokens in (10_000, 30):
        found, grads, parts = gradients(models, objective, batch, max_tokens)
        other, others, _ = gradients(again, objective, batch, max_tokens)
        assert found == other and equal(grads, others) and (parts > 1) == (max_tokens == 30)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_with_shared_prompts_and_plain_rows(family, plain):
    net = ours(plain_net(family)).requires_grad_(True)
    forest, grads = random_forest(3), []
    for on in (False, True):
        model = Model(net, trained=True, plain=plain, checkpointing=on)
        forward_stats(model, forest, LOGP)["logp"].square().sum().backward()
        grads.append({k: p.grad.clone() for k, p in net.named_parameters()})
        net.zero_grad()
    assert equal(*grads) and max(float(g.abs().max()) for g in grads[0].values()) > 1e-3


def test_a_layer_is_computed_again_with_the_adapter_of_its_own_pass():
    """Two roles of one network, both forwarded before either is back-propagated, and a pass of the base in between."""
    net, forest, found = ours(plain_net()), random_forest(4), []
    for seed, name in enumerate(("a", "b")):
        add_adapter(net, net.base_model, name, Lora(rank=4, alpha=8), seed=seed)
    draw = torch.Generator().manual_seed(1)
    for path, p in net.named_parameters():  # those of a fresh adapter would change nothing
        if ".lora_B." in path:
            p.data.copy_(torch.randn(p.shape, generator=draw, dtype=p.dtype))
    trained = {k: p.requires_grad_(True) for k, p in net.named_parameters() if ".lora_" in k}
    for on in (False, True):
        one, two = (Model(net, adapter=n, trained=True, checkpointing=on) for n in ("a", "b"))
        stats = [forward_stats(m, forest, LOGP)["logp"] for m in (one, two)]
        with torch.no_grad():
            forward_stats(Model(net, checkpointing=on), forest, LOGP)
        (stats[0].sum() + 2 * stats[1].square().sum()).backward()
        found.append({k: p.grad.clone() for k, p in trained.items()})
        net.zero_grad()
    assert equal(*found) and all(bool(g.any()) for g in found[0].values())


def kept_and_computed(layers: int, on: bool) -> tuple[int, int]:
    """Numbers that a graph keeps of a forward pass, without weights, and how often the layers' MLPs ran."""
    net = ours(plain_net(num_hidden_layers=layers)).requires_grad_(True)
    numbers, runs = [], []
    for name, module in net.named_modules():
        if name.endswith(".mlp"):
            module.register_forward_pre_hook(lambda *_: runs.append(1))

    def pack(x):
        numbers.append(0 if isinstance(x, nn.Parameter) else x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = forward_stats(Model(net, trained=True, checkpointing=on), random_forest(5), LOGP)["logp"]
    out.sum().backward()
    assert not any("forward" in m.__dict__ for m in net.modules() if isinstance(m, GradientCheckpointingLayer))
    return sum(numbers), len(runs)


def test_a_layer_keeps_its_input_alone_and_is_computed_twice():
    (few, ran), (many, ran_more) = kept_and_computed(2, True), kept_and_computed(5, True)
    assert many - few == 3 * len(random_forest(5).ids) * 32 and (ran, ran_more) == (4, 10)
    (few_off, ran), (many_off, ran_more) = kept_and_computed(2, False), kept_and_computed(5, False)
    assert many_off - few_off > 10 * (many - few) and (ran, ran_more) == (2, 5)


def test_a_network_without_such_layers_is_refused_and_needs_none_without_gradient():
    with pytest.raises(ModelError, match=r"^Linear has no layers that can be computed again; train with"):
        recomputed(nn.Linear(2, 2), None).__enter__()
    with torch.no_grad(), recomputed(nn.Linear(2, 2), None):
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_ends_with_the_same_weights(tmp_path, dtype):
    rows, ends = random_rows(5, [(5, [4]), (9, [6]), (2, [8]), (12, [5])]), []
    for on in (False, True):
        models = {"policy": role(2, dtype=dtype)}
        source = demonstration_source(rows, per_step=2, seed=0)
        run = run_in(tmp_path / str(on), steps=4, checkpointing=on)
        fit(models, Supervised(), source, optim=Optim(lr=1e-2), run=run)
        ends.append((weights(models), metrics(tmp_path / str(on))))
    assert equal(ends[0][0], ends[1][0]) and ends[0][1] == ends[1][1]


def test_forecasts_know_it_and_a_stage_keeps_its_key():
    off, on = SFT(model="small", data="smallworld"), SFT(model="small", data="smallworld", checkpointing=True)
    assert on.plan().flops == pytest.approx(off.plan().flops * 8 / 6)
    assert off.plan().memory - on.plan().memory == pytest.approx(0.95e6 * 1024)
    keys = [describe({"sft": s}, seed=0, tiny=False)["sft"]["key"] for s in (off, on)]
    assert keys[0] == keys[1]
    model = role(0)
    saved = memory_forecast({"policy": model}, 1000) - memory_forecast(
        {"policy": replace(model, checkpointing=True)}, 1000
    )
    assert saved == 1000 * 8 * ((2 - 1) * (8 * 32 + 4 * 48) - 2 * 32)
