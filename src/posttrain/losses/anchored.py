"""DPO with a likelihood term beside it, which holds the chosen response up: ``-log sigmoid(beta D) + weight NLL(y_w)``."""

from __future__ import annotations

from torch import Tensor

from posttrain.losses.preference import PairLogps, dpo, mean_nll, preference


@preference.register(
    "dpo_nll",
    paper="Llama team 2024, The Llama 3 herd of models, arXiv 2407.21783",
    needs=("reference",),
)
def dpo_nll(pairs: PairLogps, *, beta: float = 0.1, weight: float = 0.2) -> Tensor:
    """Llama 3's DPO: ``-log sigmoid(beta D) - weight log pi(y_w) / |y_w|``.

    Header and stop tokens that both responses share get conflicting pushes from D; the report leaves them out of it.
    `posttrain.losses.tokenwise.dpo_nll_masked` does that, and keeps them in the likelihood; here sums are as given.

    Source: Llama team 2024, section 4.1.4; the likelihood's normalisation is not stated there.
    """
    return dpo(pairs, beta=beta) + weight * mean_nll(pairs)


@preference.register(
    "iterative_rpo",
    paper="Pang et al. 2024, Iterative reasoning preference optimization, arXiv 2404.19733",
    needs=("reference",),
)
def iterative_rpo(pairs: PairLogps, *, beta: float = 0.1, alpha: float = 1.0) -> Tensor:
    """Iterative reasoning PO: ``-log sigmoid(beta D) - alpha log pi(c_w, y_w) / (|c_w| + |y_w|)``.

    A response is reasoning and answer together. Each round starts from the model before it, which is its reference.

    Source: Pang et al. 2024, eq. 1.
    """
    return dpo(pairs, beta=beta) + alpha * mean_nll(pairs)


@preference.register(
    "con_j",
    paper="Ye et al. 2024, Beyond scalar reward model: learning generative judge from preference data, arXiv 2410.03742",
    needs=("reference",),
)
def con_j(pairs: PairLogps, *, beta: float = 0.1, weight: float = 1e-3) -> Tensor:
    """Con-J, preferences between judgements: ``-log sigmoid(beta D) - weight log pi(y_w) / |y_w|``.

    The chosen judgement agrees with the label, the rejected one does not; the prompt never holds a hint. The released
    script takes the likelihood's step apart, so rarely that it is next to nothing.

    Source: Ye et al. 2024, section 3.3.
    """
    return dpo(pairs, beta=beta) + weight * mean_nll(pairs)
