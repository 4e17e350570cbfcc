"""DPO's function of another margin: less of it for length, a fine where the chosen response falls, other divergences."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from posttrain.losses.links import LARGEST
from posttrain.losses.preference import PairLogps, log_ratios, margin, positive, preference

FDPO = "Wang et al. 2023, Beyond reverse KL: generalizing DPO with diverse divergence constraints, arXiv 2309.16240"


@preference.register(
    "r_dpo",
    paper="Park et al. 2024, Disentangling length from quality in direct preference optimization, arXiv 2403.19159",
    needs=("reference",),
)
def r_dpo(pairs: PairLogps, *, beta: float = 0.1, alpha: float = 0.01) -> Tensor:
    """Length-regularised DPO: ``-log sigmoid(beta D + alpha (|y_w| - |y_l|))``.

    ``alpha`` is in units of reward a token; above 0 a chosen response that is longer is pushed less, a shorter one more.

    Source: Park et al. 2024, eq. 9.
    """
    return -logsigmoid(beta * margin(pairs) + alpha * (pairs.chosen_len - pairs.rejected_len))


@preference.register(
    "dpop",
    paper="Pal et al. 2024, Smaug: fixing failure modes of preference optimisation with DPO-positive, arXiv 2402.13228",
    needs=("reference",),
    at_reference=math.log(2),
)
def dpop(pairs: PairLogps, *, beta: float = 0.3, lam: float = 50.0) -> Tensor:
    """DPO-positive: ``-log sigmoid(beta (D - lam max(0, -h_w)))``: a chosen response less likely than at the start is fined.

    While ``h_w < 0`` the gradient with respect to ``chosen`` is ``1 + lam`` times DPO's. The fine is a sum over tokens, so
    it grows with length.

    Source: Pal et al. 2024 (second version), eq. 3.
    """
    chosen, _ = log_ratios(pairs)
    return -logsigmoid(beta * (margin(pairs) - lam * relu(-chosen)))


@preference.register("fdpo_forward_kl", paper=FDPO, needs=("reference",), at_reference=math.log(2))
def fdpo_forward_kl(pairs: PairLogps, *, beta: float = 0.1) -> Tensor:
    """f-DPO, forward KL: ``-log sigmoid(beta (exp(-h_l) - exp(-h_w)))``.

    Responses that became unlikely weigh exponentially. Exponents end at 80, where a response has no gradient any more.

    Source: Wang et al. 2023, table 1.
    """
    chosen, rejected = log_ratios(pairs)
    return -logsigmoid(beta * (_power(rejected, 1.0) - _power(chosen, 1.0)))


@preference.register("fdpo_js", paper=FDPO, needs=("reference",), at_reference=math.log(2))
def fdpo_js(pairs: PairLogps, *, beta: float = 0.1) -> Tensor:
    """f-DPO, Jensen-Shannon: ``-log sigmoid(beta (log sigmoid(h_w) - log sigmoid(h_l)))``.

    The gradient of a response is ``sigmoid(-h)`` of DPO's: to raise a chosen one much above the reference earns nothing.

    Source: Wang et al. 2023, table 1.
    """
    chosen, rejected = log_ratios(pairs)
    return -logsigmoid(beta * (logsigmoid(chosen) - logsigmoid(rejected)))


@preference.register("fdpo_alpha", paper=FDPO, needs=("reference",), at_reference=math.log(2))
def fdpo_alpha(pairs: PairLogps, *, beta: float = 0.1, alpha: float = 0.5) -> Tensor:
    """f-DPO, alpha divergence: ``-log sigmoid(beta / alpha (exp(-alpha h_l) - exp(-alpha h_w)))``.

    ``alpha`` between 0 (DPO) and 1 (forward KL), as in the paper; elsewhere the same letter is one minus this. Exponents
    end at 80.

    Raises:
        ConfigError: ``alpha`` not above 0.

    Source: Wang et al. 2023, table 1.
    """
    (chosen, rejected), rate = log_ratios(pairs), positive("alpha", alpha)
    return -logsigmoid(beta / rate * (_power(rejected, rate) - _power(chosen, rate)))


def _power(log_ratio: Tensor, rate: float) -> Tensor:
    """``exp(-rate h)``, the exponent at most `LARGEST`."""
    return (-rate * log_ratio).clamp(max=LARGEST).exp()
