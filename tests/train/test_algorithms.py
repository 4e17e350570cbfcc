"""Every row of the table of algorithms on a policy that is a table of logits: what it declares holds, and it learns."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from functools import partial

import pytest
import torch

from posttrain.errors import ConfigError
from posttrain.forest import Batch, split, take
from posttrain.losses.advantages import advantages, token_reward
from posttrain.losses.aggregation import aggregations
from posttrain.losses.penalties import penalties
from posttrain.losses.policy import policy_losses
from posttrain.losses.ratios import ratio_levels
from posttrain.ops.kl import k1
from posttrain.registry import METHODS
from posttrain.rollout.engine import Request, Rollout, Sampling
from posttrain.stages import Reinforce
from posttrain.train.algorithms import ALGORITHMS, PENALTIES, REFUSED, Algorithm, check_penalty, find_algorithm
from posttrain.train.estimates import estimate, group_forest, updates
from posttrain.train.policy_gradient import estimator, policy_gradient
from posttrain.train.rollout_plan import Group, Plan
from posttrain.train.terms import total

VOCABULARY, LONGEST = 5, 4
near = partial(pytest.approx, rel=1e-9, abs=1e-10)


def with_property(name):
    return [algorithm for algorithm, row in ALGORITHMS.items() if name in row.has]


def bare(name) -> Algorithm:
    """A row without its penalty."""
    return replace(ALGORITHMS[name], penalty="none")


def samples_of(row: Algorithm, wanted: int) -> int:
    return 2 if "pairs" in row.needs else wanted


def table(seed, prompts=3):
    """Logits of a policy: ``[prompt, place, token]``."""
    return torch.randn(prompts, LONGEST, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sampled(row, theta, seed=0, samples=4):
    """Responses to every prompt, their scores, those of their steps and of a greedy response; all random."""
    g = torch.Generator().manual_seed(seed + 100)
    logps = theta.detach().log_softmax(-1)
    groups = []
    for prompt in range(len(theta)):
        rollouts, scores, steps = [], [], []
        for sample in range(samples_of(row, samples)):
            length = int(torch.randint(1, LONGEST + 1, (1,), generator=g))
            ids = [int(torch.multinomial(logps[prompt, t].exp(), 1, generator=g)) for t in range(length)]
            logp = tuple(float(logps[prompt, t, i]) for t, i in enumerate(ids))
            rollouts.append(Rollout(Request((prompt + 1,), (prompt, sample)), tuple(ids), logp, True))
            scores.append(float(torch.randn(1, generator=g)))
            steps.append({length - 1: scores[-1]} | ({0: scores[-1] / 2} if length > 1 else {}))
        groups.append(
            Group(index=prompt, rollouts=tuple(rollouts), scores=tuple(scores), baseline=0.3, steps=tuple(steps))
        )
    return groups


def rescored(group, change):
    """A group with all its scores changed, those of its steps and of its greedy response too."""
    return replace(
        group,
        scores=tuple(None if s is None else change(s) for s in group.scores),
        baseline=change(group.baseline),
        steps=tuple({k: change(v) for k, v in found.items()} for found in group.steps),
    )


def batch_of(row, groups, *, kl=0.0, ref=None):
    """The batch of one update on all groups."""
    plan = Plan(
        prompts=len(groups), samples=len(groups[0].rollouts), updates=1, sampling=Sampling(max_new_tokens=LONGEST), kl=kl,
        greedy="greedy" in row.needs, least=2 if row.needs & {"groups", "pairs"} else 1,
    )  # fmt: skip
    forest, live = group_forest(groups, plan)
    old = torch.tensor([x for g in groups for r in g.rollouts for x in r.logp], dtype=torch.float64)
    tokens = {"old_logp": old, "ref_logp": old.clone() if ref is None else logp_of(ref, forest)}
    if "critic" in row.needs:
        tokens["old_value"] = torch.zeros_like(old)
    new, score = estimate(groups, plan, estimator(row, gamma=1.0, lam=0.95), forest, live, tokens, kl)
    return updates(Batch(forest, tokens | new, {"reward": score}, {}), 1)[0]


def logp_of(theta, forest):
    """``[M]`` log-probabilities of a forest's targets."""
    prompt = forest.ids[[tree.prompt[0] for tree in forest.trees]] - 1
    place = torch.cat([torch.arange(n) for n in forest.lengths.tolist()])
    return theta.log_softmax(-1)[prompt[forest.group[forest.branch]], place, forest.target]


