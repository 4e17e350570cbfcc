"""DPO of the library against `examples/dpo_by_hand.py`, step by step on the same pairs."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest
import torch

from by_hand_example import loaded, packages
from posttrain.forest import Branch, Row
from posttrain.train.loop import fit
from posttrain.train.objectives import Preference
from posttrain.train.optim import Optim
from posttrain.train.reference import row_logp
from posttrain.train.sources import ranking_source, shuffled
from train.tiny import network, role, run_in

PAIRS = [
    ([5, 9, 11], [4, 7, 90], [12, 90]),
    ([7], [8, 8, 8, 91], [6, 13, 40, 41, 90]),
    ([8, 30, 31, 6, 12], [90], [5, 91]),
    ([13, 13], [21, 22, 23, 24, 90], [21, 22, 23, 90]),
    ([21, 4, 9, 10], [3, 90], [4, 90]),
]
BETA, LR, WARMUP, STEPS = 0.3, 0.01, 3, 7


@pytest.fixture(scope="module")
def by_hand():
    with loaded("dpo_by_hand") as module:
        yield module


def row(prompt, chosen, rejected):
    return Row(prompt, [Branch(r, {"loss": [True] * len(r)}) for r in (chosen, rejected)])


@pytest.mark.parametrize("max_tokens", [20, 4096])
def test_losses_margins_and_norms_equal_those_by_hand(by_hand, tmp_path, max_tokens):
    """The policy starts away from the reference, so that every term of the margin counts."""
    rows = [row(*pair) for pair in PAIRS]
    model = role(4)
    ref = row_logp(role(5, trained=False), rows, max_tokens=max_tokens)
    source = ranking_source(rows, [[0, 1]] * len(rows), per_step=2, seed=3, ref_logp=ref)
    objective = Preference("dpo", {"beta": BETA}, tolerance=math.inf)
    optim = Optim(lr=LR, warmup_steps=WARMUP)
    fit({"policy": model}, objective, source, optim=optim, run=run_in(tmp_path, steps=STEPS, max_tokens=max_tokens))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]

    policy, reference = network(4), network(5)
    optimizer, schedule = by_hand.make_optimizer(policy, lr=LR, warmup=WARMUP)
    near = partial(pytest.approx, abs=1e-9, rel=1e-9)
    order = [i for epoch in range(3) for i in shuffled(len(PAIRS), 3, epoch)]
    at = 0
    for line in lines:
        size = 1 if line["step"] % 3 == 2 else 2  # five pairs are steps of 2, 2 and 1
        pairs = [PAIRS[i] for i in order[at : at + size]]
        at += size
        with torch.no_grad():
            before = by_hand.both_logps(reference, pairs)
        got = by_hand.update(policy, optimizer, schedule, pairs, before, BETA)
        assert got["loss"] == near(line["loss/preference"]) == near(line["loss/total"]), line["step"]
        assert got["margin"] == near(line["reward/margin"]) and got["pairs"] == near(line["accuracy/pairs"])
        assert got["norm"] == near(line["optim/grad_norm"])
    assert len(lines) == STEPS and at == 12
    theirs = dict(model.net.named_parameters())
    for name, mine in policy.named_parameters():
        torch.testing.assert_close(mine, theirs[name], atol=1e-7, rtol=0, msg=partial("{} {}".format, name))


def test_the_comparison_starts_away_from_the_reference(by_hand):
    with torch.no_grad():
        policy, reference = (by_hand.both_logps(network(seed), PAIRS) for seed in (4, 5))
    losses, margin = by_hand.dpo_loss(policy, reference, BETA)
    assert margin.abs().min() > 0.1 and margin.min() < 0 < margin.max()
    torch.testing.assert_close(losses, (1 + (-BETA * margin).exp()).log())


def test_the_example_lowers_the_loss_from_log_2(by_hand, tmp_path, capsys):
    table = by_hand.main(steps=8, lr=1e-3, path=tmp_path)  # without the shipped model
    assert table[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert table[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert table[-1]["loss"] < 0.6 and table[-1]["pairs"] == 1
    assert capsys.readouterr().out.splitlines()[0].split() == list(table[0])


def test_the_example_imports_torch_and_transformers_only():
    assert packages("dpo_by_hand") == {"torch", "transformers"}
