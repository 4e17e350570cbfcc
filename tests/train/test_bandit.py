"""Every algorithm on a bandit of four arms, answers of one token: it reaches the best of its own objective.

Where the objective has an optimum in closed form, that is what is asked for; where nothing holds the policy back, the best
arm. "Reaches" = 0.95 of the way from the start, for each of five seeds.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch

from posttrain.forest import Batch, Branch, Row, build_forest
from posttrain.losses.advantages import Returns, gae, token_reward
from posttrain.rewards.builders import build
from posttrain.rewards.selection import best_of_n_kl, expected_best, kept
from posttrain.train.algorithms import ALGORITHMS
from posttrain.train.policy_gradient import estimator, policy_gradient
from posttrain.train.terms import total
from posttrain.types import Example, Message, Response

SEEDS = range(5)
REWARD = torch.tensor([0.0, 0.3, 0.6, 1.0], dtype=torch.float64)
START = torch.tensor([0.4, 0.2, 0.0, -0.5], dtype=torch.float64).log_softmax(-1)  # the best arm is the rarest
PULLS = 64
near = partial(pytest.approx, abs=1e-12)


def deviation(chance):
    return (chance @ REWARD.square() - (chance @ REWARD).square()).sqrt()


def tilted(strength):
    """``ref exp(strength reward)``, normalised: the best of ``strength E r - KL(policy || ref)``."""
    return (START + strength * REWARD).softmax(-1)


def against_forward(strength):
    """``ref / (z - strength reward)``: the best of ``strength E r - KL(ref || policy)``, z its normaliser by bisection."""
    low, high = float((strength * REWARD).max()), float((strength * REWARD).max()) + 1
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if (START.exp() / (middle - strength * REWARD)).sum() > 1 else (low, middle)
    return START.exp() / (high - strength * REWARD)


def settled(best_of, beta):
    """Where rewards are divided by their deviation under the policy itself: the policy that is best at its own deviation."""
    chance = START.exp()
    for _ in range(400):
        chance = best_of(1 / (beta * deviation(chance)))
    torch.testing.assert_close(best_of(1 / (beta * deviation(chance))), chance, atol=1e-9, rtol=0)
    return chance


def reverse(chance):
    return (chance * (chance.log() - START)).sum()


def forward(chance):
    return (START.exp() * (START - chance.log())).sum()


def objective_of(penalty, beta):
    """What a row's gradient climbs, and where that is highest: a function of the policy, and the policy."""
    if penalty == "none":
        return lambda chance: chance @ REWARD, torch.tensor([0.0, 0, 0, 1]).double()
    if penalty == "reward:k1":  # a deviation that divides reward and penalty alike moves nothing
        return lambda chance: chance @ REWARD - beta * reverse(chance), tilted(1 / beta)
    best_of, kl = (against_forward, forward) if penalty == "loss:k3" else (tilted, reverse)
    best = settled(best_of, beta)
    return lambda chance: chance @ REWARD / deviation(best) - beta * kl(chance), best


