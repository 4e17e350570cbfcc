"""Objectives of pairs, labels, lists and rewards: by plain rows, at the reference, and through the loop."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from posttrain.errors import CheckError, ConfigError
from posttrain.forest import Branch, Row
from posttrain.losses import preference
from posttrain.losses.games import win_rates
from posttrain.losses.tokenwise import WeightedByPolicy
from posttrain.models.policy import forward_stats
from posttrain.train.loop import fit
from posttrain.train.objectives import (
    BetaDPO,
    Listwise,
    Preference,
    ScoredPreference,
    TokenPreference,
    Unpaired,
    Valued,
    objective_of,
    objectives,
)
from posttrain.train.optim import Optim
from posttrain.train.reference import row_logp
from posttrain.train.sources import ranking_source, response_source, with_mismatched
from posttrain.train.terms import unmoved

from .cases import every, gradients, make
from .test_invariance import rows_of
from .tiny import metrics, network, random_rows, role, run_in

SHAPE = [(5, [4, 7, 3]), (9, [6, 5]), (2, [8, 8]), (12, [5, 1, 9, 2])]
RANKS = [[0, 1, 2], [1, 0], [0, 1], [0, 2, 1, 1]]
SCORES = [[0.5, -0.25, -1.5], [0.0, 1.0], [2.0, 1.5], [0.5, 0.25, 0.125, 0.75]]
near = partial(pytest.approx, rel=1e-9, abs=1e-9)


def by_rows(batch, seed, scalar=False):
    """A network, and of each response its logits, labels and mask; computed row by row."""
    net, out = network(seed, scalar=scalar), []
    for prompt, response, marks in rows_of(batch.forest):
        ids = torch.cat([prompt, response])[None]
        if scalar:
            out.append(net.score(net.model(ids, use_cache=False).last_hidden_state[0, len(prompt) - 1])[0])
            continue
        logp = net(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(1)
        out.append((logp, response, marks["loss"]))
    return net, out


def logps(found):
    """Summed log-probabilities of responses."""
    return [logp[torch.arange(len(ids)), ids][mask].sum() for logp, ids, mask in found]


def same(net, loss, metrics, grads, prefix="policy"):
    assert metrics["loss/total"] == near(loss.item())
    loss.backward()
    for key, parameter in net.named_parameters():
        if f"{prefix}/{key}" in grads:
            torch.testing.assert_close(grads[f"{prefix}/{key}"], parameter.grad, atol=1e-9, rtol=0)


def reference(rows):
    return row_logp(role(7, trained=False), rows, max_tokens=10_000)


# ---------------------------------------------------------------------------- by plain rows


def test_without_a_reference_nothing_of_one_is_wanted():
    rows = random_rows(2, SHAPE)
    batch = ranking_source(rows, RANKS, per_step=4, seed=0)(0)
    assert set(batch.tokens) == set() and "tokens" not in batch.counts
    objective = Preference("simpo", {"beta": 2.5, "gamma": 0.5})
    found, grads, _ = gradients({"policy": role(0)}, objective, batch, 30)
    net, out = by_rows(batch, 0)
    rank, group = batch.branches["rank"].tolist(), batch.forest.group.tolist()
    means = [s / int(mask.sum()) for s, (_, _, mask) in zip(logps(out), out, strict=True)]
    losses, margins = [], []
    for tree in range(4):
        members = [i for i, g in enumerate(group) if g == tree]
        gaps = [2.5 * (means[i] - means[j]) for i in members for j in members if rank[i] < rank[j]]
        losses.append(torch.stack([(1 + (0.5 - gap).exp()).log() for gap in gaps]).mean())
        margins.append(torch.stack(gaps).mean().item())
    assert found["reward/margin"] == near(sum(margins) / 4) and "kl/data" not in found
    same(net, torch.stack(losses).mean(), found, grads)
    names = [c.name for c in objective.check({"policy": {"logp": torch.zeros(len(batch.forest.target))}}, batch, 0)]
    assert names == ["pairs", "stop token trained", "start loss"]


def test_a_loss_that_read_a_reference_that_is_not_there_would_show():
    def silent(pairs, *, beta: float = 1.0):
        return beta * (pairs.ref_chosen - pairs.chosen)

    rows = random_rows(2, SHAPE)
    batch = ranking_source(rows, RANKS, per_step=4, seed=0)(0)
    with pytest.raises(KeyError, match="ref_logp"):  # one that says nothing reads it
        gradients({"policy": role(0)}, Preference(silent), batch, 30)
    pairs, _ = Preference("orpo").pairs({"policy": {"logp": torch.zeros(len(batch.forest.target))}}, batch)
    assert pairs.ref_chosen.isnan().all() and preference["orpo"](pairs).isfinite().all()


def test_divergences_and_squares_are_of_the_whole_vocabulary():
    rows = random_rows(2, SHAPE)
    batch = ranking_source(rows, RANKS, per_step=4, seed=0, ref_logp=reference(rows))(0)
    models = {"policy": role(0), "reference": role(7, trained=False)}
    found, grads, _ = gradients(models, TokenPreference("tdpo1", {"beta": 0.5}), batch, 30)
    net, out = by_rows(batch, 0)
    with torch.no_grad():
        _, frozen = by_rows(batch, 7)
    ratios = [a - b for a, b in zip(logps(out), logps(frozen), strict=True)]
    kls = [(q.exp() * (q - p)).sum(1)[mask].sum() for (p, _, mask), (q, _, _) in zip(out, frozen, strict=True)]
    rank, group = batch.branches["rank"].tolist(), batch.forest.group.tolist()
    losses = []
    for tree in range(4):
        members = [i for i, g in enumerate(group) if g == tree]
        pairs = [(i, j) for i in members for j in members if rank[i] < rank[j]]
        each = [(ratios[i] + kls[i]) - (ratios[j] + kls[j]) for i, j in pairs]
        losses.append(torch.stack([(1 + (-0.5 * x).exp()).log() for x in each]).mean())
    same(net, torch.stack(losses).mean(), found, grads)
    wpo, _, _ = gradients({"policy": role(0)}, TokenPreference("wpo", {"beta": 0.5}), batch, 30)
    any_loss = TokenPreference(WeightedByPolicy(preference.bound("dpo", {"beta": 0.5})))
    assert gradients({"policy": role(0)}, any_loss, batch, 30)[0]["loss/total"] == near(wpo["loss/total"])
    weight = [
        (p[torch.arange(len(ids)), ids] - p.exp().square().sum(1).log())[mask].mean().item() for p, ids, mask in out
    ]
    expected = []
    for tree in range(4):
        members = [i for i, g in enumerate(group) if g == tree]
        pairs = [(i, j) for i in members for j in members if rank[i] < rank[j]]
        each = [
            min(1.0, math.exp(weight[i] + weight[j])) * math.log(1 + math.exp(-0.5 * float(ratios[i] - ratios[j])))
            for i, j in pairs
        ]
        expected.append(sum(each) / len(each))
    assert wpo["loss/total"] == near(sum(expected) / 4) and min(weight) < 0


def labelled(seed=2, weights=None):
    """Four rows of a good or bad response, each but one with a response to another prompt."""
    rows = random_rows(seed, [(5, [4, 7]), (9, [6, 5]), (2, [8]), (12, [5, 9])])
    columns = {"label": [[1, 0], [0, 0], [1], [0, 0]], "matched": [[1, 0], [1, 0], [1], [1, 0]]}
    tokens = {"ref_logp": reference(rows)}
    return response_source(rows, columns, tokens, per_step=4, seed=0, weights=weights)


def test_labels_by_plain_rows():
    batch = labelled(weights=[1.0, 0.5, 2.0, 1.0])(0)
    assert batch.counts == {
        "prompts": 4.5, "branches": 7.0, "tokens": batch.counts["tokens"], "good": 3.0, "bad": 1.5, "mismatched": 2.5,
    }  # fmt: skip
    objective = Unpaired("kto", {"beta": 0.5, "desirable": 1.25})
    assert objective.coupled and not Unpaired("npo").coupled
    found, grads, parts = gradients({"policy": role(0)}, objective, batch, 30)
    assert parts > 1
    net, out = by_rows(batch, 0)
    with torch.no_grad():
        _, frozen = by_rows(batch, 7)
    h = [a - b for a, b in zip(logps(out), logps(frozen), strict=True)]
    label, matched, weight = (batch.branches[k].tolist() for k in ("label", "matched", "weight"))
    other = [x.item() for x, m in zip(h, matched, strict=True) if not m]
    zero = max(0.0, sum(other) / 3)
    losses = [
        w * (1.25 * torch.sigmoid(0.5 * (zero - x)) if good else torch.sigmoid(0.5 * (x - zero)))
        for x, good, m, w in zip(h, label, matched, weight, strict=True)
        if m
    ]
    good = [(x.item(), w) for x, g, m, w in zip(h, label, matched, weight, strict=True) if m and g]
    assert found["logratio/good"] == near(sum(x * w for x, w in good) / 3.0)
    same(net, torch.stack(losses).sum() / 4.5, found, grads)


def test_a_step_of_one_kind_of_label_logs_that_one():
    batch = labelled()(0)
    batch = replace(
        batch,
        branches=batch.branches | {"label": torch.zeros(7), "matched": torch.ones(7)},
        counts=batch.counts | {"good": 0.0, "bad": 7.0, "mismatched": 0.0},
    )
    found, _, _ = gradients({"policy": role(0)}, Unpaired("npo"), batch, 30)
    assert "logratio/bad" in found and not {"logratio/good", "logratio/mismatched"} & found.keys()


def test_lists_by_plain_rows():
    rows = random_rows(2, SHAPE)
    tokens = {"ref_logp": reference(rows)}
    batch = response_source(rows, {"score": SCORES}, tokens, per_step=4, seed=0, weights=[1.0, 3.0, 1.0, 0.5])(0)
    found, grads, _ = gradients({"policy": role(0)}, Listwise("info_nca", {"beta": 0.5}), batch, 30)
    net, out = by_rows(batch, 0)
    with torch.no_grad():
        _, frozen = by_rows(batch, 7)
    h = torch.stack([0.5 * (a - b) for a, b in zip(logps(out), logps(frozen), strict=True)])
    score, group, weight = batch.branches["score"], batch.forest.group, batch.branches["weight"]
    loss = torch.zeros((), dtype=torch.float64)
    for tree in range(4):
        on = group == tree
        loss = loss - weight[on][0] * (score[on].softmax(0) * h[on].log_softmax(0)).sum() / 5.5
    same(net, loss, found, grads)
    rated = win_rates(score, group)
    assert rated[group == 0].sum().item() == near((group == 0).sum().item() / 2)


def test_a_value_is_read_where_the_prompt_ends():
    rows = random_rows(2, [(5, [4]), (9, [6]), (2, [8]), (12, [5])])
    columns = {"reward": [[0.5], [-1.0], [0.25], [1.5]]}
    batch = response_source(rows, columns, {"ref_logp": reference(rows)}, per_step=4, seed=0)(0)
    models = {"policy": role(0), "value": role(1, scalar=True)}
    found, grads, _ = gradients(models, Valued("dro_v", {"tau": 0.5}), batch, 30)
    net, out = by_rows(batch, 0)
    with torch.no_grad():
        _, frozen = by_rows(batch, 7)
    critic, values = by_rows(batch, 1, scalar=True)
    h, reward = torch.stack(logps(out)) - torch.stack(logps(frozen)), batch.branches["reward"]
    value = torch.stack(values)
    loss = 0.5 * (reward - value - 0.5 * h).square()
    assert found["loss/valued"] == near(loss.mean().item())
    assert found["value/error"] == near((reward - value).square().mean().item())
    rescaled = (0.5 * (reward - value.detach() - 0.5 * h).square() / 0.5).mean()
    rescaled.backward()
    (0.5 * (reward - value - 0.5 * h.detach()).square()).mean().backward()
    for prefix, network_ in (("policy", net), ("value", critic)):
        for key, parameter in network_.named_parameters():
            name = f"{prefix}/{key}".replace("score.weight", "scalar.weight")
            if parameter.grad is not None:
                torch.testing.assert_close(grads[name], parameter.grad, atol=1e-9, rtol=0)


# ---------------------------------------------------------------------------- the beta that follows margins


def beta_batch(seed=2):
    rows = random_rows(seed, SHAPE)
    return ranking_source(rows, RANKS, per_step=4, seed=0, ref_logp=reference(rows))(0)


def gaps_of(batch):
    with torch.no_grad():
        stats = {"policy": forward_stats(role(0), batch.forest, frozenset({"logp"}), mask=batch.forest.masks["loss"])}
    pairs, share = Preference().pairs(stats, batch)
    return (pairs.chosen - pairs.ref_chosen) - (pairs.rejected - pairs.ref_rejected), share


def test_running_mean_and_beta_by_hand():
    batch = beta_batch()
    gaps, share = gaps_of(batch)
    objective = BetaDPO(options={"beta": 0.2, "alpha": 0.05}, keep=1.0)
    mean = 0.0
    for _ in range(3):
        with torch.no_grad():
            stats = {"policy": forward_stats(role(0), batch.forest, frozenset({"logp"}))}
            found = objective(stats, batch)["loss/preference"].sum.item()
        mean = 0.9 * mean + 0.1 * gaps.mean().item()
        beta = max(1e-3, 0.2 * (1 + 0.05 * (gaps.mean().item() - mean)))
        assert found == near((share * (1 + (-beta * gaps).exp()).log()).sum().item())
    assert objective.state()["mean"] == near(mean) and objective.state()["steps"] == 3
    other = BetaDPO()
    other.load_state(objective.state())
    assert other.state() == objective.state() and BetaDPO().state()["steps"] == 0


def test_without_alpha_or_filter_it_is_dpo():
    batch = beta_batch()
    found = gradients({"policy": role(0)}, BetaDPO(options={"beta": 0.7, "alpha": 0.0}, keep=1.0), batch, 30)
    expected = gradients({"policy": role(0)}, Preference("dpo", {"beta": 0.7}), batch, 30)
    assert found[0] == near(expected[0])
    for name, grad in found[1].items():
        torch.testing.assert_close(grad, expected[1][name], atol=1e-10, rtol=1e-10)


def test_unusual_pairs_are_left_out_more_often():
    batch = beta_batch()
    gaps, share = gaps_of(batch)
    objective, kept = BetaDPO(keep=0.5), torch.zeros(len(gaps))
    pairs, _ = Preference().pairs({"policy": {"logp": batch.tokens["ref_logp"]}}, batch)
    pairs = replace(pairs, chosen=pairs.chosen + gaps)
    for _ in range(400):
        loss = objective.losses({}, batch, pairs)
        kept += loss > 0
        assert int((loss > 0).sum()) == len(gaps) // 2
        weights = (loss > 0) * share / share[loss > 0].sum() * share.sum()
        assert weights.sum().item() == near(share.sum().item())
    usual = (gaps - objective.seen["mean"]).abs().argsort()
    assert kept[usual[: len(gaps) // 2]].sum() > 1.3 * kept[usual[len(gaps) // 2 :]].sum()
    again, twice = BetaDPO(keep=0.5), BetaDPO(keep=0.5)
    assert torch.equal(again.losses({}, batch, pairs), twice.losses({}, batch, pairs))


# ---------------------------------------------------------------------------- the first step, and a run


def learns_from_a_reference(kind):
    columns = objectives.facts(kind)["columns"]
    return "ref_logp" in columns and "advantage" not in columns


@pytest.mark.parametrize(
    "name",
    [n for n in every() if (kind := n.partition(":")[0]) in objectives and learns_from_a_reference(kind)],
)
def test_a_policy_that_is_its_reference_passes_the_checks_and_another_does_not(name):
    models, objective, batch = make(name)
    stats = {}
    with torch.no_grad():
        for r, wanted in objective.reads.items():
            stats[r] = forward_stats(models[r], batch.forest, wanted, other=replace(models["policy"], trained=False))
    same = replace(batch, tokens=batch.tokens | {"ref_logp": stats["policy"]["logp"]})
    last = batch.forest.lengths.cumsum(0) - 1
    same.forest.masks["loss"][last] = True
    with unmoved(objective):
        found = {c.name: c for c in objective.check(stats, same, 0)}
        assert not [c for c in found.values() if c.ok is False]
        needs = objectives.facts(name.partition(":")[0])
        if getattr(objective, "against_reference", True):
            apart = [c.name for c in objective.check(stats, replace(same, tokens=batch.tokens), 0) if c.ok is False]
            assert any("to the reference" in name for name in apart)
            later = objective.check(stats, replace(same, tokens=batch.tokens), 3)
            assert not [c for c in later if c.ok is False]
        assert "columns" in needs


def pair_data(rows, **more):
    return ranking_source(rows, RANKS, per_step=2, seed=0, ref_logp=reference(rows), **more)


def entropies(rows):
    return [x / math.log(97) for x in row_logp(role(7, trained=False), rows, max_tokens=10_000, stat="entropy")]


RUNS = {
    "simpo": lambda rows: (Preference("simpo"), ranking_source(rows, RANKS, per_step=2, seed=0)),
    "beta_dpo": lambda rows: (BetaDPO(), pair_data(rows)),
    "reward_aware_po": lambda rows: (
        ScoredPreference(options={"eta": 3.0}),
        pair_data(rows, columns={"score": SCORES}),
    ),
    "tdpo2": lambda rows: (TokenPreference("tdpo2"), pair_data(rows)),
    "mallows": lambda rows: (TokenPreference("mallows"), pair_data(rows, tokens={"ref_entropy": entropies(rows)})),
    "nca_k": lambda rows: (
        Listwise("nca_k", {"beta": 0.1, "temperature": 0.1}),
        response_source(rows, {"score": SCORES}, {"ref_logp": reference(rows)}, per_step=2, seed=0),
    ),
    "kto": lambda rows: (Unpaired("kto"), labelled()),
}


@pytest.mark.parametrize("name", RUNS)
def test_each_kind_trains_through_the_loop_and_goes_on(name, tmp_path):
    rows = random_rows(2, SHAPE)

    def go(directory, steps):
        objective, source = RUNS[name](rows)
        models = {"policy": role(7)} | ({"reference": role(7, trained=False)} if name == "tdpo2" else {})
        run = run_in(directory, steps=steps, save_every=2)
        fit(models, objective, source, optim=Optim(lr=0.02, schedule="constant"), run=run)
        return run.console.file.getvalue()

    printed = go(tmp_path / "whole", 8)
    assert "FAILED" not in printed and ("at the reference" in printed) == (name != "simpo")
    lines = metrics(tmp_path / "whole")
    key = next(k for k in lines[0] if k.startswith("loss/") and k != "loss/total")
    assert sum(x[key] for x in lines[-2:]) < sum(x[key] for x in lines[:2])
    go(tmp_path / "cut", 4)
    go(tmp_path / "cut", 8)
    assert metrics(tmp_path / "cut") == lines


def test_a_reference_of_other_weights_is_refused(tmp_path):
    rows = random_rows(2, SHAPE)
    with pytest.raises(CheckError, match=r"log-ratio to the reference: got at most .* nats, expected 0 within 0\.001"):
        fit({"policy": role(0)}, Unpaired("bco"), labelled(), optim=Optim(lr=0.01), run=run_in(tmp_path))
    models = {"policy": role(0), "reference": role(7, trained=False)}
    with pytest.raises(CheckError, match="margin to the reference"):
        fit(models, TokenPreference("tdpo1"), pair_data(rows), optim=Optim(lr=0.01), run=run_in(tmp_path))


# ---------------------------------------------------------------------------- rows


def test_answers_to_other_prompts_are_picked_once():
    rows = [Row([k, k + 1], [Branch([10 * k + i for i in range(k + 1)], {"loss": [True] * (k + 1)})]) for k in range(6)]
    rows += [Row([0, 1], [Branch([99], {"loss": [True]})])]  # the first one's prompt again
    made = with_mismatched(rows, max_length=7, seed=3)
    assert [row.branches[0] for row in made] == [row.branches[0] for row in rows]
    assert all(len(row.branches) == 2 and len(row.branches[1].ids) <= 5 for row in made)
    for row, own in zip(made, rows, strict=True):
        theirs = next(r for r in rows if r.branches[0] is row.branches[1])
        assert theirs.prompt != own.prompt
    assert with_mismatched(rows, max_length=7, seed=3) == made != with_mismatched(rows, max_length=7, seed=4)
    alone = with_mismatched(rows[5:6] + rows[1:2], max_length=3, seed=0)
    assert [len(row.branches) for row in alone] == [1, 1]
    assert len({id(row.branches[1]) for row in made}) > 3


def test_the_objective_of_a_loss():
    kinds = {
        "dpo": "preference", "beta_dpo": "beta_dpo", "kto": "unpaired", "sppo": "listwise", "wpo": "token_preference",
        "dno": "scored_preference", "xpo": "explored_preference", "dro_v": "valued",
    }  # fmt: skip
    for loss, kind in kinds.items():
        assert type(objective_of(loss, {}, 1e-3)) is objectives[kind]
    made = objective_of("simpo", {"gamma": 0.5}, 0.25)
    assert made.options == {"gamma": 0.5} and made.tolerance == 0.25
    with pytest.raises(ConfigError, match="has no option 'gama'"):
        objective_of("simpo", {"gama": 0.5}, 1e-3)
    with pytest.raises(ConfigError, match="unknown preference loss 'simpoo'"):
        objective_of("simpoo", {}, 1e-3)
