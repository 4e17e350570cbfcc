"""Every row of the table of algorithms on a policy that is a table of logits: it has the properties it declares, and no other."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from itertools import product

import pytest
import torch

from posttrain.errors import ConfigError
from posttrain.forest import Batch, split, take
from posttrain.losses.advantages import Returns, advantages, returns_to_go, token_reward
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
        tokens["old_value"] = old / 2  # some values, which stay where rewards move
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


def apart(one, two):
    """The largest difference of two gradients, as a share of the second's largest entry."""
    assert two.abs().max() > 1e-2
    return float((one - two).abs().max() / two.abs().max())


def close(one, two, tolerance=1e-10):
    torch.testing.assert_close(one, two, atol=tolerance, rtol=tolerance)


def token_slope(row, theta, batch):
    """The objective's gradient with respect to the log-probability of each token, ``[M]``."""
    logp = logp_of(theta, batch.forest).requires_grad_()
    stats = {"policy": {"logp": logp}, "value": {"value": torch.zeros_like(logp)}}
    total(policy_gradient(row, longest=LONGEST)(stats, batch), batch.counts).backward()
    return logp.grad


# ---------------------------------------------------------------------------- the table


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_row_names_what_there_is(name):
    row = ALGORITHMS[name]
    assert row.advantage in advantages and row.ratio in ratio_levels and row.aggregation in aggregations
    policy_losses.bound(row.loss, row.options)
    check_penalty(row.penalty)
    assert row.summary and row.paper and row.has <= set(PROPERTIES)
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


def shift(row):
    """By how much gradients move when a constant of its own is added to the rewards of each prompt."""
    theta = table(0)
    groups = sampled(row, theta)
    moved = [rescored(g, lambda s, k=k: s + 3.0 * (k + 1)) for k, g in enumerate(groups)]
    return apart(slope(row, theta, batch_of(row, moved))[0], slope(row, theta, batch_of(row, groups))[0])


def scale(row):
    """By how much they move when all rewards are multiplied; the eps beside a deviation moves them by its size."""
    theta = table(1)
    groups = sampled(row, theta)
    moved = [rescored(g, lambda s: 7 * s) for g in groups]
    return apart(slope(row, theta, batch_of(row, moved))[0], slope(row, theta, batch_of(row, groups))[0])


def flat(row):
    """The gradient that responses of equal reward have, beside that of the other prompts."""
    theta = table(2)
    groups = sampled(row, theta)
    groups[1] = replace(rescored(groups[1], lambda s: 0.7), baseline=0.3)
    assert [g.flat for g in groups] == [False, True, False]
    found, _ = slope(row, theta, batch_of(row, groups))
    assert min(found[0].abs().max(), found[2].abs().max()) > 1e-3
    return float(found[1].abs().max() / found.abs().max())


def first(row):
    """By how much the gradient before an update differs from that of ``-sum w A logp``, w the aggregation's weights."""
    theta = table(3)
    batch = batch_of(row, sampled(row, theta))
    found, terms = slope(row, theta, batch)
    leaf = theta.clone().requires_grad_()
    weight = policy_gradient(row, longest=LONGEST).aggregate(batch.forest.masks["sampled"], batch.forest.branch)
    count = batch.counts[aggregations.facts(row.aggregation)["unit"]]
    (-(weight * batch.tokens["advantage"] * logp_of(leaf, batch.forest)).sum() / count).backward()
    assert terms["policy/ratio_error"] == near(0) and terms["kl/update"] == near(0) == terms["policy/clipped"]
    return apart(found, leaf.grad)


