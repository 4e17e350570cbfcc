"""The same margin as DPO's through another function: GPO's family, RSO's two forms, EXO on pairs.

With ``z`` the scaled margin, a loss is ``f(z)``: its slope at 0 says how hard a pair is pushed at the start, its tails what
becomes of pairs that are far right or far wrong.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from posttrain.losses.preference import PairLogps, flip_rate, margin, preference

GPO = "Tang et al. 2024, Generalized preference optimization: a unified approach to offline alignment, arXiv 2402.05749"
RSO = "Liu et al. 2023, Statistical rejection sampling improves preference optimization, arXiv 2309.06657"
LARGEST = 80.0
"""The largest exponent that is taken; ``exp`` of it still is a number in fp32."""


@preference.register("gpo_logistic", paper=GPO, needs=("reference",), at_reference=math.log(2))
def gpo_logistic(pairs: PairLogps, *, beta: float = 0.1) -> Tensor:
    """GPO, logistic: ``log(1 + exp(-beta D))``, which is DPO.

    Source: Tang et al. 2024, table 1.
    """
    return -logsigmoid(beta * margin(pairs))


@preference.register("gpo_exponential", paper=GPO, needs=("reference",), at_reference=1.0)
def gpo_exponential(pairs: PairLogps, *, beta: float = 0.1) -> Tensor:
    """GPO, exponential: ``exp(-beta D)``.

    Pairs that are far wrong dominate the batch. The exponent ends at 80, where a pair has no gradient any more.

    Source: Tang et al. 2024, table 1.
    """
    return (-beta * margin(pairs)).clamp(max=LARGEST).exp()


@preference.register("gpo_squared", paper=GPO, needs=("reference",), at_reference=1.0)
def gpo_squared(pairs: PairLogps, *, beta: float = 0.1) -> Tensor:
    """GPO, squared: ``(beta D - 1)^2``, which is `ipo_sum` times ``beta^2`` with ``tau = beta / 2``.

    Source: Tang et al. 2024, table 1.
    """
    return (beta * margin(pairs) - 1).square()


@preference.register("gpo_hinge", paper=GPO, needs=("reference",), at_reference=1.0)
def gpo_hinge(pairs: PairLogps, *, beta: float = 0.1) -> Tensor:
    """GPO, hinge: ``max(0, 1 - beta D)``; no gradient past ``D = 1 / beta``.

    Source: Tang et al. 2024, table 1.
    """
    return relu(1 - beta * margin(pairs))


@preference.register("gpo_truncated_quadratic", paper=GPO, needs=("reference",), at_reference=1.0)
def gpo_truncated_quadratic(pairs: PairLogps, *, beta: float = 0.1) -> Tensor:
    """GPO, truncated quadratic: ``max(0, 1 - beta D)^2``; the squared loss that lets larger margins be.

    Source: Tang et al. 2024, table 1.
    """
    return relu(1 - beta * margin(pairs)).square()


@preference.register("gpo_savage", paper=GPO, needs=("reference",), at_reference=0.25)
def gpo_savage(pairs: PairLogps, *, beta: float = 0.1) -> Tensor:
    """GPO, Savage: ``sigmoid(-beta D)^2``, between 0 and 1.

    Not convex: pairs that are far wrong have next to no gradient, so that wrong labels are given up.

    Source: Tang et al. 2024, table 1.
    """
    return (-beta * margin(pairs)).sigmoid().square()


@preference.register("rso_hinge", paper=RSO, needs=("reference",), at_reference=1.0)
def rso_hinge(pairs: PairLogps, *, gamma: float = 0.05) -> Tensor:
    """RSO, hinge-norm: ``max(0, 1 - gamma D)``, for pairs that were sampled by rejection.

    ``gamma`` (1/nats) belongs to the loss alone; the sampler has its own beta. "Norm" means against the reference, not by
    length.

    Source: Liu et al. 2023, section 3.3.
    """
    return relu(1 - gamma * margin(pairs))


@preference.register("rso_sigmoid", paper=RSO, needs=("reference",), at_reference=math.log(2))
def rso_sigmoid(pairs: PairLogps, *, gamma: float = 0.05) -> Tensor:
    """RSO, sigmoid-norm: ``-log sigmoid(gamma D)``, DPO on pairs that were sampled by rejection.

    Source: Liu et al. 2023, section 3.3.
    """
    return -logsigmoid(gamma * margin(pairs))


@preference.register(
    "exo",
    paper="Ji et al. 2024, Towards efficient exact optimization of language model alignment, arXiv 2402.00856",
    needs=("reference",),
    at_reference=-math.log(2) - 0.5 * (math.log(1 - 1e-3) + math.log(1e-3)),
)
def exo(pairs: PairLogps, *, beta: float = 0.5, label_smoothing: float = 1e-3) -> Tensor:
    """EXO on pairs: ``KL(q || (1 - e, e))`` with ``q = softmax(beta h)`` over the two responses.

    That is ``sigmoid(z) (log sigmoid(z) - log(1 - e)) + sigmoid(-z) (log sigmoid(-z) - log e)``, 0 at ``z = log((1 - e) /
    e)``. The gradient in z, ``sigmoid(z) sigmoid(-z) (z - log((1 - e) / e))``, vanishes for pairs that are far wrong too.

    Raises:
        ConfigError: ``label_smoothing`` below 1e-9, or 0.5 and more; at 0 the divergence is infinite.

    Source: Ji et al. 2024, eq. 15.
    """
    z, e = beta * margin(pairs), flip_rate(label_smoothing, least=1e-9)
    chosen, rejected = logsigmoid(z), logsigmoid(-z)
    return chosen.exp() * (chosen - math.log1p(-e)) + rejected.exp() * (rejected - math.log(e))
