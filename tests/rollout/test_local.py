"""The in-process engine against the definition of what it samples, in float64."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from posttrain.errors import ConfigError, ModelError
from posttrain.forest import Branch, Row, build_forest
from posttrain.models.policy import Model, forward_stats, hidden_states
from posttrain.models.shared_slots import SharedSlots
from posttrain.models.slots import SlotLayout
from posttrain.ops.token_stats import logits_of
from posttrain.rollout import local
from posttrain.rollout.engine import Request, Sampling, uniforms
from posttrain.rollout.local import LocalEngine, sampled_logits
from tiny import VOCAB, ours, plain_net

STOPS = frozenset({2, 11, 23, 47, 48, 71})
PROMPTS = [(5, 9, 14), (7,), tuple(range(30, 50)), (8, 8), (60, 61, 62, 63, 64, 65, 66)]
REQUESTS = [Request(p, (3, i, k)) for i, p in enumerate(PROMPTS) for k in range(7)]


@pytest.fixture(scope="module", params=["llama", "mistral", "gemma2"])
def model(request):
    return Model(ours(plain_net(request.param)))


@pytest.fixture(scope="module")
def llama():
    return Model(ours(plain_net()))


def stats_of(model, rollouts, temperature):
    """Log-probabilities of the rollouts' tokens as training computes them."""
    forest = build_forest([Row(r.request.ids, [Branch(r.ids, {})]) for r in rollouts])
    with torch.no_grad():
        return forward_stats(model, forest, frozenset({"logp"}), temperature=temperature)["logp"]


def recorded(rollouts):
    return torch.tensor([x for r in rollouts for x in r.logp], dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0, 1.3])
def test_slots_and_order_change_nothing(model, temperature):
    sampling = Sampling(max_new_tokens=12, temperature=temperature)
    whole = LocalEngine(model, STOPS, slots=32).generate(REQUESTS, sampling)
    assert [r.request for r in whole] == REQUESTS
    shuffled = random.Random(1).sample(REQUESTS, len(REQUESTS))
    for slots, requests in ((1, REQUESTS), (3, REQUESTS), (3, shuffled), (32, REQUESTS[::-1]), (9, shuffled)):
        again = {r.request: r for r in LocalEngine(model, STOPS, slots=slots).generate(requests, sampling)}
        for one in whole:
            other = again[one.request]
            assert (other.ids, other.stopped) == (one.ids, one.stopped), slots
            assert other.logp == pytest.approx(one.logp, abs=1e-12)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_shared_prompts_change_nothing(family, monkeypatch):
    """Slots that read their prompt's keys from one place, against slots with a copy each; groups come and go."""
    model = Model(ours(plain_net(family)))
    made = []
    kinds = {True: SharedSlots, False: SlotLayout}

    def run(shared, slots):
        monkeypatch.setattr(local, "SharedSlots", lambda *args: made.append(kinds[shared](*args)) or made[-1])
        return LocalEngine(model, STOPS, slots=slots).generate(REQUESTS, Sampling(max_new_tokens=70, temperature=0.5))

    for slots in (2, 9, 32):
        ours_, copies = run(True, slots), run(False, slots)
        assert [r.ids for r in ours_] == [r.ids for r in copies]
        assert max(len(r.ids) for r in ours_) > 40
        torch.testing.assert_close(recorded(ours_), recorded(copies), atol=1e-12, rtol=0)
    assert [type(x) for x in made] == [SharedSlots, SlotLayout] * 3


def test_few_samples_of_a_prompt_have_copies(llama, monkeypatch):
    monkeypatch.setattr(local, "SharedSlots", None)
    requests = [Request(p, (k,)) for k, p in enumerate((*PROMPTS, PROMPTS[0], PROMPTS[1]))]
    assert len(LocalEngine(llama, STOPS).generate(requests, Sampling(max_new_tokens=4))) == 7