def learnt(row, seed, *, beta, steps=70, lr=0.15):
    """The policy after ``steps`` updates on ``PULLS`` fresh answers each, through the row's own advantage and objective."""
    size = 2 if "pairs" in row.needs else PULLS // 2
    answers = [Branch([0], {"sampled": [True]}) for _ in range(size)]
    forest = build_forest([Row([0], answers)] * (PULLS // size))
    mask, zero = torch.ones(PULLS, 1, dtype=torch.bool), torch.zeros(PULLS, 1, dtype=torch.float64)
    objective = replace(policy_gradient(row, longest=1), kl=beta)
    advantage, draws = estimator(row), torch.Generator().manual_seed(seed)
    theta, value = START.clone().requires_grad_(), torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optim = torch.optim.Adam([theta, value], lr=lr)
    for step in range(steps):
        optim.param_groups[0]["lr"] = lr * (1 - step / steps)
        now = theta.detach().log_softmax(-1)
        arms = torch.multinomial(now.exp(), PULLS, replacement=True, generator=draws)
        tokens = {"old_logp": now[arms], "ref_logp": START[arms], "old_value": value.detach().expand(PULLS)}
        old, ref, values = (x[:, None] for x in tokens.values())
        given = Returns(
            score=REWARD[arms],
            reward=token_reward(REWARD[arms], old, ref, mask, kl=beta * (row.penalty == "reward:k1")),
            mask=mask,
            group=forest.group,
            values=values if "critic" in row.needs else None,
            baseline=REWARD[now.argmax()].expand(PULLS),
            steps=REWARD[arms][:, None],
            ends=mask,
        )
        tokens |= {"advantage": advantage(given)[:, 0], "return": gae(given.reward, zero, mask)[1][:, 0]}
        batch = Batch(forest, tokens, {}, {"tokens": PULLS, "branches": PULLS})
        stats = {"policy": {"logp": theta.log_softmax(-1)[arms]}, "value": {"value": value.expand(PULLS)}}
        optim.zero_grad()
        total(objective(stats, batch), batch.counts).backward()
        optim.step()
    return theta.detach().softmax(-1)


BETA = {"none": 0.0, "reward:k1": 0.3, "loss:k2": 2.0, "loss:k3": 1.0}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_best_of_its_own_objective(name):
    row = ALGORITHMS[name]
    beta = BETA[row.penalty]
    climbed, best = objective_of(row.penalty, beta)
    start, top = climbed(START.exp()), climbed(best)
    assert top - start > 0.05
    for seed in SEEDS:
        assert climbed(learnt(row, seed, beta=beta)) - start >= 0.95 * (top - start)


def test_apa_ends_at_the_start_tilted_by_the_advantage():
    """``log pi - log start`` is the advantage over the scale, up to a constant."""
    scale = 2.0
    row = replace(ALGORITHMS["apa"], options={"scale": scale})
    best = settled(tilted, scale)
    for seed in SEEDS:
        chance = learnt(row, seed, beta=0.0)
        assert float((chance - best).abs().sum() / 2) < 0.05
        gained, white = chance.log() - START, (REWARD - chance @ REWARD) / deviation(chance)
        slope = torch.cov(torch.stack([gained, white])) / white.var()
        assert float(slope[0, 1]) == pytest.approx(1 / scale, rel=0.15)
        assert float(torch.corrcoef(torch.stack([gained, white]))[0, 1]) > 0.98


# ---------------------------------------------------------------------------- algorithms that select


def best_of(chance, n):
    """The exact distribution of the best of ``n`` samples: ``F(x)^n - F(x-)^n``, F that of one."""
    upto = chance.cumsum(0)
    return upto**n - (upto - chance) ** n


@pytest.mark.parametrize("n", [1, 2, 4])
def test_best_of_n_is_its_exact_expectation(n):
    """By enumeration of all draws, through the function that selects."""
    start, found = START.exp(), torch.zeros(4, dtype=torch.float64)
    for arms in product(range(4), repeat=n):
        (place,) = kept(arms, REWARD[list(arms)].tolist())
        found[arms[place]] += start[list(arms)].prod()
    torch.testing.assert_close(found, best_of(start, n), atol=1e-12, rtol=0)
    assert float(reverse(found)) <= best_of_n_kl(n) + 1e-12 and (n == 1 or reverse(found) > 0.1)
    unbiased = sum(
        float(start[list(arms)].prod()) * expected_best(REWARD[list(arms)].tolist(), n)
        for arms in product(range(4), repeat=n + 1)
    )
    assert unbiased == near(float(found @ REWARD))


def imitated(chance, seed, *, samples, prompts=300, builder="best", **options):
    """The policy likeliest to give what a builder keeps of samples: how often each arm was kept."""
    draws = torch.Generator().manual_seed(seed)
    arms = torch.multinomial(chance, prompts * samples, replacement=True, generator=draws).view(prompts, samples)
    examples = [
        Example(
            prompt=(Message(role="user", content=str(i)),),
            responses=tuple(
                Response(messages=(Message(role="assistant", content=str(a)),), score=float(REWARD[a])) for a in row
            ),
        )
        for i, row in enumerate(arms.tolist())
    ]
    made = build(builder, examples, seed=seed, options=options).examples
    return torch.bincount(torch.tensor([int(e.responses[0].text) for e in made]), minlength=4).double() / len(made)


@pytest.mark.parametrize("seed", SEEDS)
def test_raft_climbs_to_the_best_arm(seed):
    chance, gold = START.exp(), [float(START.exp() @ REWARD)]
    expected = best_of(chance, 4)
    for turn in range(3):
        chance = imitated(chance, 10 * seed + turn, samples=4)
        gold.append(float(chance @ REWARD))
        if turn == 0:
            spread = math.sqrt(float(expected @ REWARD.square() - (expected @ REWARD) ** 2) / 300)
            assert gold[1] == pytest.approx(float(expected @ REWARD), abs=4 * spread)
    assert gold == sorted(gold) and gold[-1] >= 0.95
