"""Losses of single responses with a label, good or bad, or with a scalar reward; no pairs are needed.

Facts beside those of `posttrain.losses.preference`: ``mismatched`` (True: it wants responses to other prompts too, as an
estimate of how far the policy is from the reference), ``reads`` ("kl": the divergence must be given).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from posttrain.errors import ConfigError
from posttrain.losses.preference import positive
from posttrain.registry import Registry

unpaired_losses = Registry("unpaired loss", data="labelled answers")
valued_losses = Registry("valued loss", data="rated answers")


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Single responses, every field ``[B]``; log-probabilities are sums over trained tokens in nats, lengths in tokens.

    ``label`` bool, whether the response is good (to keep, for unlearning). ``matched`` bool, whether it answers its own
    prompt; where it does not it stands in for another prompt's, only its log-ratio is read, and its loss is 0. ``kl``,
    the mean over tokens of KL(reference || policy), where a loss reads it.
    """

    logp: Tensor
    ref_logp: Tensor
    length: Tensor
    label: Tensor
    matched: Tensor
    kl: Tensor | None = None


def log_ratio(rows: Labelled | Valued) -> Tensor:
    """``h = logp - ref_logp`` in nats, ``[B]``."""
    return rows.logp - rows.ref_logp


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """Mean where true, 0 where nothing is; a scalar."""
    return torch.where(where, values, 0.0).sum() / where.sum().clamp(min=1)


@unpaired_losses.register(
    "apo_zero_unpaired",
    paper="D'Oosterlinck et al. 2024, Anchored preference optimization and contrastive revisions, arXiv 2408.06266",
    needs=("reference",),
    at_reference=0.5,
)
def apo_zero_unpaired(rows: Labelled, *, beta: float = 0.1) -> Tensor:
    """APO-zero on single responses: ``sigmoid(-beta h)`` of good ones, ``sigmoid(beta h)`` of bad ones.

    Source: D'Oosterlinck et al. 2024, section 3.
    """
    h = beta * log_ratio(rows)
    return _of_matched(rows, torch.where(rows.label, (-h).sigmoid(), h.sigmoid()))


@unpaired_losses.register(
    "kto",
    paper="Ethayarajh et al. 2024, KTO: model alignment as prospect theoretic optimization, arXiv 2402.01306",
    needs=("reference",),
    at_reference=0.5,
    coupled=True,
    mismatched=True,
)
def kto(rows: Labelled, *, beta: float = 0.1, desirable: float = 1.0, undesirable: float = 1.0) -> Tensor:
    """KTO: ``desirable (1 - sigmoid(beta (h - z0)))`` of good responses, ``undesirable (1 - sigmoid(beta (z0 - h)))`` of bad ones.

    ``z0 = max(0, mean h of mismatched responses)`` over the whole step, without gradient: how far the policy is from the
    reference anyway. Both sides saturate, so very hard and very easy responses are let be. Keep ``desirable n_good /
    (undesirable n_bad)`` between 1 and 4/3.

    Source: Ethayarajh et al. 2024, eq. 8.
    """
    h = log_ratio(rows)
    zero = _mean(h, ~rows.matched).detach().clamp(min=0)
    good = desirable * (beta * (zero - h)).sigmoid()
    return _of_matched(rows, torch.where(rows.label, good, undesirable * (beta * (h - zero)).sigmoid()))


@unpaired_losses.register(
    "bco",
    paper="Jung et al. 2024, Binary classifier optimization for large language model alignment, arXiv 2404.04656",
    needs=("reference",),
    at_reference=math.log(2),
    coupled=True,
)
def bco(rows: Labelled, *, beta: float = 0.1) -> Tensor:
    """BCO: ``-log sigmoid(r - delta)`` of good responses, ``-log sigmoid(delta - r)`` of bad ones, ``r = beta h``.

    ``delta`` is halfway between the mean rewards of good and of bad ones over the whole step, without gradient; so a step
    should hold both.

    Source: Jung et al. 2024, eq. 12.
    """
    r = beta * log_ratio(rows)
    means = [_mean(r, rows.matched & side) for side in (rows.label, ~rows.label)]
    delta = ((means[0] + means[1]) / 2).detach()
    return _of_matched(rows, -logsigmoid(torch.where(rows.label, r - delta, delta - r)))