def test_every_stop_id_ends_and_nothing_else_does(llama):
    requests = [Request(PROMPTS[k % 5], (k,)) for k in range(300)]
    heard = []
    rollouts = LocalEngine(llama, STOPS).generate(requests, Sampling(max_new_tokens=10), heard.append)
    assert heard == list(range(1, 301))
    assert {r.ids[-1] for r in rollouts if r.stopped} == STOPS
    for r in rollouts:
        assert not STOPS & set(r.ids[:-1])
        assert r.stopped == (r.ids[-1] in STOPS) and r.truncated == (not r.stopped)
        assert r.stopped or len(r.ids) == 10
        assert len(r.logp) == len(r.ids) <= 10
    assert any(r.truncated for r in rollouts)
    assert any(r.stopped and len(r.ids) == 10 for r in rollouts)  # a stop in the last place isn't a truncation
    without = LocalEngine(llama, frozenset()).generate(requests[:9], Sampling(max_new_tokens=1))
    assert all(r.truncated and len(r.ids) == 1 for r in without)
    assert LocalEngine(llama, STOPS).generate([], Sampling(max_new_tokens=1)) == []


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "qwen3"])
def test_temperature_0_is_greedy_generation_of_transformers(family, monkeypatch):
    monkeypatch.setattr(nn.functional, "softmax", lambda x, dim, dtype=None: x.softmax(dim))
    net = plain_net(family)
    engine = LocalEngine(Model(ours(net)), STOPS, slots=2)
    rollouts = engine.generate([Request(p, (0,)) for p in PROMPTS], Sampling(max_new_tokens=20, temperature=0))
    for r in rollouts:
        out = net.generate(
            torch.tensor([r.request.ids]),
            do_sample=False,
            max_new_tokens=20,
            eos_token_id=sorted(STOPS),
            pad_token_id=0,
        )
        assert out[0, len(r.request.ids) :].tolist() == list(r.ids)
        assert set(r.logp) == {0.0}


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
def test_log_probs_are_those_training_computes(model, temperature):
    rollouts = LocalEngine(model, STOPS, slots=4).generate(
        REQUESTS, Sampling(max_new_tokens=15, temperature=temperature)
    )
    assert any(len(r.request.ids) + len(r.ids) > 20 for r in rollouts)  # beyond the sliding window of 8
    torch.testing.assert_close(recorded(rollouts), stats_of(model, rollouts, temperature), atol=1e-9, rtol=0)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "phi3"])
def test_log_probs_in_the_other_families(family):
    net = Model(ours(plain_net(family)))
    rollouts = LocalEngine(net, STOPS, slots=4).generate(REQUESTS[::3], Sampling(max_new_tokens=9))
    torch.testing.assert_close(recorded(rollouts), stats_of(net, rollouts, 1.0), atol=1e-9, rtol=0)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_ratio_in_fp32(family, temperature):
    model = Model(ours(plain_net(family, dtype=torch.float32)))
    sampling = Sampling(max_new_tokens=15, temperature=temperature)
    rollouts = LocalEngine(model, STOPS, slots=8).generate(REQUESTS[::2], sampling)
    ratio = (stats_of(model, rollouts, temperature).double() - recorded(rollouts)).exp()
    assert (ratio - 1).abs().max() < 1e-4


