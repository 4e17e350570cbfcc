"""Losses of K scored responses to one prompt: any number of them, one loss a prompt ``[G]``.

Fact ``scores``: what ``score`` is, "score" (a reward model's, in its own units), "win rate" (the probability to beat a
response of the reference) or "rank" (higher is better, only the order counts).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from posttrain.losses.preference import positive
from posttrain.ops.masked import segment_sum
from posttrain.registry import Registry

listwise_losses = Registry("listwise loss", data="lists")


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Responses with scores, every field ``[B]``; ``group`` is the index of the prompt, from 0 without gaps.

    ``logp`` and ``ref_logp`` are sums over trained tokens in nats, ``length`` in tokens.
    """

    logp: Tensor
    ref_logp: Tensor
    length: Tensor
    score: Tensor
    group: Tensor

    @property
    def prompts(self) -> int:
        """G."""
        return int(self.group.max()) + 1 if len(self.group) else 0


def log_ratio(rows: Scored) -> Tensor:
    """``h = logp - ref_logp`` in nats, ``[B]``."""
    return rows.logp - rows.ref_logp


def group_sum(rows: Scored, values: Tensor) -> Tensor:
    """Sum over each prompt's responses, ``[G]``."""
    return segment_sum(values, rows.group, rows.prompts)


def group_mean(rows: Scored, values: Tensor, where: Tensor | None = None) -> Tensor:
    """Mean over each prompt's responses (``where`` true), ``[G]``; 0 of none."""
    on = torch.ones_like(values) if where is None else where.to(values.dtype)
    return group_sum(rows, values * on) / group_sum(rows, on).clamp(min=1)


def group_log_softmax(rows: Scored, values: Tensor) -> Tensor:
    """``log softmax`` among each prompt's responses, ``[B]``."""
    if not len(values):
        return values
    largest = torch.full((rows.prompts,), -torch.inf, dtype=values.dtype, device=values.device)
    largest = largest.scatter_reduce(0, rows.group, values.detach(), "amax")
    shifted = values - largest[rows.group]
    return shifted - group_sum(rows, shifted.exp()).log()[rows.group]


def group_kl(rows: Scored, first: Tensor, second: Tensor) -> Tensor:
    """``KL(softmax first || softmax second)`` among each prompt's responses, ``[G]`` in nats."""
    p, q = group_log_softmax(rows, first), group_log_softmax(rows, second)
    return group_sum(rows, p.exp() * (p - q))


NCA = "Chen et al. 2024, Noise contrastive alignment of language models with explicit rewards, arXiv 2402.05369"


@listwise_losses.register("info_nca", paper=NCA, needs=("reference",), scores="score")
def info_nca(rows: Scored, *, beta: float = 0.01, temperature: float = 1.0) -> Tensor:
    """InfoNCA: ``-sum_k q_k log softmax(beta h)_k`` with ``q = softmax(score / temperature)``.

    Only differences between the responses count. With two of them and a small ``temperature`` (in units of the scores) this
    is DPO.

    Raises:
        ConfigError: ``temperature`` not above 0.

    Source: Chen et al. 2024, eq. 9.
    """
    q = group_log_softmax(rows, rows.score / positive("temperature", temperature)).exp()
    return -group_sum(rows, q * group_log_softmax(rows, beta * log_ratio(rows)))


@listwise_losses.register("nca_k", paper=NCA, needs=("reference",), scores="score")
def nca_k(rows: Scored, *, beta: float = 0.01, temperature: float = 1.0) -> Tensor:
    """NCA of K responses: ``-sum_k (q_k log sigmoid(beta h_k) + log sigmoid(-beta h_k) / K)``, q as `info_nca`'s.

    Each response's own likelihood is held, so that good ones do not sink.

    Raises:
        ConfigError: ``temperature`` not above 0.

    Source: Chen et al. 2024, eq. 14.
    """
    q = group_log_softmax(rows, rows.score / positive("temperature", temperature)).exp()
    r = beta * log_ratio(rows)
    return -group_sum(rows, q * logsigmoid(r)) - group_mean(rows, logsigmoid(-r))


@listwise_losses.register(
    "exo_rw",
    paper="Ji et al. 2024, Towards efficient exact optimization of language model alignment, arXiv 2402.00856",
    needs=("reference",),
    scores="score",
)
def exo_rw(rows: Scored, *, beta: float = 0.5, temperature: float = 0.5) -> Tensor:
    """EXO with rewards: ``KL(softmax(beta h) || softmax(score / temperature))``, the model first.

    Raises:
        ConfigError: ``temperature`` not above 0.

    Source: Ji et al. 2024, eq. 12.
    """
    return group_kl(rows, beta * log_ratio(rows), rows.score / positive("temperature", temperature))


@listwise_losses.register(
    "reward_aware_po_k",
    paper="Sun et al. 2025, Reward-aware preference optimization, arXiv 2502.00203",
    needs=("reference",),
    scores="score",
)
def reward_aware_po_k(rows: Scored, *, beta: float = 0.2, eta: float = 1.0) -> Tensor:
    """Reward-aware PO of K responses: ``KL(softmax(eta score) || softmax(beta h))``, the target first.

    With two responses this is `posttrain.losses.judged.reward_aware_po`; it is `info_nca` less the target's entropy.

    Source: Sun et al. 2025.
    """
    return group_kl(rows, eta * rows.score, beta * log_ratio(rows))


@listwise_losses.register(
    "d2o",
    paper="Duan et al. 2024, Negating negatives: alignment with human negative samples via distributional dispreference optimization, "
    "arXiv 2403.03419",
    needs=("reference",),
    scores="rank",
)
def d2o(rows: Scored, *, beta: float = 0.1, alpha: float = 0.1) -> Tensor:
    """D2O: ``-log sigmoid(beta mean_i h(y_i) - alpha h(y_l))``, the model's own samples against a human negative.

    The negative is the response with a prompt's lowest score; the others are samples of the reference, which need not be
    good.

    Source: Duan et al. 2024, eq. 6.
    """
    h, score = log_ratio(rows), rows.score
    lowest = torch.full((rows.prompts,), torch.inf, dtype=score.dtype, device=score.device)
    lowest = lowest.scatter_reduce(0, rows.group, score, "amin")
    negative = score == lowest[rows.group]
    return -logsigmoid(beta * group_mean(rows, h, ~negative) - alpha * group_mean(rows, h, negative))
