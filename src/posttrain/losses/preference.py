"""Losses of a pair of responses: pure functions of sequence log-probabilities, unreduced ``[B]``.

A loss takes a `PairLogps` and keyword-only floats, which are its options in recipes and on the command line. To add
one, write the function and register it with what it needs::

    @preference.register("mine", paper="...", needs=("reference",), at_reference=1.0)
    def mine(pairs: PairLogps, *, beta: float = 0.1) -> Tensor: ...

Facts that a registration may state (`Registry.facts`): ``paper``; ``needs`` ("reference": it reads the reference's
log-probabilities, () if it has none); ``at_reference``, its value in nats on its default options where policy and
reference agree on every pair; ``coupled`` (True: a pair's loss depends on the other pairs, so that it must see a whole
step at once); ``per_token`` (True: it compares mean log-probabilities of tokens instead of sums).

In all formulas h = log-ratio ``log pi(y) - log ref(y)`` of a response, w the chosen and l the rejected one, ``D = h_w -
h_l`` their margin, ``z = beta D``, ``|y|`` the length of a response in tokens. The files of this package order the
methods so that each adds one idea: here noise in the labels and lengths, in `links` other functions of the margin, in
`margins` other margins, in `anchored` a likelihood term, in `separable` the two responses apart, in `reference_free` no
reference, in `batchwise` pairs of a batch together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from posttrain.errors import ConfigError
from posttrain.registry import AMBIGUOUS, Registry

preference = Registry("preference loss", ambiguous=AMBIGUOUS, data="pairs")


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


def log_ratios(pairs: PairLogps) -> tuple[Tensor, Tensor]:
    """``(h_w, h_l)`` in nats, each ``[B]``: log-ratio of policy to reference, of the chosen and of the rejected response."""
    return pairs.chosen - pairs.ref_chosen, pairs.rejected - pairs.ref_rejected


def margin(pairs: PairLogps) -> Tensor:
    """``(chosen - ref_chosen) - (rejected - ref_rejected)`` in nats, ``[B]``: how much more the policy prefers the chosen one."""
    chosen, rejected = log_ratios(pairs)
    return chosen - rejected


def lengths(pairs: PairLogps) -> tuple[Tensor, Tensor]:
    """``(|y_w|, |y_l|)`` in tokens, each ``[B]``; an empty response counts as one token where it divides."""
    return pairs.chosen_len.clamp(min=1), pairs.rejected_len.clamp(min=1)


def mean_margin(pairs: PairLogps) -> Tensor:
    """``h_w / |y_w| - h_l / |y_l|`` in nats a token, ``[B]``."""
    (chosen, rejected), (chosen_len, rejected_len) = log_ratios(pairs), lengths(pairs)
    return chosen / chosen_len - rejected / rejected_len


def mean_nll(pairs: PairLogps) -> Tensor:
    """``-log pi(y_w) / |y_w|`` in nats a token, ``[B]``: each sequence by its own length, whatever the batch."""
    return -pairs.chosen / lengths(pairs)[0]


def flip_rate(value: float, *, least: float = 0.0) -> float:
    """A rate at which labels are wrong, checked.

    Raises:
        ConfigError: below ``least``, or 0.5 and more, where labels would say nothing or the opposite.
    """
    if not least <= value < 0.5:
        raise ConfigError(f"option 'label_smoothing': got {value}; expected at least {least:g} and below 0.5")
    return value


def positive(name: str, value: float) -> float:
    """An option that divides, checked.

    Raises:
        ConfigError: not above 0.
    """
    if not value > 0:
        raise ConfigError(f"option '{name}': got {value}; expected a number above 0")
    return value


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


@preference.register(
    "cdpo",
    paper="Mitchell 2023, A note on DPO with noisy preferences and relationship to IPO",
    needs=("reference",),
    at_reference=math.log(2),
)
def cdpo(pairs: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """Conservative DPO: ``-(1 - e) log sigmoid(z) - e log sigmoid(-z)``, e the rate at which labels are assumed wrong.

    The gradient ``-beta (sigmoid(-z) - e)`` with respect to ``chosen`` is 0 at ``z = log((1 - e) / e)`` and pulls
    larger margins back.

    Raises:
        ConfigError: ``label_smoothing`` below 0, or 0.5 and more.

    Source: Mitchell 2023.
    """
    return smoothed(beta * margin(pairs), flip_rate(label_smoothing))


def smoothed(z: Tensor, e: float) -> Tensor:
    """``-(1 - e) log sigmoid(z) - e log sigmoid(-z)``; any shape."""
    return -(1 - e) * logsigmoid(z) - e * logsigmoid(-z)


@preference.register(
    "robust_dpo",
    paper="Ray Chowdhury et al. 2024, Provably robust DPO: aligning language models with noisy feedback, arXiv 2403.00409",
    needs=("reference",),
    at_reference=math.log(2),
)
def robust_dpo(pairs: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """Robust DPO: ``(-(1 - e) log sigmoid(z) + e log sigmoid(-z)) / (1 - 2e)``, unbiased where labels are flipped at rate e.

    Negative values are right. The loss has no minimum: its slope in z tends to ``-e / (1 - 2e)``, so that the gradient
    with respect to ``chosen``, ``-beta ((1 - e) sigmoid(-z) + e sigmoid(z)) / (1 - 2e)``, never vanishes.

    Raises:
        ConfigError: ``label_smoothing`` below 0, or 0.5 and more.

    Source: Ray Chowdhury et al. 2024, section 3.
    """
    z, e = beta * margin(pairs), flip_rate(label_smoothing)
    return (-(1 - e) * logsigmoid(z) + e * logsigmoid(-z)) / (1 - 2 * e)


@preference.register(
    "dpo_norm",
    paper="Lambert et al. 2024, Tulu 3, arXiv 2411.15124 (after Meng et al. 2024)",
    needs=("reference",),
    at_reference=math.log(2),
    per_token=True,
)
def dpo_norm(pairs: PairLogps, *, beta: float = 5.0) -> Tensor:
    """Length-normalised DPO: ``-log sigmoid(beta (h_w / |y_w| - h_l / |y_l|))``.

    A mean log-ratio is smaller than a sum by the length, so ``beta`` (tokens/nats) is larger than DPO's by about as much.

    Source: Lambert et al. 2024, section 5.
    """
    return -logsigmoid(beta * mean_margin(pairs))


@preference.register(
    "ipo",
    paper="Azar et al. 2023, A general theoretical paradigm to understand learning from human preferences, arXiv 2310.12036",
    needs=("reference",),
    at_reference=25.0,
    per_token=True,
)
def ipo(pairs: PairLogps, *, tau: float = 0.1) -> Tensor:
    """IPO on mean log-ratios: ``(h_w / |y_w| - h_l / |y_l| - 1 / (2 tau))^2``, in (nats a token)^2.

    The margin is drawn to ``1 / (2 tau)`` from both sides, so that certain labels do not push it to infinity. The
    paper's formula does not say whether log-ratios are sums or means; `ipo_sum` has sums. ``tau`` differs between the
    two by about the length.

    Raises:
        ConfigError: ``tau`` not above 0.

    Source: Azar et al. 2023, eq. 17.
    """
    return (mean_margin(pairs) - 1 / (2 * positive("tau", tau))).square()


@preference.register(
    "ipo_sum",
    paper="Azar et al. 2023, A general theoretical paradigm to understand learning from human preferences, arXiv 2310.12036",
    needs=("reference",),
    at_reference=25.0,
)
def ipo_sum(pairs: PairLogps, *, tau: float = 0.1) -> Tensor:
    """IPO on summed log-ratios: ``(D - 1 / (2 tau))^2``, in nats^2; gradient ``2 (D - 1 / (2 tau))``, unbounded.

    Raises:
        ConfigError: ``tau`` not above 0.

    Source: Azar et al. 2023, eq. 17.
    """
    return (margin(pairs) - 1 / (2 * positive("tau", tau))).square()
