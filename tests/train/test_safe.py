"""A constraint on cost: the multiplier's golden numbers, advantages by hand, and runs that go on with the multiplier they had."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from posttrain.errors import ConfigError
from posttrain.losses.safety import mixed_advantage, next_multiplier
from posttrain.rewards.base import Score
from posttrain.train.journal import Journal
from posttrain.train.loop import fit
from posttrain.train.objectives import ConstrainedPolicyGradient
from posttrain.train.optim import Optim
from posttrain.train.rollouts import RolloutSource
from posttrain.train.safe import ConstrainedRollouts, Constraint

from .test_rollouts import by_hand
from .tiny import role, rollouts, run_in, score


def test_golden_multipliers():
    one = next_multiplier(1.0, 0.5, limit=0.0)
    assert (one, next_multiplier(one, 0.5, limit=0.0)) == pytest.approx((1.0512711, 1.1080077), abs=1e-7)
    assert next_multiplier(2.0, 3.0, limit=4.0) == pytest.approx(1.6374616, abs=1e-7)
    assert next_multiplier(4.9, 9.0, limit=0.0) == 5.0
    mixed = mixed_advantage(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.5]), 3.0)
    assert mixed.tolist() == pytest.approx([-0.125, -0.875])
    assert mixed_advantage(torch.tensor([1.5]), torch.tensor([9.0]), 0.0).tolist() == [1.5]
    with pytest.raises(ConfigError, match="at least 0"):
        mixed_advantage(torch.zeros(1), torch.zeros(1), -1.0)
    with pytest.raises(ConfigError, match="a window of at least 1"):
        Constraint(window=0)


def costly(completions):
    """The tests' scores, with a cost that has nothing to do with them."""
    return [
        replace(s, parts={"cost": (c.ids[0] % 8) / 4 - 0.5})
        for s, c in zip(score(completions), completions, strict=True)
    ]


def constrained(policy, reference, value, cost_value, constraint, reward=costly, **changes):
    plain = rollouts(policy, reference, value, reward=reward, **changes)
    known = {f.name: getattr(plain, f.name) for f in fields(RolloutSource) if not f.name.startswith("_")}
    return ConstrainedRollouts(**known, cost_value=cost_value, constraint=constraint)


POLICY, REFERENCE, VALUE, COST = role(0), role(3, trained=False), role(1, scalar=True), role(2, scalar=True)


def test_advantages_by_hand():
    src = constrained(POLICY, REFERENCE, VALUE, COST, Constraint(limit=0.1, multiplier=2.0), updates=1)
    batch = src(0)
    costs = [(batch.forest.target[batch.forest.branch == b][0].item() % 8) / 4 - 0.5 for b in range(8)]
    multiplier = next_multiplier(2.0, sum(costs) / 8, limit=0.1)
    of_reward = by_hand(batch, range(8), batch.branches["reward"].tolist(), 0.1)
    as_cost = replace(batch, tokens={**batch.tokens, "old_value": batch.tokens["old_cost_value"]})
    of_cost = by_hand(as_cost, range(8), costs, -0.1)
    mixed = [(r - multiplier * c) / (1 + multiplier) for r, c in zip(of_reward[0], of_cost[0], strict=True)]
    assert batch.tokens["advantage"].tolist() == pytest.approx(mixed, abs=1e-9)
    assert batch.tokens["return"].tolist() == pytest.approx(of_reward[1], abs=1e-9)
    assert batch.tokens["cost_return"].tolist() == pytest.approx(of_cost[1], abs=1e-9)
    measured = src.metrics(0)
    assert measured["cost/mean"] == pytest.approx(sum(costs) / 8) == measured["reward/part/cost"]
    assert measured["cost/multiplier"] == pytest.approx(multiplier)
    assert measured["cost/over"] == sum(c > 0.1 for c in costs) / 8


def test_the_whole_weight_of_the_kl_penalty_is_the_multipliers_concern_no_more():
    def zero(completions):
        return [Score(0.0, {"cost": 0.0}) for _ in completions]

    found = []
    for multiplier in (0.5, 4.0):
        value = role(1, scalar=True)
        value.scalar.weight.data.zero_()
        src = constrained(POLICY, REFERENCE, value, value, Constraint(multiplier=multiplier, rate=0.0), zero, updates=1)
        found.append(src(0).tokens["advantage"])
    assert torch.allclose(found[0], found[1], atol=1e-12) and float(found[0].abs().max()) > 0.01


def test_multipliers_follow_the_cost():
    def at(level):
        src = constrained(
            POLICY,
            REFERENCE,
            VALUE,
            COST,
            Constraint(limit=0.0, window=10),
            lambda cs: [Score(0.0, {"cost": level}) for _ in cs],
        )
        out = []
        for step in range(0, 6, 2):
            src(step)
            out.append(src.metrics(step)["cost/multiplier"])
        return out

    high, low = at(1.0), at(-1.0)
    assert 1 < high[0] < high[1] < high[2] and 1 > low[0] > low[1] > low[2] > 0
    still = constrained(POLICY, REFERENCE, VALUE, COST, Constraint(multiplier=0.0), updates=1)
    still(0)
    assert still.metrics(0)["cost/multiplier"] == 0


def test_a_score_without_cost_is_refused():
    src = constrained(POLICY, REFERENCE, VALUE, COST, Constraint(), score)
    with pytest.raises(ConfigError, match="a score and no cost"):
        src(0)


def test_a_run_goes_on_with_its_multiplier(tmp_path):
    def trained(folder, *stops):
        for stop in (*stops, 6):
            roles = {"policy": role(0), "value": role(1, scalar=True), "cost_value": role(2, scalar=True)}
            src = constrained(
                roles["policy"],
                REFERENCE,
                roles["value"],
                roles["cost_value"],
                Constraint(limit=-0.2, window=10),
                journal=Journal(folder / "journal"),
            )
            optim = Optim(lr=1e-2, schedule="constant")
            run = run_in(folder, steps=stop, save_every=1)
            fit(roles, ConstrainedPolicyGradient(), src, optim=optim, run=run)
        return [p.detach().clone() for m in roles.values() for p in m.net.parameters()], src.multiplier(6)

    whole, cut = trained(tmp_path / "a"), trained(tmp_path / "b", 3)
    assert all(torch.equal(a, b) for a, b in zip(whole[0], cut[0], strict=True))
    assert whole[1] == cut[1] and whole[1][0] != 1.0
