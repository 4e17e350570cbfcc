"""Micro-batches change neither loss nor gradient, and both are those of plain rows through transformers."""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn.functional import logsigmoid

from posttrain import train
from posttrain.forest import Batch, build_forest, take
from posttrain.losses.policy import ppo_clip
from posttrain.models.policy import forward_stats
from posttrain.rollout.engine import Request, Sampling
from posttrain.rollout.local import LocalEngine
from posttrain.train.log import METRICS
from posttrain.train.objectives import PolicyGradient, RewardModel, Supervised, objectives
from posttrain.train.sources import demonstration_source, ranking_source
from posttrain.train.terms import Objective

from .cases import close, every, gradients, make, names
from .tiny import PROMPTS, STOPS, network, random_rows, role

SHAPE = [(5, [4, 7, 3]), (9, [6]), (2, [8, 8]), (12, [5, 1, 9, 2]), (1, [3])]
near = partial(pytest.approx, rel=1e-9, abs=1e-9)


def supervised():
    source = demonstration_source(random_rows(1, SHAPE), per_step=5, seed=0)
    return {"policy": role(0)}, Supervised(), source(0)


def ranking():
    shape = [(5, [4, 7, 3]), (9, [6, 5]), (2, [8, 8]), (12, [5, 1, 9, 2])]
    source = ranking_source(random_rows(2, shape, None), [[0, 1, 2], [1, 0], [0, 1], [0, 2, 1, 1]], per_step=4, seed=0)
    return {"reward": role(0, scalar=True)}, RewardModel(), source(0)


def policy_gradient():
    models = {"policy": role(0), "value": role(1, scalar=True)}
    forest = build_forest(random_rows(3, SHAPE, "sampled"))
    g = torch.Generator().manual_seed(9)
    noise = lambda: torch.randn(len(forest.target), generator=g, dtype=torch.float64)  # noqa: E731
    with torch.no_grad():
        now = forward_stats(models["policy"], forest, frozenset({"logp"}))["logp"]
        value = forward_stats(models["value"], forest, frozenset({"value"}))["value"]
    tokens = {
        "old_logp": now + 0.3 * noise(),
        "advantage": noise(),
        "old_value": value + 0.3 * noise(),
        "return": noise(),
    }
    counts = {"tokens": float(forest.masks["sampled"].sum())}
    return models, PolicyGradient(), Batch(forest, tokens, {}, counts)


@pytest.fixture(scope="module", params=names())
def case(request):
    """A case with its metrics and gradients from one micro-batch, by shared prompts."""
    models, objective, batch = make(request.param)
    whole, expected, parts = gradients(models, objective, batch, 10_000)
    assert parts == 1 and max(float(g.abs().max()) for g in expected.values()) > 1e-4
    return models, objective, batch, whole, expected


def test_every_objective_is_registered():
    """Anything in the package that looks like one, so that none is left out below."""
    found = {
        kind
        for path in Path(train.__file__).parent.glob("*.py")
        for kind in vars(importlib.import_module(f"posttrain.train.{path.stem}")).values()
        if isinstance(kind, type)
        and kind is not Objective
        and {"reads", "mask", "whole_groups", "check"} <= set(dir(kind))
    }
    assert found == {objectives[name] for name in objectives} and len(found) >= 4


def test_metrics_of_objectives_are_registered(case):
    assert case[3].keys() <= METRICS.keys()


def test_the_cases_have_every_objective():
    assert {name.partition(":")[0] for name in names()} == {"coupled", *objectives}


@pytest.mark.parametrize("name", sorted(set(every()) - set(names())))
def test_neither_micro_batches_nor_row_order_change_other_losses(name):
    models, objective, batch = make(name)
    whole, expected, _ = gradients(models, objective, batch, 10_000)
    turned = take(batch, [(t, range(len(batch.forest.trees[t].branches))) for t in (2, 3, 0, 1)])
    found, grads, parts = gradients(models, objective, turned, 30)
    assert parts > 1 and found == near(whole) and max(float(g.abs().max()) for g in grads.values()) > 1e-4
    close(grads, expected)


@pytest.mark.parametrize("max_tokens", [30, 60])
def test_max_tokens_changes_nothing(case, max_tokens):
    models, objective, batch, whole, expected = case
    found, grads, parts = gradients(models, objective, batch, max_tokens)
    assert parts > 1 and found == near(whole)
    close(grads, expected)


@pytest.mark.parametrize("max_tokens", [10_000, 30])
@pytest.mark.parametrize("order", [(3, 2, 1, 0), (2, 3, 0, 1)])
def test_row_order_changes_nothing(case, order, max_tokens):
    models, objective, batch, whole, expected = case
    turned = take(batch, [(t, range(len(batch.forest.trees[t].branches))) for t in order])
    found, grads, _ = gradients(models, objective, turned, max_tokens)
    assert found == near(whole)
    close(grads, expected)


def test_packing_changes_nothing(case, monkeypatch):
    """Every row by itself, by transformers' own attention; not the eager one, whose softmax is in fp32."""
    models, objective, batch, whole, expected = case
    for model in models.values():
        ours = model.net.set_attn_implementation
        own = lambda name, ours=ours: ours("sdpa" if name == "eager" else name)  # noqa: E731
        monkeypatch.setattr(model.net, "set_attn_implementation", own)
    found, grads, _ = gradients({r: replace(m, plain=True) for r, m in models.items()}, objective, batch, 60)
    assert found == near(whole)
    close(grads, expected)