@pytest.mark.parametrize("cut", [{"top_k": 5}, {"top_p": 0.7}, {"top_k": 9, "top_p": 0.6}, {"top_k": 1}])
def test_cut_distributions_are_normalised_over_their_support(llama, cut):
    forest = build_forest([Row(p, [Branch([4], {})]) for p in PROMPTS])
    sampling = Sampling(max_new_tokens=1, temperature=0.8, **cut)
    with torch.no_grad():
        states = hidden_states(llama, forest)[forest.source]
        logp = sampled_logits(states @ llama.head.weight.T, llama.head, sampling).log_softmax(1)
        full = logits_of(states, llama.head).div(0.8).softmax(1)
    for row, p in zip(logp, full, strict=True):
        ranked = p.sort(descending=True).values[: cut.get("top_k", VOCAB)]
        ranked = ranked / ranked.sum()
        # the smallest number of likeliest tokens whose mass reaches top_p
        size = int((ranked.cumsum(0) < cut.get("top_p", 1.0) - 1e-12).sum()) + 1
        support = p.topk(min(size, len(ranked))).indices
        assert set(row.isfinite().nonzero()[:, 0].tolist()) == set(support.tolist())
        torch.testing.assert_close(row[support], (p[support] / p[support].sum()).log(), atol=1e-12, rtol=0)
    rollouts = LocalEngine(llama, STOPS).generate([Request(p, (k,)) for p in PROMPTS for k in range(40)], sampling)
    for i, r in enumerate(rollouts):
        assert r.logp[0] == pytest.approx(float(logp[i // 40, r.ids[0]]), abs=1e-12)


def test_prompts_are_prefilled_once(llama):
    fed = []
    hook = llama.trunk.embed_tokens.register_forward_hook(lambda _, args, out: fed.append(args[0].numel()))
    try:
        for slots in (2, 3, 32):
            fed.clear()
            mixed = random.Random(2).sample(REQUESTS, len(REQUESTS))
            rollouts = LocalEngine(llama, STOPS, slots=slots).generate(mixed, Sampling(max_new_tokens=9))
            assert sum(fed) == sum(map(len, PROMPTS)) + sum(len(r.ids) - 1 for r in rollouts)
    finally:
        hook.remove()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_frequencies_follow_the_softmax(llama, temperature):
    count = 2000
    requests = [Request(PROMPTS[0], ("chi", k)) for k in range(count)]
    rollouts = LocalEngine(llama, STOPS).generate(requests, Sampling(max_new_tokens=1, temperature=temperature))
    seen = torch.bincount(torch.tensor([r.ids[0] for r in rollouts]), minlength=VOCAB).double()
    forest = build_forest([Row(PROMPTS[0], [Branch([4], {})])])
    with torch.no_grad():
        state = hidden_states(llama, forest)[forest.source]
        expected = logits_of(state, llama.head, temperature).softmax(1)[0] * count
    rare = expected < 5
    pool = lambda x: torch.cat([x[~rare], x[rare].sum()[None]])  # noqa: E731
    seen, expected = pool(seen), pool(expected)
    keep = expected > 5
    chi = float(((seen - expected).square() / expected)[keep].sum())
    df = int(keep.sum()) - 1
    assert df > 10
    # the 99.9 % point by Wilson and Hilferty (1931)
    assert chi < df * (1 - 2 / (9 * df) + 3.09 * (2 / (9 * df)) ** 0.5) ** 3


def test_each_token_is_where_its_own_draw_falls(llama):
    """Token t is the one whose stretch of the cumulative distribution holds the t-th draw of its request's key."""
    temperature, requests = 1.3, REQUESTS[::4]
    rollouts = LocalEngine(llama, STOPS, slots=4).generate(
        requests, Sampling(max_new_tokens=9, temperature=temperature)
    )
    forest = build_forest([Row(r.request.ids, [Branch(r.ids, {})]) for r in rollouts])
    with torch.no_grad():
        states = hidden_states(llama, forest)[forest.source]
        mass = logits_of(states, llama.head, temperature).softmax(1).cumsum(1)
    draws = torch.cat([torch.from_numpy(uniforms(r.request.key, 9)[: len(r.ids)]) for r in rollouts])
    above = mass.gather(1, forest.target[:, None])[:, 0]
    below = torch.where(forest.target > 0, mass.gather(1, (forest.target - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    assert len(draws) > 40 and (below <= draws).all() and (draws < above).all()


def test_draws_depend_on_the_key_alone():
    assert uniforms((1, "a"), 5).tolist() == uniforms((1, "a"), 9)[:5].tolist()
    firsts = [float(uniforms(key, 1)[0]) for key in ((1,), ("1",), (1, 0), (0, 1), (1, "a"))]
    assert len(set(firsts)) == 5
    many = torch.tensor([float(uniforms((k, 0), 1)[0]) for k in range(2000)])
    assert many.min() >= 0 and many.max() < 1 and abs(float(many.mean()) - 0.5) < 0.02


def test_refusals(llama):
    for bad in ({"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": 0}):
        with pytest.raises(ConfigError, match="expected"):
            Sampling(max_new_tokens=1, **bad)
    with pytest.raises(ConfigError, match="max_new_tokens >= 1"):
        Sampling(max_new_tokens=0)
    with pytest.raises(ModelError, match="plain rows"):
        LocalEngine(Model(llama.net, plain=True), STOPS).generate(REQUESTS, Sampling(max_new_tokens=1))
