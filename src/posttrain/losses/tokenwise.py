"""Losses of pairs that read more of each token than its probability: positions, formats, entropies, whole distributions.

Inputs are padded ``[B, T]``; what is summed is under the mask. Facts beside those of `posttrain.losses.preference`:
``reads``, the optional fields of `TokenLogps` that a loss must be given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.errors import ConfigError
from posttrain.losses.preference import PairLogps, dpo, ipo_sum, lengths, margin
from posttrain.registry import Registry

token_losses = Registry("token-level preference loss", data="pairs")


@dataclass(frozen=True, kw_only=True)
class TokenLogps:
    """One response a row, every field ``[B, T]``.

    ``logp`` and ``ref_logp`` in nats under policy and reference, ``mask`` bool where the response's trained tokens are.
    Only where a loss reads them: ``written`` bool, tokens that are no format (headers, stop tokens); ``kl``, KL(reference
    || policy) over the vocabulary in nats; ``sum_p2``, the sum over the vocabulary of the policy's squared probabilities;
    ``ref_entropy``, the reference's entropy as a share of its largest possible value ``log V``.
    """

    logp: Tensor
    ref_logp: Tensor
    mask: Tensor
    written: Tensor | None = None
    kl: Tensor | None = None
    sum_p2: Tensor | None = None
    ref_entropy: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class TokenPairs:
    """The tokens of chosen and rejected responses, a pair a row."""

    chosen: TokenLogps
    rejected: TokenLogps


def summed(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over the masked tokens of each row, ``[B]``; values elsewhere may be anything."""
    return torch.where(mask, values, 0.0).sum(-1)


def pair_sums(pairs: TokenPairs, *, written: bool = False) -> PairLogps:
    """The sums that losses of whole responses read; over tokens that are no format only, if ``written``."""
    w, ell = pairs.chosen, pairs.rejected
    mask_w, mask_l = (side.mask & _given(side, "written") if written else side.mask for side in (w, ell))
    return PairLogps(
        chosen=summed(w.logp, mask_w),
        rejected=summed(ell.logp, mask_l),
        ref_chosen=summed(w.ref_logp, mask_w),
        ref_rejected=summed(ell.ref_logp, mask_l),
        chosen_len=mask_w.sum(-1),
        rejected_len=mask_l.sum(-1),
    )


def _given(side: TokenLogps, name: str) -> Tensor:
    """An optional field, which must be there."""
    value: Tensor | None = getattr(side, name)
    if value is None:
        raise ConfigError(f"this loss reads '{name}' of every token, got none; expected [B, T] values in TokenLogps")
    return value


def _mean(side: TokenLogps, values: Tensor) -> Tensor:
    """Mean over the masked tokens of each row, ``[B]``; 0 where there are none."""
    return summed(values, side.mask) / side.mask.sum(-1).clamp(min=1)


@token_losses.register(
    "dpo_nll_masked",
    paper="Llama team 2024, The Llama 3 herd of models, arXiv 2407.21783",
    needs=("reference",),
    reads=("written",),
)
def dpo_nll_masked(pairs: TokenPairs, *, beta: float = 0.1, weight: float = 0.2) -> Tensor:
    """Llama 3's DPO with its format mask: ``-log sigmoid(beta D_f) - weight log pi(y_w) / |y_w|``.

    ``D_f`` sums over tokens that are no format, for header and stop tokens that both responses share get conflicting
    pushes. The likelihood is over all trained tokens, so that formats are kept.

    Source: Llama team 2024, section 4.1.4; the likelihood's normalisation and mask are not stated there.
    """
    written, whole = pair_sums(pairs, written=True), pair_sums(pairs)
    return dpo(written, beta=beta) - weight * whole.chosen / lengths(whole)[0]


@token_losses.register(
    "ld_dpo",
    paper="Liu et al. 2024, Length desensitization in direct preference optimization, arXiv 2409.06411",
    needs=("reference",),
    at_reference=math.log(2),
)
def ld_dpo(pairs: TokenPairs, *, beta: float = 0.1, alpha: float = 0.5) -> Tensor:
    """Length-desensitised DPO: tokens past the shorter response's length count ``alpha``, for policy and reference alike.

    ``alpha`` 1 is DPO, 0 cuts the longer response. (Weighing the policy's tokens only, as some code does, would start from
    a margin of the tail's log-probability instead of 0.)

    Source: Liu et al. 2024, eq. 9.
    """
    shorter = torch.minimum(pairs.chosen.mask.sum(-1), pairs.rejected.mask.sum(-1))

    def weighed(side: TokenLogps) -> Tensor:
        place = side.mask.cumsum(-1)
        ratio = side.logp - side.ref_logp
        return summed(torch.where(place <= shorter[:, None], ratio, alpha * ratio), side.mask)

    return -torch.nn.functional.logsigmoid(beta * (weighed(pairs.chosen) - weighed(pairs.rejected)))


TDPO = "Zeng et al. 2024, Token-level direct preference optimization, arXiv 2404.11999"


@token_losses.register("tdpo1", paper=TDPO, needs=("reference",), reads=("kl",), at_reference=math.log(2))
def tdpo1(pairs: TokenPairs, *, beta: float = 0.1) -> Tensor:
    """TDPO1: ``-log sigmoid(beta (D - (KL_l - KL_w)))``, KL(reference || policy) summed over a response's tokens.

    Gradient flows through both divergences.

    Source: Zeng et al. 2024, eq. 14.
    """
    kl_w, kl_l = _divergences(pairs)
    return -torch.nn.functional.logsigmoid(beta * (margin(pair_sums(pairs)) - (kl_l - kl_w)))