def slope(row, theta, batch, parts=None, **numbers):
    """The objective's gradient with respect to the table, over micro-batches if given, and its terms."""
    objective = policy_gradient(row, longest=LONGEST, **numbers)
    theta = theta.detach().clone().requires_grad_()
    terms: dict[str, float] = {}
    for part in parts or [batch]:
        stats = {
            "policy": {"logp": logp_of(theta, part.forest)},
            "value": {"value": torch.zeros(len(part.forest.target))},
        }
        found = objective(stats, part)
        total(found, batch.counts).backward()
        for name, term in found.items():
            terms[name] = terms.get(name, 0.0) + float(term.sum.detach()) / batch.counts[term.unit]
    return theta.grad, terms


def close(one, two, tolerance=1e-10):
    torch.testing.assert_close(one, two, atol=tolerance, rtol=tolerance)


# ---------------------------------------------------------------------------- the table


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_row_names_what_there_is(name):
    row = ALGORITHMS[name]
    assert row.advantage in advantages and row.ratio in ratio_levels and row.aggregation in aggregations
    policy_losses.bound(row.loss, row.options)
    check_penalty(row.penalty)
    assert row.summary and row.paper and row.has <= {"shift", "scale", "flat", "first"}
    asked = set(advantages.facts(row.advantage).get("needs", ())) | set(policy_losses.facts(row.loss).get("needs", ()))
    assert asked <= row.needs and row.needs <= {"critic", "groups", "pairs", "reference", "greedy", "steps"}
    assert row.penalty == "none" or "reference" in row.needs
    assert set(row.numbers) <= {f.name for f in fields(Reinforce)}
    assert bool(row.numbers.get("kl")) == (row.penalty != "none")
    assert METHODS[name](reward="nowhere").stages[name].algorithm == name


def test_methods_have_every_algorithm_and_every_penalty_its_word():
    assert set(ALGORITHMS) <= set(METHODS)
    assert set(PENALTIES) == {"none", "reward:k1", *penalties} and not set(REFUSED) & set(PENALTIES)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"penalty": "loss:k1"}, "the expected gradient of k1 in the loss is zero"),
        ({"penalty": "reward:k3"}, "biased penalty that is no KL"),
        ({"penalty": "reward:k1+loss:k3"}, "it counts twice; choose one place"),
        ({"penalty": "loss:k4"}, "did you mean"),
        ({"algorithm": "dapo", "kl": 0.1, "samples_per_prompt": 4}, "dapo has no KL penalty"),
        ({"algorithm": "grpo"}, "got samples_per_prompt=1, expected at least 2"),
        ({"algorithm": "p3o", "samples_per_prompt": 4}, "got samples_per_prompt=4, expected 2"),
        ({"algorithm": "grpo", "samples_per_prompt": 4, "kl_target": 6.0}, "moves a penalty in the reward"),
        ({"algorithm": "grop"}, "did you mean 'grpo'"),
    ],
)
def test_choices_that_cannot_be_are_refused(changes, said):
    with pytest.raises(ConfigError, match=said.replace("+", r"\+")):
        Reinforce(model="small", reward="nowhere", **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"algorithm": "grpo_process"}, "scores of steps of reasoning"),
        ({"algorithm": "grpo", "gamma": 0.9}, "grpo has no gamma"),
        ({"algorithm": "cispo", "clip": 0.1}, "policy loss 'cispo' has no option 'clip'"),
        ({"algorithm": "grpo", "mismatch": "trunc"}, "unknown mismatch weight 'trunc'"),
    ],
)
def test_choices_that_nothing_reads_are_refused_before_a_run(changes, said):
    with pytest.raises(ConfigError, match=said):
        Reinforce(model="small", reward="nowhere", samples_per_prompt=4, **changes).check()


def test_what_is_no_row_is_refused():
    with pytest.raises(ConfigError, match="unknown algorithm"):
        find_algorithm("posttrain.train.algorithms:PENALTIES")


# ---------------------------------------------------------------------------- what rows declare


