"""The two responses apart, ``a(h_w) + b(h_l)``: each one's log-ratio has a place to go, not only their difference."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import logsigmoid

from posttrain.losses.preference import PairLogps, log_ratios, margin, positive, preference

APO = "D'Oosterlinck et al. 2024, Anchored preference optimization and contrastive revisions, arXiv 2408.06266"


@preference.register("apo_zero", paper=APO, needs=("reference",), at_reference=1.0)
def apo_zero(pairs: PairLogps, *, beta: float = 0.1) -> Tensor:
    """APO-zero: ``1 - sigmoid(beta h_w) + sigmoid(beta h_l)``: the chosen one up, the rejected one down.

    For chosen responses better than the model's own. Both terms saturate on both sides.

    Source: D'Oosterlinck et al. 2024, eq. 6.
    """
    chosen, rejected = log_ratios(pairs)
    return (-beta * chosen).sigmoid() + (beta * rejected).sigmoid()


@preference.register("apo_down", paper=APO, needs=("reference",), at_reference=1.0)
def apo_down(pairs: PairLogps, *, beta: float = 0.1) -> Tensor:
    """APO-down: ``sigmoid(beta h_w) + 1 - sigmoid(beta D)``: both down, the rejected one further.

    For chosen responses worse than the model's own.

    Source: D'Oosterlinck et al. 2024, eq. 7.
    """
    chosen, _ = log_ratios(pairs)
    return (beta * chosen).sigmoid() + (-beta * margin(pairs)).sigmoid()


@preference.register(
    "nca",
    paper="Chen et al. 2024, Noise contrastive alignment of language models with explicit rewards, arXiv 2402.05369",
    needs=("reference",),
    at_reference=2 * math.log(2),
)
def nca(pairs: PairLogps, *, beta: float = 0.01) -> Tensor:
    """NCA on pairs: ``-log sigmoid(r_w) - log sigmoid(-r_w) / 2 - log sigmoid(-r_l) / 2`` with ``r = beta h``.

    At its optimum the ratio of policy to reference is 1 on average, which keeps the chosen response from sinking: its
    gradient is 0 at ``sigmoid(r_w) = 2/3``. `posttrain.losses.listwise.nca_k` takes any number of responses with scores.

    Source: Chen et al. 2024, eq. 14 with two responses and hard labels.
    """
    chosen, rejected = (beta * h for h in log_ratios(pairs))
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


@preference.register(
    "sppo_hard",
    paper="Wu et al. 2024, Self-play preference optimization for language model alignment, arXiv 2405.00675",
    needs=("reference",),
    at_reference=500_000.0,
)
def sppo_hard(pairs: PairLogps, *, beta: float = 1e-3) -> Tensor:
    """SPPO with win rates 1 and 0: ``(h_w - 1 / (2 beta))^2 + (h_l + 1 / (2 beta))^2``, in nats^2.

    The reference is the model of the round before. Targets are hundreds of nats away, so what counts is the gradient's
    direction. `posttrain.losses.games.sppo` has win rates in between.

    Raises:
        ConfigError: ``beta`` not above 0.

    Source: Wu et al. 2024, eq. 4.5 with hard labels.
    """
    (chosen, rejected), target = log_ratios(pairs), 1 / (2 * positive("beta", beta))
    return (chosen - target).square() + (rejected + target).square()


@preference.register(
    "cal_dpo",
    paper="Xiao et al. 2024, Cal-DPO: calibrated direct preference optimization for language model alignment, arXiv 2412.14516",
    needs=("reference",),
    at_reference=math.log(2) + 500_000.0,
)
def cal_dpo(pairs: PairLogps, *, beta: float = 1e-3, lam: float = 1.0) -> Tensor:
    """Cal-DPO: ``-log sigmoid(D) + lam ((h_w - 1 / (2 beta))^2 + (h_l + 1 / (2 beta))^2)``.

    ``beta`` (1/nats) stands in the targets only, not inside the sigmoid. The squared part dominates; the released code
    halves it (``lam`` 0.5).

    Raises:
        ConfigError: ``beta`` not above 0.

    Source: Xiao et al. 2024, eq. 11.
    """
    return -logsigmoid(margin(pairs)) + lam * sppo_hard(pairs, beta=beta)