@token_losses.register("tdpo2", paper=TDPO, needs=("reference",), reads=("kl",), at_reference=math.log(2))
def tdpo2(pairs: TokenPairs, *, beta: float = 0.1, alpha: float = 0.5) -> Tensor:
    """TDPO2: ``-log sigmoid(beta (D - alpha (KL_l - KL_w)))`` with no gradient through ``KL_w``.

    Source: Zeng et al. 2024, eq. 16.
    """
    kl_w, kl_l = _divergences(pairs)
    return -torch.nn.functional.logsigmoid(beta * (margin(pair_sums(pairs)) - alpha * (kl_l - kl_w.detach())))


def _divergences(pairs: TokenPairs) -> tuple[Tensor, Tensor]:
    """``(KL_w, KL_l)`` in nats a response, each ``[B]``."""
    w, ell = (summed(_given(side, "kl"), side.mask) for side in (pairs.chosen, pairs.rejected))
    return w, ell


def wpo_weight(pairs: TokenPairs) -> Tensor:
    """WPO's weight of a pair, ``min(1, w(y_w) w(y_l))`` with ``w(y) = exp(mean over tokens of (logp - log sum_p2))``, ``[B]``.

    How likely the policy itself is to have written the two; 1 is what its own samples have on average. No gradient.
    """
    exponents = [
        _mean(side, side.logp - _given(side, "sum_p2").clamp(min=1e-38).log())
        for side in (pairs.chosen, pairs.rejected)
    ]
    return (exponents[0] + exponents[1]).detach().clamp(max=0).exp()


@dataclass(frozen=True)
class WeightedByPolicy:
    """Any loss of pairs, weighted as `wpo` weighs DPO: ``WeightedByPolicy(preference.bound("simpo", {}))``."""

    loss: Callable[[PairLogps], Tensor]
    reads = ("sum_p2",)

    def __call__(self, pairs: TokenPairs) -> Tensor:
        """``w(y_w) w(y_l)`` times the loss, ``[B]``."""
        return wpo_weight(pairs) * self.loss(pair_sums(pairs))


@token_losses.register(
    "wpo",
    paper="Zhou et al. 2024, WPO: enhancing RLHF with weighted preference optimization, arXiv 2406.11827",
    needs=("reference",),
    reads=("sum_p2",),
)
def wpo(pairs: TokenPairs, *, beta: float = 0.01) -> Tensor:
    """WPO: ``-w log sigmoid(beta D)``, w how likely the policy is to have written the pair, `wpo_weight`.

    `WeightedByPolicy` does the same to any other loss.

    Source: Zhou et al. 2024, eq. 4 and 6.
    """
    return wpo_weight(pairs) * dpo(pair_sums(pairs), beta=beta)


MALLOWS = "Chen et al. 2024, MallowsPO: fine-tune your LLM with preference dispersions, arXiv 2405.14953"


def dispersion(pairs: TokenPairs, scale: float) -> Tensor:
    """``-scale log H``, H the reference's mean entropy a token over ``log V``, averaged over both responses; ``[B]``.

    Prompts to which answers vary little (small H) count more. H is held above 1e-6.

    Raises:
        ConfigError: an H above 1, so that entropies are no shares of ``log V``.
    """
    entropies = [_mean(side, _given(side, "ref_entropy")) for side in (pairs.chosen, pairs.rejected)]
    share = ((entropies[0] + entropies[1]) / 2).detach()
    if bool((share > 1.001).any()):
        raise ConfigError(
            f"got a mean 'ref_entropy' of {float(share.max()):.3g}; expected entropies over log V, at most 1"
        )
    return -scale * share.clamp(1e-6, 1).log()


@token_losses.register("mallows", paper=MALLOWS, needs=("reference",), reads=("ref_entropy",), at_reference=math.log(2))
def mallows(pairs: TokenPairs, *, beta: float = 0.1, scale: float = 0.29) -> Tensor:
    """MallowsPO, theta form: ``-log sigmoid(beta phi D)``, phi the prompt's `dispersion`.

    ``scale`` is such that phi is 1 on average, which depends on data and reference.

    Source: Chen et al. 2024, eq. 13.
    """
    return dpo(_scaled(pairs, scale), beta=beta)


@token_losses.register("mallows_ipo", paper=MALLOWS, needs=("reference",), reads=("ref_entropy",), at_reference=25.0)
def mallows_ipo(pairs: TokenPairs, *, tau: float = 0.1, scale: float = 0.29) -> Tensor:
    """MallowsPO, theta form, with IPO's function: ``(phi D - 1 / (2 tau))^2``.

    Raises:
        ConfigError: ``tau`` not above 0.

    Source: Chen et al. 2024, section 3.
    """
    return ipo_sum(_scaled(pairs, scale), tau=tau)


def _scaled(pairs: TokenPairs, scale: float) -> PairLogps:
    """The pair's sums times its dispersion, so that their margin is ``phi D``."""
    sums, phi = pair_sums(pairs), dispersion(pairs, scale)
    return PairLogps(
        chosen=phi * sums.chosen,
        rejected=phi * sums.rejected,
        ref_chosen=phi * sums.ref_chosen,
        ref_rejected=phi * sums.ref_rejected,
        chosen_len=sums.chosen_len,
        rejected_len=sums.rejected_len,
    )
