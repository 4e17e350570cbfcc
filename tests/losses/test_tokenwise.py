"""Losses that read tokens, on two responses over four words whose logits are written out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from posttrain.errors import ConfigError
from posttrain.losses import TokenLogps, TokenPairs, preference, token_losses
from posttrain.losses.tokenwise import WeightedByPolicy, dispersion, pair_sums, wpo_weight

from .fixtures import PAIRS, f64, near

loss = token_losses


def side(logits, reference, labels, *, written=None, pad=0) -> TokenLogps:
    """One response, with tokens of padding after it that hold nonsense."""
    policy, frozen = (torch.tensor(x, dtype=torch.float64).log_softmax(-1) for x in (logits, reference))
    label = torch.tensor(labels)[:, None]
    columns = {
        "logp": policy.gather(1, label)[:, 0],
        "ref_logp": frozen.gather(1, label)[:, 0],
        "kl": (frozen.exp() * (frozen - policy)).sum(1),
        "sum_p2": policy.exp().square().sum(1),
        "ref_entropy": -(frozen.exp() * frozen).sum(1) / torch.tensor(4.0, dtype=torch.float64).log(),
    }
    filled = {k: torch.cat([v, torch.full((pad,), 7.7, dtype=torch.float64)])[None] for k, v in columns.items()}
    size = len(labels)
    mask = torch.tensor([[True] * size + [False] * pad])
    kept = torch.tensor([[*(written or [True] * size), *[True] * pad]])
    return TokenLogps(**filled, mask=mask, written=kept)


CHOSEN = ([[2, 1, 0, -1], [0, 2, 1, 0], [1, 0, 0, 3]], [[1.5, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0.5, 2]], [0, 1, 3])
REJECTED = (
    [[2, 1, 0, -1], [1, 1, 0, 0], [0, 0, 2, 0], [1, 0, 0, 0]],
    [[1.5, 1, 0, 0], [1, 1, 0.5, 0], [0, 0, 1, 0], [1, 0, 0, 1]],
    [1, 0, 2, 3],
)


def fixture(pad=(0, 0)) -> TokenPairs:
    return TokenPairs(
        chosen=side(*CHOSEN, written=[True, True, False], pad=pad[0]),
        rejected=side(*REJECTED, written=[True, True, True, False], pad=pad[1]),
    )


def test_the_fixture_is_as_written():
    pairs = fixture()
    near([-0.440190, -0.493812, -0.210998])(pairs.chosen.logp[0])
    near([-1.219200, -1.090046, -0.743668, -1.006409])(pairs.rejected.ref_logp[0])
    near([0.358346])(pairs.chosen.kl.sum(1))
    near([0.328942])(pairs.rejected.kl.sum(1))
    sums = pair_sums(pairs)
    near([1.126617])(sums.chosen - sums.ref_chosen)
    near([-0.471697])(sums.rejected - sums.ref_rejected)
    near([0.616421])(preference["dpo"](sums))


GOLDEN = [
    ("tdpo1", {"beta": 0.1}, 0.615070),
    ("tdpo2", {"beta": 0.1, "alpha": 0.5}, 0.615745),
    ("ld_dpo", {"beta": 0.1, "alpha": 0.5}, 0.633552),
    ("ld_dpo", {"beta": 0.1, "alpha": 0}, 0.651021),
    ("ld_dpo", {"beta": 0.1, "alpha": 1}, 0.616421),
    ("wpo", {"beta": 0.1}, 0.616421),
    ("dpo_nll_masked", {"beta": 0.1, "weight": 0}, 0.667191),
    ("dpo_nll_masked", {"beta": 0.1, "weight": 0.2}, 0.743524),
]


@pytest.mark.parametrize("pad", [(0, 0), (2, 0), (0, 3), (3, 2)])
@pytest.mark.parametrize(("name", "options", "expected"), GOLDEN)
def test_golden_whatever_the_padding(name, options, expected, pad):
    near([expected])(loss[name](fixture(pad), **options))


def flat(size, **columns) -> TokenLogps:
    """Responses of equal tokens that sum to the given numbers."""
    mask = torch.ones(3, size, dtype=torch.bool)
    return TokenLogps(mask=mask, **{k: v[:, None].expand(3, size) for k, v in columns.items()})


def test_mallows_by_the_references_entropy():
    entropy = f64(0.2, 0.1, 0.3)
    pairs = TokenPairs(
        chosen=flat(4, logp=PAIRS.chosen / 4, ref_logp=PAIRS.ref_chosen / 4, ref_entropy=entropy + 0.05),
        rejected=flat(2, logp=PAIRS.rejected / 2, ref_logp=PAIRS.ref_rejected / 2, ref_entropy=entropy - 0.05),
    )
    near([0.466737, 0.667750, 0.349152])(dispersion(pairs, 0.29))
    near([0.658754, 0.744482, 0.633911])(loss["mallows"](pairs, beta=0.1))
    near([18.489093, 36.019497, 14.273039])(loss["mallows_ipo"](pairs, tau=0.1))
    certain = replace(pairs, chosen=replace(pairs.chosen, ref_entropy=torch.zeros(3, 4, dtype=torch.float64)))
    assert loss["mallows"](certain).isfinite().all()
    nats = replace(pairs, chosen=replace(pairs.chosen, ref_entropy=torch.full((3, 4), 2.0, dtype=torch.float64)))
    with pytest.raises(ConfigError, match=r"mean 'ref_entropy' of 1.12; expected entropies over log V"):
        loss["mallows"](nats)


def lifted(pairs, name):
    """The same pairs with gradient to one field of both responses, and those fields."""
    fields = [getattr(s, name).clone().requires_grad_() for s in (pairs.chosen, pairs.rejected)]
    sides = [replace(s, **{name: x}) for s, x in zip((pairs.chosen, pairs.rejected), fields, strict=True)]
    return TokenPairs(chosen=sides[0], rejected=sides[1]), fields


def test_the_weight_of_a_pair_is_at_most_1_and_has_no_gradient():
    pairs = fixture()
    each = [(s.logp - s.sum_p2.log()).mean(1).exp() for s in (pairs.chosen, pairs.rejected)]
    near([1.313564])(each[0])
    near([0.812943])(each[1])
    near([1.0])(wpo_weight(pairs))
    doubled = replace(pairs, rejected=replace(pairs.rejected, sum_p2=pairs.rejected.sum_p2 * 2))
    near([1.067853 / 2])(wpo_weight(doubled))
    near([0.616421 * 1.067853 / 2])(loss["wpo"](doubled, beta=0.1))
    assert not wpo_weight(lifted(doubled, "sum_p2")[0]).requires_grad
    simpo = WeightedByPolicy(preference.bound("simpo", {"beta": 1.0}))
    near((1.067853 / 2 * preference["simpo"](pair_sums(doubled), beta=1.0)).tolist())(simpo(doubled))


@pytest.mark.parametrize(("name", "through"), [("tdpo1", [True, True]), ("tdpo2", [False, True])])
def test_which_divergences_carry_gradient(name, through):
    given, leaves = lifted(fixture(), "kl")
    found = torch.autograd.grad(loss[name](given).sum(), leaves, allow_unused=True)
    assert [g is not None and bool(g.any()) for g in found] == through
    assert found[1].min() > 0  # a rejected response that the policy left makes the margin smaller


def test_identities():
    pairs = fixture()
    expected = preference["dpo"](pair_sums(pairs), beta=0.3).tolist()
    near(expected, 1e-12)(loss["ld_dpo"](pairs, beta=0.3, alpha=1))
    near(expected, 1e-12)(loss["tdpo2"](pairs, beta=0.3, alpha=0))
    whole = TokenPairs(chosen=side(*CHOSEN), rejected=side(*REJECTED))
    near(preference["dpo_nll"](pair_sums(whole), beta=0.3).tolist(), 1e-12)(loss["dpo_nll_masked"](whole, beta=0.3))


@pytest.mark.parametrize(
    ("name", "field"), [(n, f) for n in loss for f in loss.facts(n).get("reads", ())] + [("mallows", "ref_entropy")]
)
def test_a_statistic_that_is_not_given_is_named(name, field):
    pairs = fixture()
    without = replace(pairs, rejected=replace(pairs.rejected, **{field: None}))
    with pytest.raises(ConfigError, match=rf"reads '{field}' of every token, got none"):
        loss[name](without)


def test_a_loss_states_what_it_reads():
    everything = {"written", "kl", "sum_p2", "ref_entropy"}
    for name in loss:
        absent = dict.fromkeys(everything - set(loss.facts(name).get("reads", ())))
        pairs = fixture()
        few = TokenPairs(chosen=replace(pairs.chosen, **absent), rejected=replace(pairs.rejected, **absent))
        assert torch.equal(loss[name](few), loss[name](pairs))
