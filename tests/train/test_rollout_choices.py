"""What a plan can ask of rollouts: greedy baselines, other prompts for flat groups, lengths, a KL target, another sampler."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch

from posttrain.errors import ConfigError, RewardError
from posttrain.losses.advantages import advantages
from posttrain.losses.shaping import adaptive_kl, mismatch_weights
from posttrain.rewards.base import Score
from posttrain.train.journal import Journal
from posttrain.train.log import METRICS

from .tiny import PROMPTS, STOPS, network, role, rollouts, score

POLICY, REFERENCE = role(0), role(3, trained=False)


def source(*, estimator="group_centre", **changes):
    found = rollouts(POLICY, REFERENCE, None, **({"updates": 1, "kl": 0.0} | changes))
    found.advantage = advantages[estimator]
    return found


def groups_of(batch, name):
    """A column of each prompt's responses."""
    values = batch.branches[name].tolist()
    return [[v for v, g in zip(values, batch.forest.group.tolist(), strict=True) if g == k] for k in range(4)]


def of_branch(batch, name):
    """The advantage of each response's first token."""
    first = batch.forest.lengths.cumsum(0) - batch.forest.lengths
    return batch.tokens[name][first].tolist()


def test_without_a_critic_nothing_of_one_is_computed():
    src = source()
    batch = src(0)
    assert set(batch.tokens) == {"old_logp", "ref_logp", "advantage"}
    assert "value/explained" not in src.metrics(0) and set(src.metrics(0)) <= set(METRICS)


def test_groups_with_one_score_left_are_dropped_and_counted():
    def some(completions):
        return [s if i % 2 or i > 3 else Score(None) for i, s in enumerate(score(completions))]

    src = source(reward=some, least=2)
    batch = src(0)
    assert src.metrics(0)["groups/dropped"] == 0.5
    on = batch.forest.masks["sampled"]
    assert batch.forest.group[batch.forest.branch[on]].unique().tolist() == [2, 3]
    assert batch.counts == {"tokens": float(on.sum()), "branches": 4.0}
    with pytest.raises(RewardError, match="no prompt of the rollout has enough"):
        source(least=2, reward=lambda c: [s if i % 2 else Score(None) for i, s in enumerate(score(c))])(0)
    with pytest.raises(ConfigError, match="got 1 samples a prompt; expected at least 2"):
        source(least=2, samples=1)


