"""Pairs of a batch together: sorted against each other, or with a beta that the whole batch sets.

The loss of a pair depends on the others, so these are declared ``coupled`` and see a whole step at once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from posttrain.losses.preference import PairLogps, flip_rate, log_ratios, margin, preference, smoothed

AOT = "Melnyk et al. 2024, Distributional preference alignment of LLMs via optimal transport, arXiv 2406.05882"


@preference.register("aot", paper=AOT, needs=("reference",), at_reference=math.log(2), coupled=True)
def aot(pairs: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """AOT on pairs: DPO between the sorted margins of policy and of reference, ``u_(i) - v_(i)``.

    With ``u = log pi(y_w) - log pi(y_l)`` and v the reference's, each sorted over the batch. The loss stands at the pair
    that has ``u_(i)``. What it asks is that the policy's margins be larger than the reference's as a distribution; a batch
    of one is `cdpo`.

    Raises:
        ConfigError: ``label_smoothing`` below 0, or 0.5 and more.

    Source: Melnyk et al. 2024, section 3.
    """
    gap = _sorted_gap(pairs.chosen - pairs.rejected, pairs.ref_chosen - pairs.ref_rejected)
    return smoothed(beta * gap, flip_rate(label_smoothing))


@preference.register("aot_unpaired", paper=AOT, needs=("reference",), at_reference=math.log(2), coupled=True)
def aot_unpaired(pairs: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """AOT on good and bad responses that need not share a prompt: DPO between sorted ``h_w`` and sorted ``h_l``.

    As many good as bad ones. The loss stands at the good response that is compared.

    Raises:
        ConfigError: ``label_smoothing`` below 0, or 0.5 and more.

    Source: Melnyk et al. 2024, section 3.
    """
    return smoothed(beta * _sorted_gap(*log_ratios(pairs)), flip_rate(label_smoothing))


def _sorted_gap(first: Tensor, second: Tensor) -> Tensor:
    """``first`` minus the entry of ``second`` that has its place in the order; ``[B]``, in the order of ``first``."""
    place = first.argsort(stable=True)
    matched = torch.empty_like(second).index_copy(0, place, second.sort().values)
    return first - matched


@preference.register(
    "beta_dpo",
    paper="Wu et al. 2024, beta-DPO: direct preference optimization with dynamic beta, arXiv 2407.08639",
    needs=("reference",),
    at_reference=math.log(2),
    coupled=True,
)
def beta_dpo(pairs: PairLogps, *, beta: float = 0.1, alpha: float = 0.6, centre: float = 0.0) -> Tensor:
    """DPO with the batch's own beta: ``-log sigmoid(b D)``, ``b = max(1e-3, beta (1 + alpha (mean D - centre)))``.

    ``centre`` in nats is the margin's running mean, 0 before anything was seen; ``alpha`` (1/nats) belongs to margins
    without beta, as in the authors' code. b has no gradient. The running mean, and which pairs of a step are left out as
    unusual, are kept by `posttrain.train.preferences.BetaDPO`.

    Source: Wu et al. 2024, eq. 7.
    """
    gaps = margin(pairs)
    mean = gaps.detach().sum() / max(1, len(gaps))
    return -logsigmoid((beta * (1 + alpha * (mean - centre))).clamp(min=1e-3) * gaps)