def test_evaluation_changes_nothing(case):
    """Scoring and sampling between steps leave gradients as they are, to the bit."""
    models, objective, batch, _, expected = case
    with torch.no_grad():
        for name, wanted in objective.reads.items():
            forward_stats(models[name], batch.forest, wanted, other=models.get("reference"))
    if "policy" in models:
        engine = LocalEngine(models["policy"], STOPS, slots=3)
        asked = [Request(tuple(p), (0, k)) for k, p in enumerate(PROMPTS)]
        assert len(engine.generate(asked, Sampling(max_new_tokens=4))) == len(PROMPTS)
    _, grads, _ = gradients(models, objective, batch, 10_000)
    assert all(torch.equal(grads[name], expected[name]) for name in expected)


def rows_of(forest):
    """``(prompt ids, response ids, mask or None)`` of every branch."""
    ids, at = forest.ids, 0
    for tree in forest.trees:
        for begin, end in tree.branches:
            marks = {k: v[at : at + end - begin] for k, v in forest.masks.items()}
            at += end - begin
            yield ids[slice(*tree.prompt)], ids[begin:end], marks


def compare(net, loss, found, expected, role_name):
    assert found["loss/total"] == near(loss.item())
    loss.backward()
    for key, parameter in net.named_parameters():
        torch.testing.assert_close(expected[f"{role_name}/{key}"], parameter.grad, atol=1e-9, rtol=0)


def test_supervised_is_the_mean_over_tokens_of_plain_rows():
    models, objective, batch = supervised()
    found, grads, _ = gradients(models, objective, batch, 30)
    net, total, count = network(0), 0.0, 0
    for prompt, response, marks in rows_of(batch.forest):
        logits = net(torch.cat([prompt, response])[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        logp = logits.log_softmax(1)[torch.arange(len(response)), response]
        total, count = total - logp[marks["loss"]].sum(), count + int(marks["loss"].sum())
    assert count == batch.counts["tokens"] and found["loss/nll"] == found["loss/total"]
    compare(net, total / count, found, grads, "policy")


def test_ranking_is_the_mean_over_prompts_of_the_mean_over_pairs_of_plain_rows():
    models, objective, batch = ranking()
    found, grads, _ = gradients(models, objective, batch, 30)
    net, losses, right = network(0, scalar=True), [], []
    scores = [
        net.score(net.model(torch.cat([p, r])[None], use_cache=False).last_hidden_state[0, -1])[0]
        for p, r, _ in rows_of(batch.forest)
    ]
    rank, group = batch.branches["rank"].tolist(), batch.forest.group.tolist()
    for tree in range(len(batch.forest.trees)):
        members = [i for i, g in enumerate(group) if g == tree]
        gaps = [scores[i] - scores[j] for i in members for j in members if rank[i] < rank[j]]
        losses.append(-torch.stack([logsigmoid(gap) for gap in gaps]).mean())
        right.append(sum(float(gap > 0) for gap in gaps) / len(gaps))
    assert found["accuracy/pairs"] == near(sum(right) / len(right))
    assert found["score/mean"] == near(torch.stack(scores).mean().item())
    weight = models["reward"].net.score.weight  # of the role, under its own name
    compare_names = {k.replace("reward/scalar.weight", "reward/score.weight"): g for k, g in grads.items()}
    assert weight.grad is None
    compare(net, torch.stack(losses).mean(), found, compare_names, "reward")


def test_policy_and_value_terms_by_hand():
    models, objective, batch = policy_gradient()
    found, _, _ = gradients(models, objective, batch, 10_000)
    mask, t = batch.forest.masks["sampled"], batch.tokens
    with torch.no_grad():
        now = forward_stats(models["policy"], batch.forest, frozenset({"logp"}))["logp"]
        value = forward_stats(models["value"], batch.forest, frozenset({"value"}))["value"]
    rho, a = (now - t["old_logp"]).exp(), t["advantage"]
    surrogate = torch.stack([a * rho, a * rho.clamp(0.8, 1.2)])
    near_value = t["old_value"] + (value - t["old_value"]).clamp(-0.2, 0.2)
    errors = torch.stack([value, near_value]) - t["return"]
    d = (t["old_logp"] - now)[mask]
    expected = {
        "loss/policy": float(-surrogate.min(0).values[mask].mean()),
        "loss/value": float(0.5 * errors.square().max(0).values[mask].mean()),
        "policy/clipped": float((surrogate[1] < surrogate[0])[mask].double().mean()),
        "policy/ratio_error": float((rho - 1).abs()[mask].mean()),
        "kl/update": float(((-d).exp() - 1 + d).mean()),
    }
    assert 0.1 < expected["policy/clipped"] < 0.6
    assert found == near(expected | {"loss/total": expected["loss/policy"] + expected["loss/value"]})


def test_without_a_critic_the_value_is_neither_read_nor_trained():
    models, _, batch = policy_gradient()
    objective = PolicyGradient(loss=partial(ppo_clip, clip=0.1), critic=False)
    assert set(objective.reads) == {"policy"}
    found, grads, _ = gradients(models, objective, batch, 30)
    assert "loss/value" not in found and not any(key.startswith("value/") for key in grads)
