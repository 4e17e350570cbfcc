"""PPO of the library against `examples/ppo_by_hand.py`, step by step on the same responses."""

from __future__ import annotations

import copy
import json
import math
from functools import partial
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from by_hand_example import Recorded, loaded, packages, rows_of
from posttrain.losses.policy import ppo_clip
from posttrain.models.attention import NAME
from posttrain.models.policy import Model
from posttrain.rewards.base import Score
from posttrain.rollout.engine import Sampling
from posttrain.rollout.local import LocalEngine
from posttrain.train.loop import Run, fit
from posttrain.train.objectives import PolicyGradient
from posttrain.train.optim import Optim
from posttrain.train.rollouts import Plan, RolloutSource
from posttrain.types import Example, Message
from train.tiny import PROMPTS, exact
from train.tiny import SHAPE as TINY

SHAPE = TINY | {"vocab_size": 40}
STOPS = frozenset(range(32, 40))
KL, LR, VALUE_LR, WARMUP = 0.1, 0.01, 0.02, 2


@pytest.fixture(scope="module")
def by_hand():
    with loaded("ppo_by_hand") as module:
        yield module


def ours(net, **role) -> Model:
    """A copy of a network as a role of the library; the original stays plain transformers."""
    net = copy.deepcopy(net).eval()
    net.set_attn_implementation(NAME)
    trained = bool(role.get("trained"))
    net.requires_grad_(trained)
    return Model(net, scalar=getattr(net, "score", None), **role)


