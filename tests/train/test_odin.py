"""Two heads: what length says goes into one of them, and the other is orthogonal to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from posttrain.train.loop import fit
from posttrain.train.odin import Odin, centred, correlation, length_role
from posttrain.train.optim import Optim
from posttrain.train.sources import ranking_source

from .tiny import random_rows, role, run_in


def batch_of(rows, ranks):
    return ranking_source(rows, ranks, per_step=len(rows), seed=0)(0)


def test_the_loss_by_hand():
    rows = random_rows(1, [(3, [2, 5]), (4, [6, 1]), (2, [4, 4])])
    batch = batch_of(rows, [[0, 1], [0, 1], [1, 0]])
    draw = torch.Generator().manual_seed(0)
    quality, other = (torch.randn(6, generator=draw, dtype=torch.float64) for _ in range(2))
    terms = Odin(weight=0.3)({"reward": {"score": quality}, "length": {"score": other}}, batch)
    lengths = batch.forest.lengths.double()
    centre = lambda x: (x.view(3, 2) - x.view(3, 2).mean(1, keepdim=True)).flatten()  # noqa: E731
    r_q, r_l = (float(np.corrcoef(centre(x), centre(lengths))[0, 1]) for x in (quality, other))
    rank = batch.branches["rank"].view(3, 2)
    both = (quality + other).view(3, 2)
    gaps = torch.where(rank[:, 0] < rank[:, 1], both[:, 0] - both[:, 1], both[:, 1] - both[:, 0])
    assert float(terms["loss/ranking"].sum) == pytest.approx(float(-logsigmoid(gaps).sum()))
    assert float(terms["loss/length"].sum) == pytest.approx(3 * (1 - r_l + abs(r_q)))
    assert terms["loss/length"].coefficient == 0.3 and float(terms["correlation/quality"].sum) == pytest.approx(3 * r_q)


def test_centring_and_correlation():
    group = torch.tensor([0, 0, 1, 1, 1])
    values = torch.tensor([1.0, 3.0, 4.0, 4.0, 7.0])
    assert centred(values, group).tolist() == [-1, 1, -1, -1, 2]
    assert float(correlation(values - values.mean(), torch.zeros(5))) == 0


def test_training_gives_length_to_one_head_and_takes_it_from_the_other(tmp_path):
    draw = torch.Generator().manual_seed(3)
    shape = [(2, torch.randint(1, 12, (2,), generator=draw).tolist()) for _ in range(24)]
    rows = random_rows(3, shape)
    ranks = [[0, 1] if a >= b else [1, 0] for _, (a, b) in shape]  # the longer one always wins
    model = role(5, scalar=True, dtype=torch.float32)
    other = length_role(model)
    assert set(other.parameters()) == {"scalar.weight"}
    found = []
    fit(
        {"reward": model, "length": other},
        Odin(weight=2.0),
        ranking_source(rows, ranks, per_step=24, seed=0),
        optim=Optim(lr=3e-3),
        run=run_in(tmp_path, steps=40, max_tokens=2000, save_every=1000),
        hooks=[lambda step, metrics: found.append(metrics)],
    )
    assert found[-1]["correlation/length"] > 0.9 and abs(found[-1]["correlation/quality"]) < 0.2
    assert found[-1]["loss/ranking"] < 0.5
    x = torch.nn.functional.normalize(model.scalar.weight, dim=-1)
    assert float(other.scalar(x)[0, 0].detach().abs()) < 1e-6
