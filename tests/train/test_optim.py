"""The optimiser against torch's AdamW in fp32, schedules, and gradients that are not finite."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from posttrain.errors import CheckError, ConfigError
from posttrain.train.optim import MasterAdamW, Optim, schedule_factor
from posttrain.train.rounding import rounded


def factors(steps, **given):
    return [schedule_factor(Optim(lr=1.0, **given), step, steps) for step in range(steps)]


def test_schedules():
    near = pytest.approx
    assert factors(6, warmup_steps=4) == [0.25, 0.5, 0.75, 1, 1, 1]
    linear = factors(8, schedule="linear", floor=0.2)
    assert linear[:5] == near([1, 0.9, 0.8, 0.7, 0.6])
    cosine = factors(9, schedule="cosine", warmup_steps=1)
    assert [cosine[i] for i in (0, 1, 3, 5)] == near([1, 1, 0.1 + 0.45 * (1 + 0.5**0.5), 0.55])
    for values in (linear, cosine):
        assert all(a >= b for a, b in pairwise(values[1:])) and min(values) >= 0.1
    with pytest.raises(ConfigError, match="unknown schedule 'sine'; expected constant, linear or cosine"):
        factors(1, schedule="sine")


def neighbours(x):
    """The bf16 numbers between which x lies, the one nearer to 0 first."""
    below = x.view(torch.int32).bitwise_and(-0x10000)
    above = torch.where(x.view(torch.int32) == below, below, below + 0x10000)
    return below.view(torch.float32).bfloat16(), above.view(torch.float32).bfloat16()


def test_rounding_at_random_has_the_master_as_its_mean_and_keeps_what_bf16_can_hold():
    """A million weights of 0.03 (bf16 has steps of 1.2e-4 there), moved by 1e-6: the nearest bf16 numbers would not move at all."""
    g = torch.Generator().manual_seed(0)
    start = torch.tensor([0.03, -0.03]).repeat(500_000).bfloat16().float()
    moment = torch.randn(1_000_000, generator=g)
    assert torch.equal(rounded(start, moment), start)
    master = start + 1e-6
    assert torch.equal(master.bfloat16().float(), start)
    moved = rounded(master, moment)
    below, above = neighbours(master)
    assert bool(((moved == below) | (moved == above)).all()) and torch.equal(moved, moved.bfloat16().float())
    # The mean of a million draws of 0 or 1.2e-4: its standard error is 1.1e-8.
    assert float((moved.double() - start).mean()) == pytest.approx(1e-6, abs=5e-8)
    assert float((moved[::2].double() - start[::2]).mean()) == pytest.approx(1e-6, abs=8e-8)
    assert torch.equal(rounded(master, torch.zeros_like(moment)).bfloat16(), master.bfloat16())
    assert rounded(master, None) is master


def test_small_steps_of_bf16_weights_move_what_is_computed_as_fp32_does():
    """Twenty steps of 1e-6: the product with the weights moves as much as in fp32, within a tenth."""
    g = torch.Generator().manual_seed(0)
    start, x = torch.randn(4096, 8, generator=g).mul(0.02).bfloat16(), torch.randn(4096, generator=g).sign()
    sums = {}
    for dtype in (torch.float32, torch.bfloat16):
        weight = nn.Parameter(start.to(dtype, copy=True))
        optimizer, draw = MasterAdamW({"policy": {"w": weight}}, Optim(lr=1e-6)), torch.Generator().manual_seed(1)
        for _ in range(20):
            weight.grad = (x[:, None] + 0.1 * torch.randn(4096, 8, generator=draw)).to(dtype)
            optimizer.step(1.0)
        sums[dtype] = float((x[:, None] * (weight.detach().double() - start.double())).sum())
    assert sums[torch.bfloat16] == pytest.approx(sums[torch.float32], rel=0.1)
    assert sums[torch.float32] == pytest.approx(-4096 * 8 * 20e-6, rel=0.02)


def test_bf16_parameters_follow_an_fp32_reference():
    """Updates far below what bf16 can hold add up in the master, bit for bit as in fp32; roles have their own rate and clip."""
    g = torch.Generator().manual_seed(0)
    start = {"policy": torch.randn(6, 5, generator=g), "value": torch.randn(9, generator=g)}
    start = {k: v.bfloat16() for k, v in start.items()}
    live = {k: nn.Parameter(v.clone()) for k, v in start.items()}
    optim = Optim(lr=1e-4, role_lr={"value": 3e-4}, weight_decay=0.1, clip=1.0)
    ours = MasterAdamW({k: {"w": p} for k, p in live.items()}, optim)
    plain = {k: nn.Parameter(v.float()) for k, v in start.items()}
    reference = torch.optim.AdamW(
        [{"params": [plain["policy"]], "lr": 1e-4}, {"params": [plain["value"]], "lr": 3e-4}],
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.1,
    )
    for step in range(60):
        squares = 0.0
        for k, p in live.items():
            grad = (torch.randn(p.shape, generator=g) * (0.05 if k == "value" else 1.0) + 0.3).bfloat16()
            p.grad, plain[k].grad = grad, grad.float()
            squares += float(grad.float().norm()) ** 2
            nn.utils.clip_grad_norm_(plain[k], 1.0)
        assert ours.step(1.0) == pytest.approx(squares**0.5, rel=1e-5)
        reference.step()
        for k, p in live.items():
            master = ours.masters[k]["w"]
            assert master.dtype == torch.float32 and torch.equal(master, plain[k])
            below, above = neighbours(plain[k].detach())
            assert bool(((p == below) | (p == above)).all()) and p.grad is None
            if step == 0:  # bf16 alone would have stood still nearly everywhere
                assert (p.detach() == start[k]).float().mean() > 0.7 and not torch.equal(master, start[k].float())
    assert (live["value"] != start["value"]).all()


def test_fp32_parameters_are_their_own_masters():
    p = nn.Parameter(torch.ones(3))
    assert MasterAdamW({"policy": {"w": p}}, Optim(lr=0.1)).masters["policy"]["w"] is p


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(dtype, bad):
    roles = {k: {"w": nn.Parameter(torch.ones(3, dtype=dtype))} for k in ("policy", "value")}
    optimizer = MasterAdamW(roles, Optim(lr=0.1))

    def give(value):
        for role in roles.values():
            role["w"].grad = torch.ones(3, dtype=dtype)
        roles["value"]["w"].grad[1] = value

    give(1.0)
    optimizer.step(1.0)
    before = {k: v.clone() for k, v in optimizer.tensors().items()}
    live = {k: r["w"].detach().clone() for k, r in roles.items()}
    give(bad)
    with pytest.raises(CheckError, match=r"the gradient's norm is (nan|inf) .*'value'.*weights are unchanged"):
        optimizer.step(1.0)
    assert all(torch.equal(v, before[k]) for k, v in optimizer.tensors().items())
    assert all(torch.equal(r["w"].detach(), live[k]) for k, r in roles.items())


def test_a_checkpoint_of_another_model_is_refused():
    one = MasterAdamW({"policy": {"w": nn.Parameter(torch.ones(3))}}, Optim(lr=0.1))
    other = MasterAdamW({"policy": {"w": nn.Parameter(torch.ones(4))}}, Optim(lr=0.1))
    with pytest.raises(CheckError, match=r"no 'policy/master/w' of shape \(4,\); it is of another model"):
        other.load(one.tensors())