def test_the_greedy_response_is_the_likeliest_and_its_score_the_baseline():
    asked = []
    src = source(estimator="greedy", greedy=True, reward=lambda c: asked.append(c) or score(c))
    batch = src(0)
    (drawn, best), scores = asked, score(asked[1])
    assert len(drawn) == 8 and len(best) == 4
    with torch.no_grad():
        ids = torch.tensor([[*best[0].prompt_ids, *best[0].ids]])
        found = network(0)(ids, use_cache=False).logits[0, len(best[0].prompt_ids) - 1 : -1].argmax(-1)
    assert found.tolist() == list(best[0].ids)
    expected = [r - scores[b // 2].value for b, r in enumerate(batch.branches["reward"].tolist())]
    assert of_branch(batch, "advantage") == pytest.approx(expected, abs=1e-9)


def flat_at_first(completions):
    """Equal scores to the first prompt of each round."""
    return [Score(0.5) if c.group == 0 else s for c, s in zip(completions, score(completions), strict=True)]


def test_flat_groups_are_replaced_by_other_prompts():
    src = source(rounds=3, reward=flat_at_first)
    batch = src(0)
    assert all(len(set(scores)) > 1 for scores in groups_of(batch, "reward"))
    assert src.metrics(0)["groups/kept"] == 0.5 and src.metrics(0)["groups/flat"] == 0
    again = source(rounds=3, reward=flat_at_first)
    again(1)
    assert torch.equal(again(0).forest.ids, batch.forest.ids)  # whatever was sampled before
    order = [i for turn in range(2) for i in src.prompt_indices(turn)]
    kept = [i for k, i in enumerate(order) if k % 4][:4]
    starts = [batch.forest.ids[slice(*tree.prompt)].tolist() for tree in batch.forest.trees]
    assert starts == [PROMPTS[i] for i in kept]
    with pytest.raises(RewardError, match="of 8 prompts in 2 rounds 0 have responses of differing score, expected 4"):
        source(rounds=2, reward=lambda c: [Score(1.0)] * len(c))(0)


def test_cut_responses_count_for_the_baseline_and_not_for_the_loss():
    plain, masked = source()(0), source(mask_cut=True)(0)
    cut = plain.forest.truncated
    assert cut.any() and not cut.all()
    assert torch.equal(masked.forest.masks["sampled"], ~cut[plain.forest.branch])
    assert masked.counts["branches"] == float((~cut).sum())
    assert torch.equal(masked.tokens["advantage"], plain.tokens["advantage"])


def test_long_responses_score_less():
    plain, soft = source()(0), source(overlong_share=0.5)(0)
    lost = (plain.branches["reward"] - soft.branches["reward"]).tolist()
    expected = [max(0.0, (n - 3) / 3) for n in plain.forest.lengths.tolist()]
    assert lost == pytest.approx(expected, abs=1e-6) and len(set(expected)) > 2


def test_the_kl_coefficient_follows_its_target_and_goes_on_with_the_run(tmp_path):
    make = partial(source, estimator="returns_z", kl=0.2, kl_target=0.01, kl_horizon=10.0, updates=2)
    src = make(journal=Journal(tmp_path))
    used = []
    for step in range(6):
        src(step)
        if metrics := src.metrics(step):
            used.append((metrics["kl/coefficient"], metrics["kl/mean"]))
        if step == 3:
            state = json.loads(json.dumps([src.state(3), src.state(4)]))
    assert used[0][0] == 0.2
    for (before, kl), (after, _) in pairwise(used):
        assert after == adaptive_kl(before, kl, sequences=8, target=0.01, horizon=10.0) != before
    for step, saved in zip((3, 4), state, strict=True):
        new = make(journal=Journal(tmp_path))
        new.load_state(saved)
        for later in range(step, 6):
            batch = new(later)
            assert torch.equal(batch.tokens["advantage"], src(later).tokens["advantage"])
        assert new.metrics(4)["kl/coefficient"] == used[2][0]


class Shifted:
    """An engine whose log-probabilities are all off by as much, as those of another numeric format."""

    def __init__(self, engine, gap):
        self.engine, self.gap, self.stop_ids = engine, gap, STOPS

    def generate(self, requests, sampling, on_done=None):
        found = self.engine.generate(requests, sampling, on_done)
        return [replace(r, logp=tuple(x - self.gap for x in r.logp)) for r in found]


@pytest.mark.parametrize(("gap", "weight"), [(0.0, 1.0), (0.1, 1.1051709), (1.0, 2.0)])
def test_the_trainers_log_probabilities_are_the_old_ones_where_the_sampler_is_another(gap, weight):
    src = source()
    src.policy, src.mismatch = POLICY, mismatch_weights["truncate"]
    src.engine = Shifted(src.engine, gap)
    batch = src(0)
    plain = source()(0)
    torch.testing.assert_close(batch.tokens["old_logp"], plain.tokens["old_logp"], atol=1e-6, rtol=0)
    assert batch.tokens["mismatch"].tolist() == pytest.approx([weight] * len(batch.forest.target), abs=1e-4)
    metrics = src.metrics(0)
    assert metrics["mismatch/weight"] == pytest.approx(weight, abs=1e-4) and metrics["mismatch/zero"] == 0
    assert metrics["mismatch/kl"] == pytest.approx(torch.tensor(gap).exp().item() - 1 - gap, abs=1e-4)


def test_scores_of_steps_reach_the_advantage_through_the_journal(tmp_path):
    def stepped(completions):
        return [
            Score(s.value, steps={0: 1.0, len(c.ids) - 1: s.value})
            for c, s in zip(completions, score(completions), strict=True)
        ]

    seen = []
    for _ in range(2):
        src = source(journal=Journal(tmp_path), reward=stepped if not seen else None)
        src.advantage = lambda given: seen.append(given) or advantages["process_z"](given)
        batch = src(0)
    assert torch.equal(seen[0].steps, seen[1].steps) and torch.equal(seen[0].ends, seen[1].ends)
    lengths = batch.forest.lengths.tolist()
    assert [e.nonzero()[:, 0].tolist() for e in seen[0].ends] == [sorted({0, n - 1}) for n in lengths]
    assert batch.tokens["advantage"].isfinite().all()
