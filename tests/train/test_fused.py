"""A step within the backward pass is the step after it, to the bit, with less gradient memory."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from posttrain.errors import ConfigError
from posttrain.models.load import load_policy
from posttrain.models.lora import Lora
from posttrain.models.small import small_path
from posttrain.train.fused import HalfStep, fused_step, gradient_peak
from posttrain.train.loop import fit
from posttrain.train.objectives import PolicyGradient, Supervised
from posttrain.train.optim import MasterAdamW, Optim
from posttrain.train.sources import demonstration_source

from .tiny import equal, metrics, random_rows, role, rollouts, run_in, weights

PLAIN = Optim(lr=0.01, role_lr={"value": 0.02}, schedule="cosine", warmup_steps=2, weight_decay=0.1, clip=math.inf)
FUSED = replace(PLAIN, fused=True)
ROWS = random_rows(1, [(3, [4]), (2, [6]), (5, [3]), (4, [2, 3])])


def reinforce(directory, optim, dtype, **changes):
    models = {"policy": role(0, dtype=dtype), "value": role(1, scalar=True, dtype=dtype)}
    models["value"].scalar.float()  # as heads of scores are loaded
    source = rollouts(models["policy"], role(0, trained=False, dtype=dtype), models["value"])
    run = run_in(directory, save_every=3, **changes)
    fit(models, PolicyGradient(ratio_tolerance=10.0), source, optim=optim, run=run)  # bf16 rounds a lot
    return models


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_roles_several_micro_batches(tmp_path, dtype):
    """Six updates of a policy and a critic; checkpoints, too, are the same."""
    one, two = (reinforce(tmp_path / k, optim, dtype) for k, optim in (("plain", PLAIN), ("fused", FUSED)))
    assert equal(weights(one), weights(two)) and not equal(weights(one), weights({"policy": role(0, dtype=dtype)}))
    files = [tmp_path / k / "checkpoints" / "step-00000006" / "tensors.safetensors" for k in ("plain", "fused")]
    assert files[0].read_bytes() == files[1].read_bytes()
    rows = [metrics(tmp_path / k) for k in ("plain", "fused")]
    norms = [[row.pop("optim/grad_norm") for row in r] for r in rows]
    assert rows[0] == rows[1] and norms[0] == pytest.approx(norms[1], rel=1e-3)


@pytest.mark.parametrize("rank", [0, 4])
def test_the_small_model(tmp_path, rank):
    """Its output layer is its embedding, whose gradient comes from both ends; adapters move among frozen weights."""

    def trained(name, optim):
        lora = Lora(rank=rank, alpha=8) if rank else None
        model = load_policy(str(small_path("instruct")), dtype=torch.float32, lora=lora, train=True)
        source = demonstration_source(ROWS, per_step=2, seed=7)
        fit({"policy": model}, Supervised(), source, optim=optim, run=run_in(tmp_path / name, steps=3, max_tokens=512))
        return weights({"policy": model})

    one = trained("plain", replace(PLAIN, lr=1e-3))
    assert equal(one, trained("fused", replace(FUSED, lr=1e-3)))


def test_gradients_are_not_held_together():
    """Of four layers at most one; those that a pass does not reach keep theirs, for the step after."""
    layers = [nn.Linear(8, 8, bias=False) for _ in range(4)]
    aside = nn.Parameter(torch.ones(8))
    named = {str(k): layer.weight for k, layer in enumerate(layers)} | {"aside": aside}

    def backward(x):
        for layer in layers:
            x = torch.tanh(layer(x))
        x.sum().backward()

    optimizer = MasterAdamW({"policy": named}, FUSED)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    with gradient_peak(named.values()) as peak:
        backward(x)
    assert peak.bytes == 4 * 8 * 8 * 4
    optimizer.clear()
    aside.grad = torch.ones(8)
    with gradient_peak(named.values()) as peak, fused_step(optimizer, 1.0) as moved:
        backward(x)
    assert peak.bytes == 8 * 8 * 4 + 8 * 4 and moved.count == 4
    assert all(layer.weight.grad is None for layer in layers) and bool((aside == 1).all())
    optimizer.step(1.0)
    assert bool((aside < 1).all()) and aside.grad is None


@pytest.mark.parametrize("changes", [{"clip": 1.0}, {"clip": 100.0}])
def test_clipping_is_refused(changes):
    with pytest.raises(ConfigError, match="expected clip=inf, no merging and one rank"):
        replace(FUSED, **changes)


def test_a_gradient_that_is_not_finite_ends_the_run(tmp_path):
    """Weights that moved before it was found can't be put back; the checkpoint before can."""
    model = role(0)
    last = next(iter(model.parameters().values()))  # what the pass reaches last

    def spoil(step, _):
        if step == 2:
            last.register_hook(lambda grad: grad * math.nan)

    source = demonstration_source(ROWS, per_step=2, seed=7)
    with pytest.raises(HalfStep, match=r"the gradient of policy/\S+ is not finite, and \d+ parameters have moved"):
        fit({"policy": model}, Supervised(), source, optim=FUSED, run=run_in(tmp_path, save_every=1), hooks=[spoil])
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*"))[-1] == "step-00000003"
