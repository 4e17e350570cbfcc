"""GRPO of the library against `examples/grpo_by_hand.py`, step by step on the same responses."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from by_hand_example import Recorded, loaded, packages, rows_of
from posttrain.losses.advantages import advantages
from posttrain.rewards.base import Score
from posttrain.train.algorithms import ALGORITHMS
from posttrain.train.loop import fit
from posttrain.train.optim import Optim
from posttrain.train.policy_gradient import policy_gradient
from train.tiny import network, role, rollouts, run_in

KL, LR, WARMUP, SAMPLES = 0.3, 0.01, 2, 4


@pytest.fixture(scope="module")
def by_hand():
    with loaded("grpo_by_hand") as module:
        yield module


def coarse(completions):
    """Three values, so that some groups have one score."""
    return [Score(float(sum(c.ids) % 3 if c.group else 1)) for c in completions]


def library_run(directory, steps, updates, max_tokens):
    """Train with the library, from elsewhere than the reference; the role, its batches and the lines of metrics.jsonl."""
    policy, reference = role(4), role(5, trained=False)
    numbers = {"samples": SAMPLES, "updates": updates, "kl": 0.0, "least": 2, "max_tokens": max_tokens}
    source = rollouts(policy, reference, None, reward=coarse, **numbers)
    source.advantage = advantages[ALGORITHMS["grpo"].advantage]
    source, objective = Recorded(source), replace(policy_gradient(ALGORITHMS["grpo"], longest=6), kl=KL)
    optim, run = Optim(lr=LR, warmup_steps=WARMUP), run_in(directory, steps=steps, max_tokens=max_tokens)
    fit({"policy": policy}, objective, source, optim=optim, run=run)
    return policy, source.batches, [json.loads(x) for x in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("updates", "rollouts_", "max_tokens"), [(1, 3, 4096), (2, 2, 30)])
def test_losses_advantages_and_norms_equal_those_by_hand(by_hand, tmp_path, updates, rollouts_, max_tokens):
    trained, batches, lines = library_run(tmp_path, updates * rollouts_, updates, max_tokens)
    policy, reference = network(4), network(5)
    optimizer, schedule = by_hand.make_optimizer(policy, lr=LR, warmup=WARMUP)
    near = partial(pytest.approx, abs=1e-9, rel=1e-9)
    flat = 0
    for rollout in range(rollouts_):
        parts = batches[rollout * updates : (rollout + 1) * updates]
        rows = rows_of(by_hand, parts)
        theirs = {key: torch.cat([p.tokens[key] for p in parts]) for key in parts[0].tokens}
        with torch.no_grad():
            rows.old_logp, rows.ref_logp = by_hand.logps(policy, rows), by_hand.logps(reference, rows)
        advantage = by_hand.advantages(rows.score, SAMPLES)
        flat += int((advantage == 0).sum())
        mine = {"old_logp": rows.old_logp, "ref_logp": rows.ref_logp}
        mine["advantage"] = advantage[:, None].expand_as(rows.mask)
        assert mine.keys() == theirs.keys()
        for key, values in mine.items():
            torch.testing.assert_close(
                values[rows.mask], theirs[key], atol=1e-6, rtol=0, msg=partial("{} {}".format, key)
            )
        # The sampler's record is data and kept in fp32: both read it, or Adam would blow its rounding up.
        rows.old_logp = torch.zeros(rows.mask.shape, dtype=torch.float64)
        rows.old_logp[rows.mask] = theirs["old_logp"]
        for u, share in enumerate(rows.shares(updates, advantage)):
            line = lines[rollout * updates + u]
            got = by_hand.update(policy, optimizer, schedule, *share, kl=KL)
            assert got["loss/policy"] == near(line["loss/policy"]) and got["loss/kl"] == near(line["loss/kl"])
            assert got["norm"] == near(line["optim/grad_norm"])
    assert flat >= SAMPLES and lines[-1]["loss/kl"] > 0.05
    theirs = dict(trained.net.named_parameters())
    for name, weight in policy.named_parameters():
        torch.testing.assert_close(weight, theirs[name], atol=1e-6, rtol=0, msg=partial("{} {}".format, name))


def test_the_comparison_reaches_the_clip_and_both_ends_of_responses(tmp_path):
    _, batches, lines = library_run(tmp_path, 6, 2, 4096)
    cut = torch.cat([b.forest.truncated for b in batches])
    assert cut.any() and not cut.all() and max(line["policy/clipped"] for line in lines) > 0.01
    norms = [line["optim/grad_norm"] for line in lines]
    assert max(norms) > 1 and lines[0]["policy/ratio_error"] < 1e-6


def test_advantages_and_losses_by_hand_on_two_groups(by_hand):
    score = torch.tensor([1.0, 0, 0, 1, 0.5, 0.5, 0.5, 0.5], dtype=torch.float64)
    third = 0.8660254 / (1 + 1e-6 / 0.5773503)
    assert by_hand.advantages(score, 4).tolist() == pytest.approx([third, -third, -third, third, 0, 0, 0, 0], abs=1e-7)
    mask = torch.tensor([[True, True], [True, False]])
    zeros = torch.zeros(2, 2, dtype=torch.float64)
    rows = by_hand.Rows(mask.long(), mask, mask.long(), mask, score[:2], old_logp=zeros - 1, ref_logp=zeros - 1.5)
    logp = torch.tensor([[-1.0, -0.5], [-2.0, 7.0]], dtype=torch.float64)
    # ratios 1, 1.65 (clipped at 1.2) | 0.37 (clipped at 0.8, A < 0); d = 0.5, 1 | -0.5
    surrogate, penalty = by_hand.losses(logp, rows, torch.tensor([2.0, -1.0], dtype=torch.float64))
    assert surrogate.item() == pytest.approx((-(2 + 2.4) / 2 + 0.8) / 2)
    assert penalty.item() == pytest.approx(((0.1065307 + 0.3678794) / 2 + 0.1487213) / 2, abs=1e-6)


def test_the_example_runs_without_the_shipped_model(by_hand, tmp_path, capsys):
    history = by_hand.main(steps=3, group_size=4, longest=6, path=tmp_path)
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 4 and out[0].split() == list(history[0])
    assert history[0]["kl/response"] == pytest.approx(0, abs=1e-4) and history[2]["kl/response"] != 0
    assert all(torch.isfinite(torch.tensor(list(line.values()))).all() for line in history)


def test_the_example_imports_torch_and_transformers_only():
    assert packages("grpo_by_hand") == {"torch", "transformers"}