@pytest.mark.parametrize("name", with_property("shift"))
def test_a_constant_added_to_the_rewards_of_a_prompt_changes_no_gradient(name):
    row, theta = bare(name), table(0)
    groups = sampled(row, theta)
    moved = [rescored(g, lambda s, k=k: s + 3.0 * (k + 1)) for k, g in enumerate(groups)]
    expected, _ = slope(row, theta, batch_of(row, groups))
    found, _ = slope(row, theta, batch_of(row, moved))
    assert expected.abs().max() > 1e-2
    close(found, expected, 1e-9)


@pytest.mark.parametrize("name", with_property("scale"))
def test_the_scale_of_rewards_changes_no_gradient(name):
    row, theta = bare(name), table(1)
    groups = sampled(row, theta)
    expected, _ = slope(row, theta, batch_of(row, groups))
    found, _ = slope(row, theta, batch_of(row, [rescored(g, lambda s: 7 * s) for g in groups]))
    assert expected.abs().max() > 1e-2
    close(found, expected, 1e-4)  # but for the eps beside the deviation


@pytest.mark.parametrize("name", with_property("flat"))
def test_responses_of_equal_reward_have_no_gradient(name):
    row, theta = bare(name), table(2)
    groups = sampled(row, theta)
    groups[1] = rescored(groups[1], lambda s: 0.7)
    found, _ = slope(row, theta, batch_of(row, groups))
    assert found[1].abs().max() < 1e-12 and min(found[0].abs().max(), found[2].abs().max()) > 1e-3
    assert [g.flat for g in groups] == [False, True, False]


@pytest.mark.parametrize("name", with_property("first"))
def test_before_an_update_the_gradient_is_that_of_the_weighted_score_function(name):
    row, theta = bare(name), table(3)
    batch = batch_of(row, sampled(row, theta))
    found, terms = slope(row, theta, batch)
    leaf = theta.clone().requires_grad_()
    aggregate = policy_gradient(row, longest=LONGEST).aggregate
    weight = aggregate(batch.forest.masks["sampled"], batch.forest.branch)
    count = batch.counts[aggregations.facts(row.aggregation)["unit"]]
    (-(weight * batch.tokens["advantage"] * logp_of(leaf, batch.forest)).sum() / count).backward()
    close(found, leaf.grad)
    assert terms["policy/ratio_error"] == near(0) and terms["kl/update"] == near(0) == terms["policy/clipped"]


# ---------------------------------------------------------------------------- what holds of every row


@pytest.mark.parametrize("name", ALGORITHMS)
def test_order_and_micro_batches_change_no_gradient(name):
    """Off policy, with the penalty: responses of a group in another order, prompts too, cut into small parts."""
    row, theta, ref = ALGORITHMS[name], table(4), table(6)
    batch = batch_of(row, sampled(row, theta), kl=0.1, ref=ref)
    now = theta + 0.3 * table(5)
    expected, terms = slope(row, now, batch)
    samples = samples_of(row, 4)
    turned = take(batch, [(t, list(reversed(range(samples)))) for t in (2, 0, 1)])
    whole = policy_gradient(row, longest=LONGEST).whole_groups
    parts = split(turned, 5, whole)
    found, again = slope(row, now, turned, parts)
    assert len(parts) >= 3 and expected.abs().max() > 1e-3 and again == near(terms)
    close(found, expected)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_better_response_becomes_likelier(name):
    row, theta = bare(name), table(7, prompts=1)
    logps = theta.log_softmax(-1)
    rollouts = [Rollout(Request((1,), (0, k)), (k,), (float(logps[0, 0, k]),), True) for k in (1, 3)]
    group = Group(index=0, rollouts=tuple(rollouts), scores=(1.0, 0.0), baseline=0.5, steps=({0: 1.0}, {0: 0.0}))
    found, _ = slope(row, theta, batch_of(row, [group]))
    step = theta - 1e-3 * found
    gain = (step.log_softmax(-1) - logps)[0, 0]
    assert gain[1] - gain[3] > 1e-6


@pytest.mark.parametrize("name", ALGORITHMS)
def test_single_precision_is_near(name):
    row, theta = bare(name), table(8)
    batch = batch_of(row, sampled(row, theta))
    _, wide = slope(row, theta + 0.1 * table(9), batch)
    small = replace(batch, tokens={k: v.bfloat16() for k, v in batch.tokens.items()})
    _, narrow = slope(row, theta + 0.1 * table(9), small)
    assert narrow["loss/policy"] == pytest.approx(wide["loss/policy"], rel=2e-2, abs=2e-2)