PROPERTIES = {"shift": shift, "scale": scale, "flat": flat, "first": first}


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("property_", PROPERTIES)
def test_a_row_has_the_properties_that_it_declares_and_no_other(name, property_):
    departure = PROPERTIES[property_](bare(name))
    if property_ in ALGORITHMS[name].has:
        assert departure < (1e-4 if property_ == "scale" else 1e-9)
    else:
        assert departure > 1e-2


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
def test_permuting_the_responses_of_a_prompt_permutes_their_gradients(name):
    """Before anything is estimated; off policy, with the penalty."""
    row, theta, ref = ALGORITHMS[name], table(4), table(6)
    now, groups = theta + 0.3 * table(5), sampled(row, theta)
    order = list(reversed(range(len(groups[1].rollouts))))
    turned = replace(
        groups[1], **{k: tuple(getattr(groups[1], k)[i] for i in order) for k in ("rollouts", "scores", "steps")}
    )
    one, two = (batch_of(row, given, kl=0.1, ref=ref) for given in (groups, [groups[0], turned, groups[2]]))
    pieces = [token_slope(row, now, b).split(b.forest.lengths.tolist()) for b in (one, two)]
    size = len(order)
    place = [*range(size), *(size + i for i in order), *range(2 * size, 3 * size)]
    close(torch.cat(pieces[1]), torch.cat([pieces[0][i] for i in place]))
    assert max(x.abs().max() for x in pieces[0][size : 2 * size]) > 1e-3


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_width_of_padding_changes_nothing(name):
    """Neither numbers under a false mask, nor a longer response that has no score."""
    row, g = ALGORITHMS[name], torch.Generator().manual_seed(12)
    draw = lambda: torch.randn(4, LONGEST, generator=g, dtype=torch.float64)  # noqa: E731
    mask = torch.arange(LONGEST) < torch.tensor([[3], [1], [4], [2]])
    score, values, steps = draw()[:, 0], draw(), draw()
    reward = token_reward(score, draw(), draw(), mask, kl=0.1)
    more = {"group": torch.tensor([0, 0, 1, 1]), "baseline": score.flip(0), "score": score}
    narrow = Returns(reward=reward, mask=mask, values=values, steps=steps, ends=mask, **more)
    pad = lambda x, fill: torch.nn.functional.pad(x, (0, 3), value=fill)  # noqa: E731
    junk = {k: pad(torch.where(mask, x, 99.0), -99.0) for k, x in (("values", values), ("steps", steps))}
    wide = Returns(reward=pad(reward, 42.0), mask=pad(mask, False), ends=pad(mask, True), **junk, **more)
    found, expected = advantages[row.advantage](wide), advantages[row.advantage](narrow)
    close(found[:, :LONGEST], expected)
    assert not found[:, LONGEST:].any() and not expected[~mask].any() and expected[mask].abs().max() > 1e-2
    groups = [replace(group, rollouts=tuple(cut(r) for r in group.rollouts)) for group in sampled(row, table(4))]
    last = groups[0].rollouts[0].request
    long = Rollout(replace(last, ids=(1,)), (1,) * LONGEST, (-1.0,) * LONGEST, False)
    size = len(groups[0].rollouts)
    dead = replace(groups[0], rollouts=(long,) * size, scores=(None,) * size, steps=({},) * size)
    groups = [
        replace(g, steps=tuple({len(r.ids) - 1: s} for r, s in zip(g.rollouts, g.scores, strict=True))) for g in groups
    ]
    close(
        slope(row, table(5), batch_of(row, [*groups, dead], kl=0.1, ref=table(6)))[0],
        slope(row, table(5), batch_of(row, groups, kl=0.1, ref=table(6)))[0],
    )


def cut(rollout):
    """The first two tokens of a response."""
    return replace(rollout, ids=rollout.ids[:2], logp=rollout.logp[:2])


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
def test_bfloat16_is_near(name):
    """The loss of numbers rounded to bf16 is that of the same numbers in fp32 within a hundredth."""
    row, theta = bare(name), table(8)
    batch = batch_of(row, sampled(row, theta))
    now = logp_of(theta + 0.3 * table(9), batch.forest)
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        given = replace(batch, tokens={k: v.to(dtype) for k, v in batch.tokens.items()})
        stats = {"policy": {"logp": now.to(dtype)}, "value": {"value": torch.zeros_like(now, dtype=dtype)}}
        found = policy_gradient(row, longest=LONGEST)(stats, given)["loss/policy"]
        losses.append(float(found.sum) / batch.counts[found.unit])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2, abs=1e-2) and abs(losses[0]) > 1e-3


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


def test_over_responses_a_penalty_in_the_reward_sees_what_a_token_leads_to_and_one_in_the_loss_does_not():
    """By enumeration of all responses of two tokens, the second's distribution following from the first."""
    g = torch.Generator().manual_seed(13)
    theta = torch.randn(4, 3, generator=g, dtype=torch.float64)  # states: the prompt, and after each first token
    ref = torch.randn(4, 3, generator=g, dtype=torch.float64).log_softmax(-1)
    leaf = theta.clone().requires_grad_()
    logps = leaf.log_softmax(-1)
    ways = torch.tensor(list(product(range(3), repeat=2)))
    state = torch.stack([torch.zeros(9, dtype=torch.long), 1 + ways[:, 0]], 1)
    logp, ref_logp = logps[state, ways], ref[state, ways]
    chance = logp.detach().sum(1).exp()
    gap = logps - ref
    of_state = {"reverse": (logps.exp() * gap).sum(1), "forward": -(ref.exp() * gap).sum(1)}
    visits = torch.cat([torch.ones(1, dtype=torch.float64), theta[0].softmax(-1)])
    slope_of = lambda x: torch.autograd.grad(x, leaf, retain_graph=True)[0]  # noqa: E731
    whole = slope_of(of_state["reverse"][0] + (logps[0].exp() * of_state["reverse"][1:]).sum())
    met = {name: slope_of((visits * x).sum()) for name, x in of_state.items()}
    mask = torch.ones(9, 2, dtype=torch.bool)
    reward = token_reward(torch.zeros(9, dtype=torch.float64), logp.detach(), ref_logp, mask, kl=1.0)
    close(slope_of(-(chance[:, None] * returns_to_go(reward, mask) * logp).sum()), whole)
    close(slope_of(-(chance * reward.sum(1) * logp.sum(1)).sum()), whole)  # the response as one action
    stats = {"logp": logp, "kl_to_other": of_state["reverse"][state]}
    for name, expected in (("loss:k2", "reverse"), ("loss:k3", "forward"), ("loss:full", "reverse")):
        value = penalties[name](stats, {"ref_logp": ref_logp})
        close(slope_of((chance[:, None] * value).sum()), met[expected])
    assert min(apart(met["reverse"], whole), apart(met["forward"], met["reverse"])) > 0.02
