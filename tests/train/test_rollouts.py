"""Rollout batches: advantages by hand, abstentions, cut responses, and the order of prompts."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from posttrain.errors import ConfigError, RewardError
from posttrain.rewards.base import Score
from posttrain.train.log import METRICS
from posttrain.train.loop import fit
from posttrain.train.objectives import PolicyGradient
from posttrain.train.optim import Optim

from .tiny import PROMPTS, role, rollouts, run_in, score

POLICY, REFERENCE, VALUE = role(0), role(3, trained=False), role(1, scalar=True)


def source(**changes):
    return rollouts(POLICY, REFERENCE, VALUE, **({"updates": 1} | changes))


def some(completions):
    """Scores that abstain on every third response."""
    return [s if i % 3 else Score(None) for i, s in enumerate(score(completions))]


def by_hand(batch, kept, scores, kl, lam=0.95):
    """Advantages (not whitened) and returns of kept responses, in plain Python."""
    t = {k: v.tolist() for k, v in batch.tokens.items()}
    branch = batch.forest.branch.tolist()
    advantage, returns = [0.0] * len(branch), [0.0] * len(branch)
    for b in kept:
        mine = [m for m, home in enumerate(branch) if home == b]
        after_value = after = 0.0
        for m in reversed(mine):
            reward = -kl * (t["old_logp"][m] - t["ref_logp"][m]) + (scores[b] if m == mine[-1] else 0.0)
            after = reward + after_value - t["old_value"][m] + lam * after
            after_value = t["old_value"][m]
            advantage[m], returns[m] = after, after + t["old_value"][m]
    return advantage, returns


@pytest.mark.parametrize("reward", [score, some])
def test_advantages_by_hand_and_abstentions_leave_no_trace(reward):
    src = source(reward=reward)
    batch = src(0)
    mask, branch = batch.forest.masks["sampled"], batch.forest.branch
    kept = [b for b in range(8) if reward is score or b % 3]
    assert mask.tolist() == [b in kept for b in branch.tolist()]
    assert batch.counts == {"tokens": float(mask.sum()), "branches": float(len(kept))}
    raw, returns = by_hand(batch, kept, batch.branches["reward"].tolist(), 0.1)
    inside = [x for x, on in zip(raw, mask.tolist(), strict=True) if on]
    mean = sum(inside) / len(inside)
    std = math.sqrt(sum((x - mean) ** 2 for x in inside) / len(inside) + 1e-8)
    expected = [(x - mean) / std if on else 0.0 for x, on in zip(raw, mask.tolist(), strict=True)]
    assert batch.tokens["advantage"].tolist() == pytest.approx(expected, abs=1e-9)
    assert batch.tokens["return"].tolist() == pytest.approx(returns, abs=1e-9)
    known = [batch.branches["reward"][b].item() for b in kept]
    measured = src.metrics(0)
    assert measured["abstained/share"] == (0 if reward is score else 3 / 8)
    assert measured["reward/mean"] == pytest.approx(sum(known) / len(known), abs=1e-6)


def test_updates_share_a_rollout_by_whole_prompts():
    whole, cut = source(reward=some), source(reward=some, updates=2)
    all_of, parts = whole(0), [cut(0), cut(1)]
    assert [len(p.forest.trees) for p in parts] == [2, 2]
    assert sum(p.counts["tokens"] for p in parts) == all_of.counts["tokens"]
    joined = torch.cat([p.tokens["advantage"] for p in parts]).sort().values
    assert torch.equal(joined, all_of.tokens["advantage"].sort().values)
    assert not cut.fresh(1) and cut.fresh(2) and cut.metrics(1) == {}


def test_a_cut_response_gets_the_cut_score():
    plain, cut = source()(0), source(cut_score=-10.0)(0)
    truncated = plain.forest.truncated
    assert truncated.any() and not truncated.all()
    assert torch.equal(cut.forest.ids, plain.forest.ids)
    assert (cut.branches["reward"][truncated] == -10).all()
    assert torch.equal(cut.branches["reward"][~truncated], plain.branches["reward"][~truncated])
    _, returns = by_hand(cut, range(8), cut.branches["reward"].tolist(), 0.1)
    assert cut.tokens["return"].tolist() == pytest.approx(returns, abs=1e-9)


def test_without_a_reference_its_kl_is_neither_asked_nor_measured():
    one, two = source(kl=0.0), source(kl=0.0)
    two.reference, two.policy = None, POLICY
    batch, bare = one(0), two(0)
    assert set(batch.tokens) - set(bare.tokens) == {"ref_logp"}
    assert all(torch.equal(batch.tokens[name], x) for name, x in bare.tokens.items())
    asked = {"kl/mean", "kl/stop", "kl/after_stop"}
    assert {k: v for k, v in one.metrics(0).items() if k not in asked and not METRICS[k].wall_clock} == {
        k: v for k, v in two.metrics(0).items() if not METRICS[k].wall_clock
    }
    assert {r["kl"] for r in records_of(two)} == {None}
    two.plan = source().plan
    with pytest.raises(ConfigError, match=r"no reference, kl=0\.1; expected kl=0"):
        two(0)


def test_wrong_rewards_are_refused():
    with pytest.raises(RewardError, match="the reward gave 7 scores for 8 responses; expected one each"):
        source(reward=lambda completions: score(completions)[:-1])(0)
    with pytest.raises(RewardError, match="abstained on every response"):
        source(reward=lambda completions: [Score(None)] * len(completions))(0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_is_no_number_names_the_response(bad):
    def broken(completions):
        return [Score(bad) if i == 5 else s for i, s in enumerate(score(completions))]

    texts = [r["completion"] for r in records_of(source())]
    with pytest.raises(RewardError) as caught:
        source(reward=broken)(0)
    assert f"the reward gave {bad} for {texts[5]!r}; expected a finite number" in str(caught.value)


def records_of(src):
    """What a source writes to ``samples.jsonl`` for its first rollout."""
    kept: list = []
    src.on_samples = lambda step, samples: kept.extend(samples)
    src(0)
    return kept


def test_draws_depend_on_prompt_and_sample_not_on_what_else_is_sampled():
    """The first response of a prompt is the same alone and beside others, with more slots and with more samples."""
    key = lambda r: (r["prompt"], r["completion"])  # noqa: E731
    one = [key(r) for r in records_of(source(samples=1, prompts=6))]
    assert [key(r) for r in records_of(source(samples=3, prompts=6))][::3] == one
    assert [key(r) for r in records_of(source(samples=1, prompts=4))] == one[:4]
    many = source(samples=1, prompts=6)
    many.engine.slots = 1
    assert [key(r) for r in records_of(many)] == one
    assert len({completion for _, completion in one}) == 6


@pytest.mark.parametrize("prompts", [1, 4, 5, 6, 13])
def test_each_epoch_has_every_prompt_once(prompts):
    src, size = source(prompts=prompts), len(PROMPTS)
    order = [i for rollout in range(4 * size) for i in src.prompt_indices(rollout)]
    epochs = [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert any(a != b for a, b in pairwise(epochs))


def test_samples_are_recorded_and_depend_on_the_step_alone():
    seen = []
    src = source(on_samples=lambda step, samples: seen.append((step, samples)), reward=some)
    src(0), src(1), src(0)
    assert [step for step, _ in seen] == [0, 1, 0] and seen[0] == seen[2] and seen[0] != (0, seen[1][1])
    (_, records) = seen[0]
    assert len(records) == 8 and [r["reward"] is None for r in records] == [i % 3 == 0 for i in range(8)]
    assert set(records[0]) == {"prompt", "completion", "reward", "kl", "length", "truncated"}
    first = source(reward=some)(0)
    gap = (first.tokens["old_logp"] - first.tokens["ref_logp"])[first.forest.branch == 1]
    assert records[1]["kl"] == pytest.approx(gap.sum().item(), abs=1e-9)
    assert [r["length"] for r in records] == first.forest.lengths.tolist()


def test_every_metric_of_a_run_is_registered_and_given(tmp_path):
    models = {"policy": role(0), "value": role(1, scalar=True)}
    seen = []
    fit(
        models,
        PolicyGradient(),
        rollouts(models["policy"], role(0, trained=False), models["value"]),
        optim=Optim(lr=0.01),
        run=run_in(tmp_path, steps=2),
        hooks=[lambda step, found: seen.append(set(found))],
    )
    assert seen[1] < seen[0] <= set(METRICS)
    own = {
        "loss/total",
        "loss/policy",
        "loss/value",
        "policy/clipped",
        "kl/update",
        "kl/mean",
        "reward/mean",
        "length/mean",
    }
    assert own <= seen[0] and not {"loss/nll", "loss/ranking", "loss/preference"} & seen[0]
