"""KL penalties that stand in the loss: of each token, with the gradient that each really has (`posttrain.ops.kl`).

Each takes statistics of the policy and numbers of the batch, both by name, ``[M]``; the fact ``reads`` names statistics
beside ``logp``. With ``d = logp - ref_logp`` of tokens that the policy sampled, the expectation of the gradient of

    k1  is 0: it is no penalty, and not here;
    k2  is that of the reverse KL(policy || reference);
    k3  is that of the forward KL(reference || policy), although its value estimates the reverse one;
    the whole vocabulary is that of the reverse KL of the token's state, without sampling noise.

All hold where the policy is the one that sampled, at the states that it met: what a token leads to is no part of these
gradients, as it is of that of the same KL in the reward.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from posttrain.ops import kl
from posttrain.registry import Registry

penalties = Registry("KL penalty")


@penalties.register("loss:k2")
def k2(policy: Mapping[str, Tensor], tokens: Mapping[str, Tensor]) -> Tensor:
    """Half the squared log-ratio, ``d^2 / 2`` in nats; on policy the gradient of the reverse KL.

    Source: J. Schulman 2020, Approximating KL divergence.
    """
    return kl.k2(policy["logp"], tokens["ref_logp"])


@penalties.register("loss:k3")
def k3(policy: Mapping[str, Tensor], tokens: Mapping[str, Tensor]) -> Tensor:
    """``exp(-d) - 1 + d`` in nats, never negative; on policy the gradient of the forward KL.

    Source: J. Schulman 2020; Shao et al. 2024 (DeepSeekMath), eq. 4.
    """
    return kl.k3(policy["logp"], tokens["ref_logp"])


@penalties.register("loss:full", reads=("kl_to_other",))
def full(policy: Mapping[str, Tensor], tokens: Mapping[str, Tensor]) -> Tensor:
    """``sum_v pi(v) log(pi(v) / ref(v))`` in nats, over the whole vocabulary.

    Source: the definition of the reverse KL.
    """
    del tokens
    return policy["kl_to_other"]