@pytest.mark.parametrize("estimator_", ["loss:k2", "loss:k3", "loss:full", "reward:k1", "k1"])
def test_the_gradient_of_a_penalty_by_enumeration(estimator_):
    """Over five tokens: what each estimator's gradient is in expectation under the policy itself."""
    theta, ref = table(10, 1)[0, 0], table(11, 1)[0, 0].log_softmax(-1)
    leaf = theta.clone().requires_grad_()
    logp = leaf.log_softmax(-1)
    chance = logp.exp().detach()
    reverse = torch.autograd.grad((leaf.softmax(-1) * (leaf.log_softmax(-1) - ref)).sum(), leaf)[0]
    forward = torch.autograd.grad((ref.exp() * (ref - leaf.log_softmax(-1))).sum(), leaf)[0]
    if estimator_ == "reward:k1":
        one, mask = torch.zeros(5, dtype=torch.float64), torch.ones(5, 1, dtype=torch.bool)
        reward = token_reward(one, logp.detach()[:, None], ref[:, None], mask, kl=1.0)[:, 0]
        value = -reward * logp
    elif estimator_ == "k1":
        value = k1(logp, ref)
    else:
        full = (logp.exp() * (logp - ref)).sum().expand(5)
        value = penalties[estimator_]({"logp": logp, "kl_to_other": full}, {"ref_logp": ref})
    found = torch.autograd.grad((chance * value).sum(), leaf)[0]
    expected = {"k1": torch.zeros(5, dtype=torch.float64), "loss:k3": forward}.get(estimator_, reverse)
    close(found, expected, 1e-9)
    assert (reverse - forward).abs().max() > 0.05


# ---------------------------------------------------------------------------- they learn

REWARDS = (0.0, 0.5, 1.0)


def pulled(row, seed, *, steps=40, kl=0.0):
    """The policy over three arms after some updates from a uniform start, 16 pulls each."""
    theta = torch.zeros(1, 1, 3, dtype=torch.float64).requires_grad_()
    ref, optim, g = torch.zeros(1, 1, 3, dtype=torch.float64), None, torch.Generator().manual_seed(seed)
    optim = torch.optim.Adam([theta], lr=0.2)
    objective = policy_gradient(row, longest=1)
    for _ in range(steps):
        chance = theta.detach()[0, 0].softmax(-1)
        arms = torch.multinomial(chance, 16, replacement=True, generator=g).tolist()
        best, size = REWARDS[int(chance.argmax())], 2 if "pairs" in row.needs else 16
        groups = [
            Group(
                index=0,
                rollouts=tuple(Rollout(Request((1,), (k,)), (k,), (math.log(chance[k]),), True) for k in part),
                scores=tuple(REWARDS[k] for k in part),
                baseline=best,
                steps=tuple({0: REWARDS[k]} for k in part),
            )
            for part in (arms[at : at + size] for at in range(0, 16, size))
        ]
        batch = batch_of(row, groups, kl=kl, ref=ref)
        found = objective(
            {"policy": {"logp": logp_of(theta, batch.forest)}, "value": {"value": torch.zeros(16)}}, batch
        )
        optim.zero_grad()
        total(found, batch.counts).backward()
        optim.step()
    return theta.detach()[0, 0].softmax(-1)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_best_of_three_arms(name):
    for seed in range(5):
        assert float(pulled(bare(name), seed) @ torch.tensor(REWARDS).double()) >= 0.95


@pytest.mark.parametrize("name", [n for n, row in ALGORITHMS.items() if row.penalty == "reward:k1"])
def test_with_a_penalty_in_the_reward_the_regularised_optimum(name):
    """``J = E r - beta KL`` has its maximum ``beta log sum ref exp(r / beta)`` at ``ref exp(r / beta)``, up to a factor."""
    beta, reward = 0.3, torch.tensor(REWARDS).double()
    best = beta * float(torch.logsumexp(reward / beta, 0) - math.log(3))
    for seed in range(5):
        chance = pulled(ALGORITHMS[name], seed, kl=beta)
        reached = float(chance @ reward - beta * (chance * (3 * chance).log()).sum())
        assert reached >= 0.95 * best
