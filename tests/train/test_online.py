"""Preferences among fresh samples: what each loss gets, opponents, age of samples, and going on to the bit."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch

from posttrain.errors import ConfigError, RewardError
from posttrain.forest import Branch, Row, build_forest
from posttrain.losses.games import geometric_mixture
from posttrain.models.policy import forward_stats, hidden_states
from posttrain.ops.token_stats import logits_of
from posttrain.rewards.base import Score
from posttrain.rollout.engine import Request, Sampling
from posttrain.rollout.local import LocalEngine
from posttrain.rollout.mixture import ByDraw, MixtureEngine
from posttrain.train.journal import Journal
from posttrain.train.loop import fit
from posttrain.train.objectives import objective_of
from posttrain.train.online import OnlineSource, arrange
from posttrain.train.optim import Optim
from posttrain.train.reference import row_logp
from posttrain.train.rollouts import Plan
from posttrain.types import Example, Message

from .tiny import PROMPTS, STOPS, equal, metrics, role, run_in, score, weights

POLICY, REFERENCE = role(0), role(3, trained=False)


def objective(loss, **options):
    return objective_of(loss, options, 1e9)


def source(
    loss="dpo",
    *,
    policy=POLICY,
    reference=REFERENCE,
    reward=score,
    updates=1,
    samples=2,
    share=0.25,
    journal=None,
    **more,
):
    wanted = objective(loss)
    own = LocalEngine(policy, STOPS, slots=5)
    other = {
        "": own,
        "reference": ByDraw(own, LocalEngine(reference, STOPS, slots=5), STOPS),
        "mixture": ByDraw(own, MixtureEngine(policy, reference, share, STOPS, slots=3), STOPS),
    }[wanted.facts.get("opponent", "")]
    return OnlineSource(
        plan=Plan(
            sampling=Sampling(max_new_tokens=6),
            prompts=4,
            samples=samples,
            updates=updates,
            kl=0.0,
            seed=3,
            max_tokens=60,
        ),
        examples=[Example(prompt=(Message(role="user", content=str(p)),)) for p in PROMPTS],
        prompt_ids=PROMPTS,
        engine=other,
        reward=reward,
        reference=reference,
        value=None,
        policy=policy,
        decode=str,
        journal=journal or Journal(),
        objective=wanted,
        token_columns=lambda rows: {"ref_logp": row_logp(reference, rows, max_tokens=60)},
        **more,
    )


# ---------------------------------------------------------------------------- what a loss gets of a group


@pytest.mark.parametrize(
    ("loss", "scores", "places", "columns"),
    [
        ("dpo", [1.0, 3.0, None, 0.0], (1, 3), {"rank": (0, 1)}),
        ("simpo", [2.0, 2.0, 1.0], (0, 2), {"rank": (0, 1)}),
        ("xpo", [1.0, 3.0], (1, 0), {"rank": (0, 1), "explored": (1, 0)}),
        ("xpo", [3.0, 1.0], (0, 1), {"rank": (0, 1), "explored": (0, 1)}),
        ("reward_aware_po", [1.0, 3.0, 0.5], (1, 2), {"rank": (0, 1), "score": (3.0, 0.5)}),
        ("info_nca", [1.0, None, 3.0, 1.0], (0, 2, 3), {"rank": (1, 0, 1), "score": (1.0, 3.0, 1.0)}),
        ("kto", [1.0, 3.0, 2.0], (1, 0), {"label": (1, 0)}),
    ],
)
def test_what_a_loss_learns_from(loss, scores, places, columns):
    found = arrange(objective(loss), scores)
    assert found is not None and found.places == places and dict(found.columns) == columns


def test_win_rates_are_among_all_samples_of_the_prompt():
    s = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    found = arrange(objective("dno"), [0.0, 2.0, 1.0])
    assert found.places == (1, 0)
    assert found.columns["score"] == pytest.approx(((s(2) + s(1) + 0.5) / 3, (s(-2) + s(-1) + 0.5) / 3))
    given = arrange(objective("dno"), [0.45, 0.55, 0.5], compared=True)
    assert given.columns["score"] == pytest.approx(((1.1 + 0.5) / 3, (0.9 + 0.5) / 3))


def test_nash_md_gets_its_sample_alone_with_its_chance_to_win():
    found = arrange(objective("nash_md"), [2.0, 1.0])
    assert found.places == (0,) and found.columns["score"] == pytest.approx((1 / (1 + math.exp(-1)),))
    assert arrange(objective("nash_md"), [0.7, 0.3], compared=True).columns["score"] == (0.7,)


@pytest.mark.parametrize(("loss", "scores"), [("dpo", [1.0, 1.0]), ("dpo", [None, 1.0]), ("nash_md", [1.0, None])])
def test_scores_that_order_nothing(loss, scores):
    assert arrange(objective(loss), scores) is None


def test_a_loss_of_rewards_is_refused():
    with pytest.raises(ConfigError, match="'dro_v' learns a value network from answers with ratings"):
        arrange(objective("dro_v"), [1.0, 2.0])


# ---------------------------------------------------------------------------- batches


def test_a_batch_is_that_of_offline_data():
    src = source(samples=3)
    batch = src(0)
    assert batch.counts["prompts"] == len(batch.forest.trees) == 4 and batch.counts["branches"] == 8
    assert batch.branches["rank"].tolist() == [0, 1] * 4
    assert bool(batch.forest.masks["loss"].all())
    rows = [
        Row(
            batch.forest.ids[a:b].tolist(),
            [Branch(batch.forest.ids[c:d].tolist(), {"loss": [True] * (d - c)}) for c, d in tree.branches],
        )
        for tree in batch.forest.trees
        for a, b in [tree.prompt]
    ]
    assert torch.allclose(batch.tokens["ref_logp"], torch.cat(row_logp(REFERENCE, rows, max_tokens=1000)), atol=1e-9)
    measured = src.metrics(0)
    assert measured["rollout/tied"] == 0 and measured["rollout/staleness"] == 0 and "reward/mean" in measured


def test_samples_serve_as_many_updates_as_their_age_allows():
    src = source(updates=2)
    parts = [src(0), src(1)]
    assert [p.counts["prompts"] for p in parts] == [2, 2]
    assert [src.metrics(k)["rollout/staleness"] for k in (0, 1)] == [0, 1] and not src.fresh(1)
    assert src(2).forest.ids.tolist() != parts[0].forest.ids.tolist()


def test_prompts_without_an_order_are_left_out_and_counted():
    some = lambda cs: [Score(1.0 if c.group < 2 else float(i)) for i, c in enumerate(cs)]  # noqa: E731
    src = source(reward=some)
    assert src(0).counts["prompts"] == 2 and src.metrics(0)["rollout/tied"] == 0.5
    flat = source(reward=lambda cs: [Score(1.0)] * len(cs))
    with pytest.raises(RewardError, match="of 4 prompts 0 have responses of which one is better"):
        flat(0)


def test_labelled_answers_are_rows_of_their_own_with_answers_to_other_prompts():
    batch = source("kto", max_length=40)(0)
    assert batch.counts["prompts"] == 8 and batch.counts["good"] == 4 and batch.counts["bad"] == 4
    assert batch.counts["mismatched"] == 8 and batch.branches["matched"].tolist() == [1, 0] * 8


# ---------------------------------------------------------------------------- opponents


def test_the_mixture_engine_samples_the_mixture():
    requests = [Request(tuple(PROMPTS[i]), (5, i, k)) for i in (0, 1, 3, 4) for k in range(3)]
    engine = MixtureEngine(POLICY, REFERENCE, 0.3, STOPS, slots=4)
    found = engine.generate(requests, Sampling(max_new_tokens=6, temperature=0.8))
    forest = build_forest([Row(r.request.ids, [Branch(r.ids, {})]) for r in found])
    logits = [logits_of(hidden_states(m, forest)[forest.source], m.head, 0.8) for m in (POLICY, REFERENCE)]
    mixed = geometric_mixture(*(x.log_softmax(-1) for x in logits), share=0.3).gather(1, forest.target[:, None])[:, 0]
    assert torch.allclose(
        torch.tensor([x for r in found for x in r.logp], dtype=torch.float64), mixed.detach(), atol=1e-5
    )
    assert all(r.stopped == (r.ids[-1] in STOPS) and len(r.ids) <= 6 for r in found)
    alone = engine.generate(requests[4:5], Sampling(max_new_tokens=6, temperature=0.8))
    assert alone[0].ids == found[4].ids
    pure = MixtureEngine(POLICY, REFERENCE, 0.0, STOPS).generate(requests, Sampling(max_new_tokens=6))
    assert [r.ids for r in pure] == [
        r.ids for r in LocalEngine(POLICY, STOPS).generate(requests, Sampling(max_new_tokens=6))
    ]
    with pytest.raises(ConfigError, match="a mixture is sampled whole"):
        engine.generate(requests, Sampling(max_new_tokens=6, top_p=0.9))


def test_the_opponents_sample_is_the_second():
    src = source("xpo")
    batch = src(0)
    assert sorted(batch.branches["explored"].tolist()) == [0] * 4 + [1] * 4
    again = LocalEngine(REFERENCE, STOPS).generate(
        src._requests(0, src.prompt_indices(0), {})[0][1::2], src.plan.sampling
    )
    explored = batch.branches["explored"].bool()
    rows = [batch.forest.target[batch.forest.branch == b].tolist() for b in range(8)]
    assert sorted(tuple(r) for r, e in zip(rows, explored.tolist(), strict=True) if e) == sorted(r.ids for r in again)


def test_xpo_is_dpo_with_less_of_what_the_reference_writes():
    batch = source("xpo")(0)
    stats = {"policy": forward_stats(POLICY, batch.forest, frozenset({"logp"}))}
    xpo = objective("xpo", alpha=0.01)(stats, batch)["loss/preference"].sum
    dpo = objective("dpo")(stats, batch)["loss/preference"].sum
    explored = sum(
        float(stats["policy"]["logp"].detach()[batch.forest.branch == b].sum())
        for b in range(8)
        if batch.branches["explored"][b]
    )
    assert float((xpo - dpo).detach()) == pytest.approx(0.01 * explored, abs=1e-6)


def test_nash_md_pushes_what_wins_and_pulls_to_the_reference():
    batch = source("nash_md")(0)
    assert batch.counts["branches"] == 4
    stats = {
        "policy": {"logp": forward_stats(POLICY, batch.forest, frozenset({"logp"}))["logp"].detach().requires_grad_()}
    }
    objective("nash_md", tau=0.1)(stats, batch)["loss/listwise"].sum.backward()
    grad, logp = stats["policy"]["logp"].grad, stats["policy"]["logp"].detach()
    for b in range(4):
        own = batch.forest.branch == b
        h = float((logp - batch.tokens["ref_logp"])[own].sum())
        wanted = -(float(batch.branches["score"][b]) - 0.5 - 0.1 * h)
        assert grad[own].tolist() == pytest.approx([wanted] * int(own.sum()), abs=1e-6)


# ---------------------------------------------------------------------------- a run


def trained(directory, loss, *, steps, stop=None, updates=2):
    policy = role(0)
    src = source(loss, policy=policy, updates=updates, journal=Journal(directory / "journal"))
    models = {"policy": policy}
    hooks = []
    if stop is not None:

        def hook(step, found):
            if step == stop:
                raise KeyboardInterrupt

        hooks = [hook]
    run = run_in(directory, steps=steps, save_every=1)
    with contextlib.suppress(KeyboardInterrupt):
        fit(models, objective(loss), src, optim=Optim(lr=1e-3), run=run, hooks=hooks)
    return weights(models)


@pytest.mark.parametrize("loss", ["dpo", "nash_md"])
def test_a_run_that_was_cut_in_the_middle_of_a_rollout_goes_on_to_the_bit(tmp_path, loss):
    whole = trained(tmp_path / "whole", loss, steps=5)
    trained(tmp_path / "cut", loss, steps=5, stop=2)
    assert len(metrics(tmp_path / "cut")) == 3
    assert equal(trained(tmp_path / "cut", loss, steps=5), whole)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert [row["rollout/staleness"] for row in metrics(tmp_path / "whole")] == [0, 1, 0, 1, 0]
