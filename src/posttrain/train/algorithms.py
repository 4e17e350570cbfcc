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
    "loss:full": "kl sum_v pi(v) log(pi(v) / ref(v)) in the loss, over the whole vocabulary: at each sampled state exactly the "
    "gradient of the reverse KL(policy || reference); the reference's network stays beside the policy in every step",
}
"""Where a KL penalty can stand, and the gradient it really gives; ``d = logp - ref_logp``."""

REFUSED = {
    "loss:k1": "the expected gradient of k1 in the loss is zero; use reward:k1 or loss:k2",
    "reward:k2": "k2 in the reward is a biased penalty that is no KL; use reward:k1",
    "reward:k3": "k3 in the reward is a biased penalty that is no KL; use reward:k1",
    "reward:full": "in the reward the KL of a token's state is not what the token did; use reward:k1 or loss:full",
}


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """A row of the table.

    Attributes:
        summary: one line, what is distinctive.
        paper: who and where.
        advantage, ratio, loss, aggregation: names in the registries of the four.
        penalty: a key of `PENALTIES`.
        options: keyword arguments of the loss where they differ from its own defaults.
        needs: "critic", "groups" (at least 2 responses a prompt), "pairs" (exactly 2), "reference", "greedy" (a greedy
            response a prompt), "steps" (scores of steps of reasoning).
        has: properties that tests hold it to, of its policy loss without a KL penalty: "shift" (adding a constant to the
            rewards of a prompt changes no gradient), "scale" (nor does multiplying all rewards), "flat" (responses of
            equal reward to a prompt have no gradient), "first" (before an update the gradient is that of
            ``-sum w A logp``, w the aggregation's weights).
        numbers: values of fields of `posttrain.stages.Reinforce` where none is given: the paper's, as far as it gives them.
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
    has: frozenset[str] = frozenset()
    numbers: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


_GROUP = {"samples_per_prompt": 8, "updates_per_rollout": 1, "lr": 1e-6}

ALGORITHMS: dict[str, Algorithm] = {
    "ppo": Algorithm(
        summary="a critic, GAE, the clipped surrogate, KL to the start in the reward",
        paper="Schulman et al. 2017 (arXiv 1707.06347); Ouyang et al. 2022, section 3.5 and appendix C.4",
        advantage="gae",
        loss="ppo_clip",
        penalty="reward:k1",
        needs=_set("critic reference"),
        has=_set("first"),
        numbers={"kl": 0.02, "lr": 9e-6, "value_lr": 9e-6, "samples_per_prompt": 1, "updates_per_rollout": 8},
    ),
    "ppo_dual_clip": Algorithm(
        summary="PPO whose loss is bounded where the advantage is negative",
        paper="Ye et al. 2020 (arXiv 1912.09729)",
        advantage="gae",
        loss="dual_clip",
        penalty="reward:k1",
        needs=_set("critic reference"),
        has=_set("first"),
        numbers={"kl": 0.02, "lr": 9e-6, "value_lr": 9e-6, "samples_per_prompt": 1, "updates_per_rollout": 8},
    ),
    "grpo": Algorithm(
        summary="no critic: responses are compared with the others to their prompt; KL to the start in the loss",
        paper="Shao et al. 2024 (DeepSeekMath), arXiv 2402.03300",
        advantage="group_z",
        loss="ppo_clip",
        aggregation="sequence_mean",
        penalty="loss:k3",
        needs=_set("groups reference"),
        has=_set("shift scale flat first"),
        numbers={"kl": 0.04, "lr": 1e-6, "samples_per_prompt": 64, "updates_per_rollout": 1},
    ),
    "grpo_process": Algorithm(
        summary="GRPO with a score for each step of reasoning",
        paper="Shao et al. 2024 (DeepSeekMath), section 4.1.3",
        advantage="process_z",
        loss="ppo_clip",
        aggregation="sequence_mean",
        penalty="loss:k3",
        needs=_set("groups reference steps"),
        has=_set("shift scale flat first"),
        numbers={"kl": 0.04, "lr": 1e-6, "samples_per_prompt": 64, "updates_per_rollout": 1},
    ),
    "grpo_sequence": Algorithm(
        summary="GRPO whose ratio is that of the whole response",
        paper="DeepSeek-AI 2024 (DeepSeek-V2), arXiv 2405.04434, eq. 32",
        advantage="group_z",
        loss="ppo_clip",
        ratio="sequence_product",
        aggregation="sequence_mean",
        penalty="loss:k3",
        needs=_set("groups reference"),
        has=_set("shift scale flat"),
        numbers=_GROUP | {"kl": 0.04},
    ),
    "dr_grpo": Algorithm(
        summary="GRPO without what depends on length or spread: no division by the deviation, sums over a constant",
        paper="Liu et al. 2025, Understanding R1-Zero-like training, arXiv 2503.20783",
        advantage="group_centre",
        loss="ppo_clip",
        aggregation="sequence_sum_scaled",
        needs=_set("groups"),
        has=_set("shift flat first"),
        numbers=_GROUP,
    ),
    "dapo": Algorithm(
        summary="clip-higher, tokens of equal weight, prompts sampled until groups differ, long responses punished softly",
        paper="Yu et al. 2025, arXiv 2503.14476",
        advantage="group_z",
        loss="clip_higher",
        needs=_set("groups"),
        has=_set("shift scale flat first"),
        numbers={"lr": 1e-6, "samples_per_prompt": 16, "updates_per_rollout": 16, "rounds": 10, "overlong_share": 0.2},
    ),
    "gspo": Algorithm(
        summary="the ratio is the geometric mean over the response, clipped tightly",
        paper="Zheng et al. 2025, arXiv 2507.18071",
        advantage="group_z",
        loss="clip_higher",
        ratio="sequence_mean",
        aggregation="sequence_mean",
        options={"low": 3e-4, "high": 4e-4},
        needs=_set("groups"),
        has=_set("shift scale flat first"),
        numbers=_GROUP | {"updates_per_rollout": 4},
    ),
    "cispo": Algorithm(
        summary="the ratio is a truncated weight, so that no token loses its gradient",
        paper="MiniMax 2025 (MiniMax-M1), arXiv 2506.13585",
        advantage="group_z",
        loss="cispo",
        needs=_set("groups"),
        has=_set("shift scale flat first"),
        numbers=_GROUP,
    ),
    "rloo": Algorithm(
        summary="the response is one action, against the mean of the others to its prompt",
        paper="Ahmadian et al. 2024, arXiv 2402.14740",
        advantage="leave_one_out",
        loss="reinforce",
        aggregation="sequence_sum",
        penalty="reward:k1",
        needs=_set("groups reference"),
        has=_set("shift flat first"),
        numbers={"kl": 0.03, "lr": 1e-6, "samples_per_prompt": 4, "updates_per_rollout": 1},
    ),
    "remax": Algorithm(
        summary="against the reward of the greedy response",
        paper="Li et al. 2023, arXiv 2310.10505",
        advantage="greedy",
        loss="reinforce",
        penalty="reward:k1",
        needs=_set("greedy reference"),
        has=_set("shift first"),
        numbers={"kl": 0.05, "lr": 1e-6, "samples_per_prompt": 1, "updates_per_rollout": 1},
    ),
    "reinforce_baseline": Algorithm(
        summary="returns-to-go less the group's mean score, whitened over the rollout, with PPO's clip",
        paper="OpenRLHF; Hu 2025, arXiv 2501.03262",
        advantage="centred_returns_z",
        loss="ppo_clip",
        penalty="reward:k1",
        needs=_set("groups reference"),
        has=_set("shift scale first"),
        numbers=_GROUP | {"kl": 0.01},
    ),
    "reinforce_pp": Algorithm(
        summary="REINFORCE++: returns-to-go whitened over the rollout, with PPO's clip and neither critic nor groups",
        paper="Hu 2025, arXiv 2501.03262",
        advantage="returns_z",
        loss="ppo_clip",
        penalty="reward:k1",
        needs=_set("reference"),
        has=_set("scale first"),
        numbers={"kl": 0.01, "lr": 1e-6, "samples_per_prompt": 1, "updates_per_rollout": 1},
    ),
    "reinforce_pp_baseline": Algorithm(
        summary="REINFORCE++ with scores centred in their group, and KL in the loss",
        paper="Hu 2025, arXiv 2501.03262",
        advantage="group_then_global",
        loss="ppo_clip",
        penalty="loss:k2",
        needs=_set("groups reference"),
        has=_set("shift scale first"),
        numbers=_GROUP | {"kl": 0.01},
    ),
    "apa": Algorithm(
        summary="squared distance from the initial policy tilted by the advantage; no ratio, no clip",
        paper="Zhu et al. 2023, arXiv 2306.02231",
        advantage="gae",
        loss="apa",
        needs=_set("critic reference"),
        numbers={"lr": 1e-6, "value_lr": 1e-6, "samples_per_prompt": 1, "updates_per_rollout": 2},
    ),
    "awr": Algorithm(
        summary="likelihood weighted by the exponential of the advantage",
        paper="Peng et al. 2019, arXiv 1910.00177; Zhu et al. 2023, section 5",
        advantage="gae",
        loss="awr",
        needs=_set("critic"),
        numbers={"lr": 1e-6, "value_lr": 1e-6, "samples_per_prompt": 1, "updates_per_rollout": 2},
    ),
    "p3o": Algorithm(
        summary="pairs of responses: the difference of their rewards moves the difference of their log-probabilities",
        paper="Wu et al. 2023, arXiv 2310.00212",
        advantage="pair_difference",
        loss="p3o",
        ratio="pair_product",
        aggregation="sequence_sum",
        penalty="reward:k1",
        needs=_set("pairs reference"),
        has=_set("shift flat first"),
        numbers={"kl": 0.05, "lr": 1e-6, "samples_per_prompt": 2, "updates_per_rollout": 1},
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
        raise ConfigError(
            f"got the KL penalty '{penalty}': in the reward and in the loss it counts twice; choose one place"
        )
    if penalty not in PENALTIES:
        raise ConfigError(f"unknown KL penalty '{penalty}'; {suggest(penalty, PENALTIES)}")
