"""Quark: bins and loss by hand, a pool that grows and holds ids, a reference that reads no reward token, runs that go on."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from posttrain.forest import Batch, Branch, Row, build_forest
from posttrain.losses.quark import reward_bins
from posttrain.models.policy import Model, forward_stats, hidden_states
from posttrain.rewards.base import Score
from posttrain.rollout.local import LocalEngine
from posttrain.train.checkpoint import Unusable
from posttrain.train.journal import Journal
from posttrain.train.loop import fit
from posttrain.train.optim import Optim
from posttrain.train.quark import QuarkSource, RewardConditioned
from posttrain.train.rollouts import RolloutSource

from .tiny import PROMPTS, STOPS, equal, metrics, role, rollouts, run_in, score, weights

TOKENS = [94, 95, 96]  # the best first; no role can write them
WRITES = 94


def policy(seed: int = 0, trained: bool = True) -> Model:
    return replace(role(seed, trained=trained), outputs=WRITES)


def source(model: Model, reward=score, **changes) -> QuarkSource:
    plain = rollouts(model, model, None, reward=reward, prompts=6, samples=1, updates=4, kl=0.0, **changes)
    known = {f.name: getattr(plain, f.name) for f in fields(RolloutSource) if not f.name.startswith("_")}
    engine = LocalEngine(model, STOPS - set(TOKENS), slots=5)
    return QuarkSource(**known | {"reference": None, "policy": model, "engine": engine}, tokens=TOKENS, per_step=5)


def test_bins_are_of_equal_size_and_the_worst_takes_the_rest():
    scores = torch.tensor([0.1, 0.9, 0.5, 0.5, -1.0, 2.0, 0.0, 0.3])
    assert reward_bins(scores, bins=3).tolist() == [2, 0, 1, 1, 2, 0, 2, 2]
    assert reward_bins(torch.arange(10.0), bins=5).tolist() == [4, 4, 3, 3, 2, 2, 1, 1, 0, 0]


def test_a_role_that_reads_no_token_and_writes_fewer_is_the_smaller_network():
    """States as on prompts without the token; likelihood, entropy and both KLs over the words that are left."""
    other = policy(1)
    big = role(3, trained=False)
    big = replace(big, outputs=WRITES, unseen=1)
    cut = [Row(p, [Branch([50, 60, 77], {}), Branch([61, 77], {})]) for p in PROMPTS]
    whole = [Row([96, *row.prompt], row.branches) for row in cut]
    alone = replace(big, unseen=0)
    states = hidden_states(big, build_forest(whole))
    forest, plain = build_forest(whole), build_forest(cut)
    torch.testing.assert_close(states[forest.source], hidden_states(alone, plain)[plain.source], atol=1e-12, rtol=0)
    wants = frozenset({"logp", "entropy", "kl_to_other", "kl_from_other"})
    found = forward_stats(other, forest, wants, other=big)
    mine = (hidden_states(other, forest)[forest.source] @ other.net.lm_head.weight[:WRITES].T).log_softmax(1)
    theirs = (hidden_states(alone, plain)[plain.source] @ big.net.lm_head.weight[:WRITES].T).log_softmax(1)
    torch.testing.assert_close(found["logp"], mine.gather(1, forest.target[:, None])[:, 0], atol=1e-10, rtol=0)
    torch.testing.assert_close(found["entropy"], -(mine.exp() * mine).sum(1), atol=1e-10, rtol=0)
    torch.testing.assert_close(found["kl_to_other"], (mine.exp() * (mine - theirs)).sum(1), atol=1e-10, rtol=0)
    torch.testing.assert_close(found["kl_from_other"], (theirs.exp() * (theirs - mine)).sum(1), atol=1e-10, rtol=0)


def test_the_loss_by_hand_and_in_both_directions():
    model, reference = policy(1), replace(role(3, trained=False), outputs=WRITES, unseen=1)
    branch = Branch([50, 60, 77], {"loss": [True] * 3})
    forest = build_forest([Row([94, 5, 9], [branch])])
    batch = Batch(forest, {}, {}, {"tokens": 3.0})
    for direction, name in (("reverse", "kl_to_other"), ("forward", "kl_from_other")):
        objective = RewardConditioned(beta=0.3, eta=0.2, direction=direction)
        found = forward_stats(model, forest, objective.reads["policy"], other=reference)
        terms = objective({"policy": found}, batch)
        wanted = (-found["logp"] + 0.3 * found[name] - 0.2 * found["entropy"]).sum()
        assert float(terms["loss/quark"].sum) == pytest.approx(float(wanted))
        assert float(terms["kl/full"].sum) == pytest.approx(float(found[name].sum()))
        terms["loss/quark"].sum.backward()
        assert float(model.net.lm_head.weight.grad[:WRITES].abs().min(1).values.max()) > 0
        model.net.zero_grad()


def test_the_pool_grows_by_what_is_written_after_the_best_token():
    seen = []

    def watched(completions):
        seen.append([c.prompt_ids for c in completions])
        return score(completions)

    src = source(policy(), watched)
    first = src(0)
    every, bins = src._sorted
    assert len(every) == 6 and sorted(bins) == [0, 0, 1, 1, 2, 2]
    order = sorted(every, key=lambda p: -p.score)
    assert [p.score for p in order[:2]] >= [p.score for p in order[2:4]]
    assert all(bins[every.index(p)] == 0 for p in order[:2])
    assert src.metrics(0)["pool/size"] == 6 and src.metrics(0)["pool/best"] > src.metrics(0)["pool/worst"]
    for tree in first.forest.trees:  # each row begins with its bin's token, and is a response of the pool
        token, *prompt = first.forest.ids[slice(*tree.prompt)].tolist()
        (span,) = tree.branches
        (p,) = [
            q for q in every if list(q.ids) == first.forest.ids[slice(*span)].tolist() and PROMPTS[q.prompt] == prompt
        ]
        assert TOKENS[bins[every.index(p)]] == token
    assert len(first.forest.trees) == 5 and first.counts == {"tokens": float(len(first.forest.target)), "branches": 5.0}
    assert not torch.equal(first.forest.ids, src(1).forest.ids)
    src(4)
    assert len(src._sorted[0]) == 12 and src.metrics(4)["pool/size"] == 12
    assert all(ids in map(tuple, PROMPTS) for asked in seen for ids in asked)  # the reward sees no token
    assert all(i < WRITES for p in src._sorted[0] for i in p.ids)
    again = source(policy())
    requests = [again._requests(step, [0, 1], {})[0] for step in (0, 4)]
    assert [r.ids for r in requests[0]] == [tuple(PROMPTS[0]), tuple(PROMPTS[1])]
    assert [r.ids for r in requests[1]] == [(94, *PROMPTS[0]), (94, *PROMPTS[1])]


def test_responses_without_a_score_stay_out():
    src = source(policy(), lambda cs: [Score(None) if c.prompt_ids == tuple(PROMPTS[1]) else Score(1.0) for c in cs])
    src(0)
    assert len(src._sorted[0]) == 5 and src.metrics(0)["abstained/share"] == pytest.approx(1 / 6)
    assert 1 not in {p.prompt for p in src._sorted[0]}


@pytest.mark.parametrize("stop", [4, 6])
def test_a_run_goes_on_with_its_pool(tmp_path, stop):
    def trained(folder, *stops):
        for steps in (*stops, 8):
            roles = {"policy": policy(), "reference": replace(role(3, trained=False), outputs=WRITES, unseen=1)}
            src = source(roles["policy"], journal=Journal(folder / "journal"))
            run = run_in(folder, steps=steps, save_every=1)
            fit(roles, RewardConditioned(), src, optim=Optim(lr=1e-2, schedule="constant"), run=run)
        return weights({"policy": roles["policy"]}), metrics(folder), src._sorted

    whole, cut = trained(tmp_path / "a"), trained(tmp_path / "b", stop)
    assert equal(whole[0], cut[0]) and whole[1] == cut[1] and whole[2] == cut[2]
    assert len(whole[2][0]) == 12


def test_a_pool_whose_journal_is_gone_is_not_made_up(tmp_path):
    src = source(policy(), journal=Journal(tmp_path))
    src(0)
    src(4)
    state = src.state(5)
    (tmp_path / "step-00000000.jsonl").unlink()
    with pytest.raises(Unusable, match="step 0 is not in the journal"):
        source(policy(), journal=Journal(tmp_path)).load_state(state)
