"""Pairs without a reference: what is compared are the policy's own log-probabilities, sums first, then means."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from posttrain.losses.preference import PairLogps, lengths, mean_nll, preference

CPO = "Xu et al. 2024, Contrastive preference optimization, arXiv 2401.08417"


@preference.register(
    "slic",
    paper="Zhao et al. 2023, SLiC-HF: sequence likelihood calibration with human feedback, arXiv 2305.10425",
    needs=(),
)
def slic(pairs: PairLogps, *, delta: float = 1.0, lam: float = 0.1) -> Tensor:
    """SLiC-HF: ``max(0, delta - log pi(y_w) + log pi(y_l)) - lam log pi(y_w)``, the chosen response as the one to imitate.

    Log-probabilities are sums in nats, so ``delta`` is one too. The likelihood term is what holds the policy.

    Source: Zhao et al. 2023, eq. 1.
    """
    return relu(delta - pairs.chosen + pairs.rejected) - lam * pairs.chosen


@preference.register("cpo", paper=CPO, needs=())
def cpo(pairs: PairLogps, *, beta: float = 0.1, lam: float = 1.0) -> Tensor:
    """CPO: ``-log sigmoid(beta (log pi(y_w) - log pi(y_l))) - lam log pi(y_w) / |y_w|``: DPO under a uniform reference.

    The likelihood is a mean over the response's tokens, as in the authors' code; `cpo_sum` has the paper's sum.

    Source: Xu et al. 2024, eq. 5.
    """
    return -logsigmoid(beta * (pairs.chosen - pairs.rejected)) + lam * mean_nll(pairs)


@preference.register("cpo_sum", paper=CPO, needs=())
def cpo_sum(pairs: PairLogps, *, beta: float = 0.1, lam: float = 1.0) -> Tensor:
    """CPO as printed: ``-log sigmoid(beta (log pi(y_w) - log pi(y_l))) - lam log pi(y_w)``.

    Source: Xu et al. 2024, eq. 5.
    """
    return -logsigmoid(beta * (pairs.chosen - pairs.rejected)) - lam * pairs.chosen


@preference.register(
    "simpo",
    paper="Meng et al. 2024, SimPO: simple preference optimization with a reference-free reward, arXiv 2405.14734",
    needs=(),
    per_token=True,
)
def simpo(pairs: PairLogps, *, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """SimPO: ``-log sigmoid(beta (log pi(y_w) / |y_w| - log pi(y_l) / |y_l|) - gamma)``.

    ``gamma`` is the margin that is asked for, in the units of ``beta`` times nats a token; the authors' code gives ``gamma
    / beta`` instead. Nothing bounds the drift: learning rates above 1e-5 collapse.

    Source: Meng et al. 2024, eq. 6.
    """
    chosen_len, rejected_len = lengths(pairs)
    return -logsigmoid(beta * (pairs.chosen / chosen_len - pairs.rejected / rejected_len) - gamma)


@preference.register(
    "orpo",
    paper="Hong et al. 2024, ORPO: monolithic preference optimization without reference model, arXiv 2403.07691",
    needs=(),
    per_token=True,
)
def orpo(pairs: PairLogps, *, lam: float = 0.1) -> Tensor:
    """ORPO: ``-p_w - lam log sigmoid(log odds(p_w) - log odds(p_l))``, p mean log-probabilities, ``odds = P / (1 - P)``.

    The likelihood counts response tokens only, each sequence by its own length. ``1 / (1 - P)`` amplifies the gradient as
    P nears 1; P is held below ``1 - 1e-7``.

    Source: Hong et al. 2024, eq. 6 and 7.
    """
    chosen_len, rejected_len = lengths(pairs)
    chosen, rejected = pairs.chosen / chosen_len, pairs.rejected / rejected_len
    log_odds = chosen - rejected - log1mexp(chosen) + log1mexp(rejected)
    return -chosen - lam * logsigmoid(log_odds)


def log1mexp(logp: Tensor) -> Tensor:
    """``log(1 - exp(logp))`` for log-probabilities, which are taken to be at most -1e-7; any shape."""
    below = logp.clamp(max=-1e-7)
    near = below > -0.6931471805599453
    small, large = (
        torch.where(near, below, -1.0),
        torch.where(near, -1.0, below),
    )  # neither branch sees what it can't take
    return torch.where(near, (-small.expm1()).log(), (-large.exp()).log1p())
