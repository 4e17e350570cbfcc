"""Token statistics and their gradients against `log_softmax` of whole logits, in float64 and in several chunks."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from posttrain.ops import token_stats as module
from posttrain.ops.token_stats import STATS, Head, logits_of, token_stats

M, V, D = 50, 41, 8


def naive(hidden, weight, bias, target, *, scale, soft_cap, temperature, other_logits):
    """All five statistics by autograd."""
    z = scale * (hidden @ weight.T + (0 if bias is None else bias))
    if soft_cap is not None:
        z = soft_cap * torch.tanh(z / soft_cap)
    logp, q = torch.log_softmax(z / temperature, 1), torch.log_softmax(other_logits / temperature, 1)
    p = logp.exp()
    return {
        "logp": logp[torch.arange(len(target)), target],
        "entropy": -(p * logp).sum(1),
        "sum_p2": (p * p).sum(1),
        "kl_to_other": (p * (logp - q)).sum(1),
        "kl_from_other": (q.exp() * (q - logp)).sum(1),
    }


@pytest.fixture
def draws():
    g = torch.Generator().manual_seed(5)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return {
        "hidden": normal(M, D),
        "weight": normal(V, D),
        "bias": normal(V),
        "target": torch.randint(V, (M,), generator=g),
        "other": (normal(M, 5), Head(normal(V, 5))),
        "pull": {name: normal(M) for name in STATS},
    }


def both(draws, want, *, bias=True, scale=1.0, soft_cap=None, temperature=1.0):
    """Statistics and gradients (hidden, weight, bias) of ours and of the naive computation."""
    out = []
    for ours in (True, False):
        leaves = [draws[k].clone().requires_grad_() for k in ("hidden", "weight", "bias")[: 3 if bias else 2]]
        hidden, weight, b = (*leaves, None)[:3]
        if ours:
            head = Head(weight, b, scale, soft_cap)
            stats = token_stats(hidden, head, draws["target"], set(want), temperature=temperature, other=draws["other"])
        else:
            other = draws["other"][0] @ draws["other"][1].weight.T
            stats = naive(
                hidden,
                weight,
                b,
                draws["target"],
                scale=scale,
                soft_cap=soft_cap,
                temperature=temperature,
                other_logits=other,
            )
        sum((stats[name] * draws["pull"][name]).sum() for name in want).backward()
        out.append(({name: stats[name].detach() for name in want}, [x.grad for x in leaves]))
    return out


def same(one, two):
    assert one[0].keys() == two[0].keys()
    for name in one[0]:
        torch.testing.assert_close(one[0][name], two[0][name], atol=1e-9, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    for mine, theirs in zip(one[1], two[1], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=0)


@pytest.mark.parametrize("chunk_bytes", [1, 2**26])  # 16 rows a chunk at least: four chunks, or one
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("scale", "soft_cap", "bias"), [(1.0, None, True), (1.7, 3.0, True), (0.4, 2.0, False)])
def test_five_statistics_and_their_gradients(draws, monkeypatch, chunk_bytes, temperature, scale, soft_cap, bias):
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
    same(*both(draws, STATS, bias=bias, scale=scale, soft_cap=soft_cap, temperature=temperature))


@pytest.mark.parametrize("name", STATS)
def test_each_statistic_alone(draws, monkeypatch, name):
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    same(*both(draws, (name,), scale=1.3, soft_cap=4.0, temperature=1.2))


def test_frozen_weights_receive_no_gradient_and_no_rows_are_no_fault(draws):
    hidden = draws["hidden"].clone().requires_grad_()
    head = Head(draws["weight"])
    token_stats(hidden, head, draws["target"], {"logp"})["logp"].sum().backward()
    assert head.weight.grad is None and hidden.grad.abs().sum() > 0
    none = token_stats(hidden[:0], head, draws["target"][:0], {"logp", "entropy"})
    assert none["logp"].shape == none["entropy"].shape == (0,)
    (none["logp"].sum() + none["entropy"].sum()).backward()


def test_bfloat16_states_give_fp32_statistics(draws):
    hidden, weight = draws["hidden"].bfloat16(), draws["weight"].bfloat16()
    got = token_stats(hidden, Head(weight), draws["target"], {"logp"})["logp"]
    assert got.dtype == torch.float32 and logits_of(hidden, Head(weight)).dtype == torch.float32


def test_wrong_requests_are_refused(draws):
    args = draws["hidden"], Head(draws["weight"]), draws["target"]
    with pytest.raises(ValueError, match=r"unknown token statistics \['logprob'\]; known: logp"):
        token_stats(*args, {"logprob"})
    with pytest.raises(ValueError, match=r"a KL statistic needs other="):
        token_stats(*args, {"kl_to_other"})


class Largest(TorchDispatchMode):
    """Sees every operation; keeps the size of the largest tensor any of them returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


@pytest.mark.parametrize("want", [{"logp"}, set(STATS)])
def test_no_tensor_is_near_the_size_of_all_logits(monkeypatch, want):
    rows, vocabulary, chunk = 4096, 2000, 128
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk * vocabulary * 4)
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 8, generator=g).requires_grad_()
    head = Head(torch.randn(vocabulary, 8, generator=g).requires_grad_(), soft_cap=9.0)
    other = (torch.randn(rows, 8, generator=g), Head(torch.randn(vocabulary, 8, generator=g)))
    target = torch.randint(vocabulary, (rows,), generator=g)
    with Largest() as forward:
        stats = token_stats(hidden, head, target, want, other=other)
    with Largest() as backward:
        sum(x.sum() for x in stats.values()).backward()
    for seen in (forward, backward):
        assert seen.numel == chunk * vocabulary < rows * vocabulary / 4
