"""Recorded functions: the same numbers at every size, writes into arguments, one record for each choice."""

from __future__ import annotations

import torch

from posttrain.ops.recorded import recorded


def step(x, cache, rows, *, scale, twice):
    cache.index_put_((rows,), x * scale)
    grown = x.new_zeros((x.shape[0], x.shape[1] * 2))
    grown[:, : x.shape[1]].copy_(cache[: rows.shape[0]])
    return grown.view(-1, 2) * (2 if twice else 1), grown.shape[0] * x.mean()


def test_a_record_serves_all_sizes_dtypes_and_choices():
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for rows, width in ((1, 3), (4, 3), (2, 7)):
            for dtype in (torch.float32, torch.bfloat16):
                for fixed in ({"scale": 0.5, "twice": False}, {"scale": 3.0, "twice": True}):
                    x, cache = torch.randn(rows, width, generator=g).to(dtype), torch.zeros(6, width, dtype=dtype)
                    other, index = cache.clone(), torch.arange(rows)
                    got, wanted = recorded(step, x, cache, index, **fixed), step(x, other, index, **fixed)
                    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, wanted, strict=True))
                    assert torch.equal(cache, other) and bool(cache[0].any())
