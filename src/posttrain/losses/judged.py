"""Losses of pairs that come with more than an order: scores of both responses, or which one was sampled to explore."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from posttrain.losses.preference import PairLogps, dpo, margin
from posttrain.registry import Registry

scored_losses = Registry("scored preference loss", data="pairs")
explored_losses = Registry("exploring preference loss", data="fresh samples")

RPO = "Nvidia 2024, Nemotron-4 340B, arXiv 2406.11704; Sun et al. 2025, Reward-aware preference optimization, arXiv 2502.00203"


@dataclass(frozen=True, kw_only=True)
class ScoredPairs:
    """Pairs with a score of each response, ``[B]``, without gradient; which is better need not agree with the scores.

    Fact ``scores`` of a loss: "score" (a reward model's, in its own units) or "win rate" (a probability).
    """

    pairs: PairLogps
    chosen_score: Tensor
    rejected_score: Tensor


def kl_bernoulli(first: Tensor, second: Tensor) -> Tensor:
    """``KL(Bernoulli(sigmoid first) || Bernoulli(sigmoid second))`` in nats, of logits of any shape."""
    return first.sigmoid() * (logsigmoid(first) - logsigmoid(second)) + (-first).sigmoid() * (
        logsigmoid(-first) - logsigmoid(-second)
    )


def _logits(scored: ScoredPairs, beta: float, eta: float) -> tuple[Tensor, Tensor]:
    """The target's and the policy's log-odds that the chosen response is the better one, each ``[B]``."""
    return eta * (scored.chosen_score - scored.rejected_score).detach(), beta * margin(scored.pairs)


@scored_losses.register("reward_aware_po", paper=RPO, needs=("reference",), scores="score")
def reward_aware_po(scored: ScoredPairs, *, beta: float = 0.2, eta: float = 1.0) -> Tensor:
    """Reward-aware PO: ``KL(target || model)`` of Bernoullis with logits ``t = eta (s_w - s_l)`` and ``z = beta D``.

    The gradient in z, ``sigmoid(z) - sigmoid(t)``, is bounded and never dies; as t grows this is DPO. Some code calls this
    direction "backward".

    Source: Nvidia 2024, section 3.3.2.
    """
    target, z = _logits(scored, beta, eta)
    return kl_bernoulli(target, z)


@scored_losses.register("reward_aware_po_model_target", paper=RPO, needs=("reference",), scores="score")
def reward_aware_po_model_target(scored: ScoredPairs, *, beta: float = 0.2, eta: float = 1.0) -> Tensor:
    """Reward-aware PO, the other direction: ``KL(model || target)``.

    Its gradient in z, ``sigmoid(z) sigmoid(-z) (z - t)``, vanishes where the model is sure, right or wrong.

    Source: Sun et al. 2025.
    """
    target, z = _logits(scored, beta, eta)
    return kl_bernoulli(z, target)


@scored_losses.register("reward_aware_po_squared", paper=RPO, needs=("reference",), scores="score")
def reward_aware_po_squared(scored: ScoredPairs, *, beta: float = 0.2, eta: float = 1.0) -> Tensor:
    """Reward-aware PO, squared: ``(beta D - eta (s_w - s_l))^2``; the units of scores matter, so ``eta`` must fit them.

    Source: Sun et al. 2025, without its factor 1/2.
    """
    target, z = _logits(scored, beta, eta)
    return (z - target).square()


@scored_losses.register(
    "dno",
    paper="Rosset et al. 2024, Direct Nash optimization: teaching language models to self-improve, arXiv 2404.03715",
    needs=("reference",),
    scores="win rate",
)
def dno(scored: ScoredPairs, *, eta: float = 0.1) -> Tensor:
    """DNO: ``-s log sigmoid(u) - (1 - s) log sigmoid(-u)``, ``s = sigmoid(r_w - r_l)`` of win rates, ``u = eta D``.

    A win rate is the probability to beat a sample of the model of the round before, which is the reference. The practical
    form of the paper is DPO on pairs with a large gap.

    Source: Rosset et al. 2024, algorithm 1.
    """
    soft = (scored.chosen_score - scored.rejected_score).detach().sigmoid()
    u = eta * margin(scored.pairs)
    return -soft * logsigmoid(u) - (1 - soft) * logsigmoid(-u)


@dataclass(frozen=True, kw_only=True)
class ExploredPairs:
    """Pairs of which one response was sampled by the reference: ``explored`` is the policy's summed log-probability of it, ``[B]``."""

    pairs: PairLogps
    explored: Tensor


@explored_losses.register(
    "xpo",
    paper="Xie et al. 2024, Exploratory preference optimization, arXiv 2405.21046",
    needs=("reference",),
    opponent="reference",
)
def xpo(given: ExploredPairs, *, beta: float = 0.1, alpha: float = 1e-5) -> Tensor:
    """XPO: ``-log sigmoid(beta D) + alpha log pi(y')``, y' the reference's sample, whichever of the two was preferred.

    What the reference already writes becomes less likely, which is the bonus for exploring.

    Source: Xie et al. 2024, algorithm 1.
    """
    return dpo(given.pairs, beta=beta) + alpha * given.explored
