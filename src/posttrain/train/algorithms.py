"""The table of policy-gradient algorithms: each is a choice of advantage, ratio, loss, KL penalty and aggregation.

This file imports no torch, so that a stage can be checked and listed at once; names are looked up in
`posttrain.losses.advantages`, `posttrain.losses.ratios`, `posttrain.losses.policy` and `posttrain.losses.aggregation`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from posttrain.errors import ConfigError, suggest
from posttrain.registry import load_object

PENALTIES = {
    "none": "",
    "reward:k1": "-kl (logp - ref_logp) in each token's reward: the gradient is that of the reverse KL(policy || reference)",
    "loss:k2": "kl d^2 / 2 in the loss: on policy its gradient is that of the reverse KL(policy || reference)",
    "loss:k3": "kl (exp(-d) - 1 + d) in the loss: its value estimates the reverse KL, on policy its gradient is that of the "
    "forward KL(reference || policy)",
}
"""Where a KL penalty can stand, and the gradient it really gives; ``d = logp - ref_logp``."""

REFUSED = {
    "loss:k1": "the expected gradient of k1 in the loss is zero; use reward:k1 or loss:k2",
    "reward:k2": "k2 in the reward is a biased penalty that is no KL; use reward:k1",
    "reward:k3": "k3 in the reward is a biased penalty that is no KL; use reward:k1",
}


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """A row of the table.

    Attributes:
        summary: one line, what is distinctive.
        paper: who and where.
        advantage, ratio, loss, aggregation: names in the registries of the four.
        penalty: a key of `PENALTIES`.
        options: keyword arguments of the loss where they differ from its own defaults.
        needs: "critic", "groups" (at least 2 responses a prompt), "reference".
        numbers: the paper's numbers, by field of `posttrain.stages.Reinforce`.
    """

    summary: str
    paper: str
    advantage: str
    loss: str
    ratio: str = "token"
    aggregation: str = "token_mean"
    penalty: str = "none"
    options: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    needs: frozenset[str] = frozenset()
    numbers: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


ALGORITHMS: dict[str, Algorithm] = {
    "ppo": Algorithm(
        summary="a critic, GAE, the clipped surrogate, KL to the start in the reward",
        paper="Schulman et al. 2017 (arXiv 1707.06347); Ouyang et al. 2022, section 3.5 and appendix C.4",
        advantage="gae",
        loss="ppo_clip",
        penalty="reward:k1",
        needs=frozenset({"critic", "reference"}),
        numbers={"kl": 0.02, "lr": 9e-6, "value_lr": 9e-6, "samples_per_prompt": 1, "updates_per_rollout": 8},
    ),
    "grpo": Algorithm(
        summary="no critic: responses are compared with the others to their prompt; KL to the start in the loss",
        paper="Shao et al. 2024 (DeepSeekMath), arXiv 2402.03300",
        advantage="group_z",
        loss="ppo_clip",
        aggregation="sequence_mean",
        penalty="loss:k3",
        needs=frozenset({"groups", "reference"}),
        numbers={"kl": 0.04, "lr": 1e-6, "samples_per_prompt": 64, "updates_per_rollout": 1},
    ),
}
"""Every algorithm, by the name that ``posttrain train`` takes."""


def find_algorithm(name: str) -> Algorithm:
    """The row of a name, or of an import string ``pkg.mod:ROW``.

    Raises:
        ConfigError: no such row.
    """
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    if ":" in name and isinstance(row := load_object(name), Algorithm):
        return row
    raise ConfigError(f"unknown algorithm '{name}'; {suggest(name, ALGORITHMS)}")


def check_penalty(penalty: str) -> None:
    """Pass a penalty of `PENALTIES`.

    Raises:
        ConfigError: it has no gradient, is no KL, would count twice, or is not known.
    """
    if penalty in REFUSED:
        raise ConfigError(f"got the KL penalty '{penalty}': {REFUSED[penalty]}")
    if "reward" in penalty and "loss" in penalty:
        raise ConfigError(f"got the KL penalty '{penalty}': in the reward and in the loss it counts twice; choose one place")
    if penalty not in PENALTIES:
        raise ConfigError(f"unknown KL penalty '{penalty}'; {suggest(penalty, PENALTIES)}")
