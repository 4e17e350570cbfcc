"""Losses of a pair of responses: pure functions of sequence log-probabilities, unreduced ``[B]``.

A loss takes a `PairLogps` and keyword-only floats, which are its options in recipes and on the command line. To add
one, write the function and register it with what it needs::

    @preference.register("mine", paper="...", needs=("reference",), at_reference=1.0)
    def mine(pairs: PairLogps, *, beta: float = 0.1) -> Tensor: ...

Facts that a registration may state (`Registry.facts`): ``paper``; ``needs`` ("reference": it reads the reference's
log-probabilities); ``at_reference``, its value in nats where policy and reference agree on every pair, which the first
step is held to; ``coupled`` (True: a pair's loss depends on the other pairs, so that it must see a whole step at once).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from posttrain.registry import Registry

preference = Registry("preference loss")


@dataclass(frozen=True, kw_only=True)
class PairLogps:
    """Summed log-probabilities of chosen and rejected responses in nats, and their lengths in tokens; every field ``[B]``.

    ``chosen`` and ``rejected`` are under the policy that is trained, ``ref_chosen`` and ``ref_rejected`` under the frozen
    reference. Sums run over the response's trained tokens, the stop token included, and so do lengths.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_len: Tensor
    rejected_len: Tensor


def margin(pairs: PairLogps) -> Tensor:
    """``(chosen - ref_chosen) - (rejected - ref_rejected)`` in nats, ``[B]``: how much more the policy prefers the chosen one."""
    return (pairs.chosen - pairs.ref_chosen) - (pairs.rejected - pairs.ref_rejected)


@preference.register(
    "dpo",
    paper="Rafailov et al. 2023, Direct preference optimization, arXiv 2305.18290",
    needs=("reference",),
    at_reference=math.log(2),
)
def dpo(pairs: PairLogps, *, beta: float = 0.1) -> Tensor:
    """DPO: ``-log sigmoid(beta D)``, D the margin of log-ratios between chosen and rejected.

    ``beta`` (1/nats) is the weight of the KL penalty that the policy would be optimal under: smaller moves further.
    Only D is held, so the log-probabilities of both responses may fall together. The gradient with respect to
    ``chosen`` is ``-beta sigmoid(-beta D)``, with respect to ``rejected`` its negative.

    Source: Rafailov et al. 2023, eq. 7.
    """
    return -logsigmoid(beta * margin(pairs))