NPO = "Zhang et al. 2024, Negative preference optimization: from catastrophic collapse to effective unlearning, arXiv 2404.05868"


@unpaired_losses.register("npo", paper=NPO, needs=("reference",))
def npo(rows: Labelled, *, beta: float = 0.1) -> Tensor:
    """NPO: ``2 / beta log(1 + exp(beta h))`` of responses to forget (label false); those to retain are worth 0.

    The gradient with respect to ``logp`` is ``2 sigmoid(beta h)``, so that what is forgotten is let be; as ``beta`` tends
    to 0 this is gradient ascent. The reference is the model before unlearning.

    Raises:
        ConfigError: ``beta`` not above 0.

    Source: Zhang et al. 2024, eq. 3.
    """
    forget = -2 / positive("beta", beta) * logsigmoid(-beta * log_ratio(rows))
    return _of_matched(rows, torch.where(rows.label, 0.0 * rows.logp.detach(), forget))


@unpaired_losses.register("npo_nll", paper=NPO, needs=("reference",))
def npo_nll(rows: Labelled, *, beta: float = 0.1, retain: float = 1.0) -> Tensor:
    """NPO with likelihood of what is to be retained: ``- retain log pi(y) / |y|`` where the label is true.

    A mean over rows: with other than equal numbers to forget and to retain, ``retain`` is their proportion too.

    Raises:
        ConfigError: ``beta`` not above 0.

    Source: Zhang et al. 2024, section 4.
    """
    keep = -retain * rows.logp / rows.length.clamp(min=1)
    return npo(rows, beta=beta) + _of_matched(rows, torch.where(rows.label, keep, 0.0))


@unpaired_losses.register("npo_kl", paper=NPO, needs=("reference",), reads=("kl",))
def npo_kl(rows: Labelled, *, beta: float = 0.1, retain: float = 1.0) -> Tensor:
    """NPO with ``retain KL(reference || policy)``, a mean over tokens, on what is to be retained.

    Raises:
        ConfigError: ``beta`` not above 0; no ``kl`` given.

    Source: Zhang et al. 2024, section 4.
    """
    if rows.kl is None:
        raise ConfigError("npo_kl reads 'kl' of every response, got none; expected [B] values in Labelled")
    return npo(rows, beta=beta) + _of_matched(rows, torch.where(rows.label, retain * rows.kl, 0.0))


def _of_matched(rows: Labelled, loss: Tensor) -> Tensor:
    """The loss of responses to their own prompts, 0 of others."""
    return torch.where(rows.matched, loss, 0.0)


@dataclass(frozen=True, kw_only=True)
class Valued:
    """Single responses with a scalar ``reward`` and a critic's ``value`` of their prompt, every field ``[B]``."""

    logp: Tensor
    ref_logp: Tensor
    reward: Tensor
    value: Tensor


@valued_losses.register(
    "dro_v",
    paper="Richemond et al. 2024, Offline regularised reinforcement learning for large language models alignment, arXiv 2405.19107",
    needs=("reference", "value"),
)
def dro_v(rows: Valued, *, tau: float = 1.0) -> Tensor:
    """DRO-V: ``(r - V - tau h)^2 / 2``, policy and value network together.

    Its gradient with respect to ``value`` is the loss's own, ``V - r + tau h``; that with respect to ``logp`` is the loss's
    over ``tau``, ``-(r - V) + tau h``, as the paper takes it. Rewards have mean 0 and variance 1 over the data. The value is
    no baseline that could be left out.

    Raises:
        ConfigError: ``tau`` not above 0.

    Source: Richemond et al. 2024, eq. 5 and 8.
    """
    h = log_ratio(rows)
    value = 0.5 * (rows.reward - rows.value - positive("tau", tau) * h.detach()).square()
    policy = -(rows.logp * (rows.reward - rows.value).detach() - 0.5 * tau * h.square())
    return value + (policy - policy.detach())