@pytest.fixture
def nets():
    """Policy, reference and critic in float64, all with different weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        policy = exact(LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)))
        reference = copy.deepcopy(policy)
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter.add_(0.03 * torch.randn_like(parameter))
        critic = exact(LlamaForSequenceClassification(LlamaConfig(**SHAPE, num_labels=1)))
    assert policy.lm_head.weight is policy.model.embed_tokens.weight
    return policy, reference, critic


def score(completions):
    """Distinct scores of either sign, exact in binary."""
    return [Score(len(c.ids) / 4 - (sum(c.ids) % 16) / 8) for c in completions]


def library_run(nets, directory: Path, steps: int, updates: int, max_tokens: int):
    """Train with the library; returns its batches and the lines of metrics.jsonl."""
    policy, reference, critic = nets
    roles = {"policy": ours(policy, trained=True), "value": ours(critic, trained=True)}
    source = Recorded(
        RolloutSource(
            plan=Plan(
                prompts=6,
                samples=2,
                updates=updates,
                sampling=Sampling(max_new_tokens=9),
                kl=KL,
                seed=3,
                max_tokens=max_tokens,
            ),
            examples=[Example(prompt=(Message(role="user", content=str(p)),)) for p in PROMPTS],
            prompt_ids=PROMPTS,
            engine=LocalEngine(roles["policy"], STOPS, slots=5),
            reward=score,
            reference=ours(reference),
            value=roles["value"],
            decode=str,
        )
    )
    run = Run(
        directory=directory,
        steps=steps,
        max_tokens=max_tokens,
        save_every=100,
        console=Console(file=StringIO()),
    )
    optim = Optim(lr=LR, role_lr={"value": VALUE_LR}, warmup_steps=WARMUP)
    fit(roles, PolicyGradient(loss=partial(ppo_clip, clip=0.2)), source, optim=optim, run=run)
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return roles, source.batches, lines


@pytest.mark.parametrize(("updates", "rollouts"), [(1, 3), (3, 2)])
@pytest.mark.parametrize("max_tokens", [30, 4096])
def test_losses_advantages_and_norms_equal_those_by_hand(by_hand, nets, tmp_path, updates, rollouts, max_tokens):
    roles, batches, lines = library_run(nets, tmp_path, updates * rollouts, updates, max_tokens)
    policy, reference, judge = nets
    critic = by_hand.Critic(judge.model, SHAPE["hidden_size"])
    critic.head = judge.score
    optimizer, schedule = by_hand.make_optimizer(policy, critic, lr=LR, value_lr=VALUE_LR, warmup=WARMUP)
    near = partial(pytest.approx, abs=1e-9, rel=1e-9)
    for rollout in range(rollouts):
        parts = batches[rollout * updates : (rollout + 1) * updates]
        rows = rows_of(by_hand, parts)
        mine, theirs = (
            {},
            {key: torch.cat([p.tokens[key] for p in parts]).double() for key in parts[0].tokens},
        )
        with torch.no_grad():
            mine["old_logp"] = by_hand.logps(policy, rows)
            mine["ref_logp"] = rows.ref_logp = by_hand.logps(reference, rows)
            mine["old_value"] = rows.value = by_hand.values(critic, rows)
        # The sampler's record is data and kept in fp32: both read it, or Adam would blow its rounding up.
        rows.old_logp = torch.zeros(rows.mask.shape, dtype=torch.float64)
        rows.old_logp[rows.mask] = theirs["old_logp"]
        mine["advantage"], mine["return"] = advantage, returns = by_hand.advantages(rows, kl=KL)
        assert mine.keys() == theirs.keys()
        for key in mine:
            got = mine[key][rows.mask]
            torch.testing.assert_close(got, theirs[key], atol=1e-6, rtol=0, msg=partial("{} {}".format, key))
        for u, share in enumerate(rows.shares(updates, advantage, returns)):
            line = lines[rollout * updates + u]
            got = by_hand.update(policy, critic, optimizer, schedule, *share)
            assert got["loss/policy"] == near(line["loss/policy"]), line["step"]
            assert got["loss/value"] == near(line["loss/value"]), line["step"]
            assert math.hypot(got["norm/policy"], got["norm/value"]) == near(line["optim/grad_norm"])
    # and in the end the weights, moved by both
    for net, role in ((policy, "policy"), (critic.trunk, "value")):
        theirs = dict(roles[role].trunk.named_parameters())
        for name, mine in getattr(net, "model", net).named_parameters():
            torch.testing.assert_close(mine, theirs[name], atol=1e-6, rtol=0, msg=partial("{} {}".format, name))


def test_the_comparison_reaches_every_branch_of_the_losses(nets, tmp_path):
    """Clipped ratios, truncated and stopped responses, gradient norms over and under 1, a KL above 0."""
    _, batches, lines = library_run(nets, tmp_path, 6, 3, 4096)
    truncated = torch.cat([b.forest.truncated for b in batches])
    assert truncated.any() and not truncated.all()
    assert max(line["policy/clipped"] for line in lines) > 0.02
    assert lines[0]["kl/mean"] > 0.05 and lines[0]["policy/ratio_error"] < 1e-6
    assert [line["optim/lr"] for line in lines[:3]] == [LR / 2, LR, LR]
    norms = [line["optim/grad_norm"] for line in lines]
    assert min(norms) < 1 < max(norms)


def test_token_rewards_and_whitening_by_hand_on_two_rows(by_hand):
    """A response of two tokens and one of one; kl 1, lambda 1/2, values 0 but one."""
    mask = torch.tensor([[True, True], [True, False]])
    zeros = torch.zeros(2, 2, dtype=torch.float64)
    rows = by_hand.Rows(
        prompt=mask.long(),
        prompt_mask=mask,
        response=mask.long(),
        mask=mask,
        score=torch.tensor([3.0, -1.0], dtype=torch.float64),
        old_logp=torch.tensor([[-1.0, -2.0], [-1.0, 9.0]], dtype=torch.float64),
        ref_logp=zeros - 1.5,
        value=torch.tensor([[0.0, 1.0], [0.0, 9.0]], dtype=torch.float64),
    )
    # rewards: -0.5, 0.5 + 3 | -0.5 - 1; deltas: -0.5 + 1, 3.5 - 1 | -1.5
    raw = torch.tensor([0.5 + 0.5 * 2.5, 2.5, -1.5], dtype=torch.float64)
    advantage, returns = by_hand.advantages(rows, kl=1.0, lam=0.5)
    assert returns[mask].tolist() == [1.75, 3.5, -1.5]
    torch.testing.assert_close(advantage[mask], (raw - raw.mean()) / raw.var(correction=0).sqrt())
    assert advantage[1, 1] == 0


def test_the_example_runs_without_the_shipped_model(by_hand, tmp_path, capsys):
    history = by_hand.main(steps=3, prompts=8, longest=6, path=tmp_path)
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 4 and out[0].split() == list(history[0])
    assert history[0]["kl/response"] == pytest.approx(0, abs=1e-4) and history[2]["kl/response"] != 0
    assert all(torch.isfinite(torch.tensor(list(line.values()))).all() for line in history)


def test_the_example_imports_torch_and_transformers_only():
    assert packages("ppo_by_hand") == {"torch", "transformers"}
