"""Several reward models as one: rules that join the members' scores, and how far the members disagree."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from posttrain.errors import ConfigError
from posttrain.registry import Registry
from posttrain.rewards.base import Completion, Reward, Score

Array = NDArray[np.float64]

ensemble_rules = Registry("ensemble rule")
"""Functions of the members' scores ``[K, B]`` to one score a response ``[B]``; higher is better."""


@ensemble_rules.register("mean")
def mean(scores: Array) -> Array:
    """``mean_k r_k``: ``[K, B] -> [B]``."""
    return scores.mean(axis=0)


@ensemble_rules.register("minimum")
def minimum(scores: Array) -> Array:
    """``min_k r_k``: ``[K, B] -> [B]``; a response is worth what its harshest judge says.

    Source: Coste et al. 2024, arXiv 2310.02743, worst-case optimisation.
    """
    return scores.min(axis=0)


@ensemble_rules.register("variance")
def less_variance(scores: Array, *, penalty: float = 0.5) -> Array:
    """``mean_k r_k - penalty * var_k r_k``, the population variance: ``[K, B] -> [B]``.

    Source: Coste et al. 2024, arXiv 2310.02743, uncertainty-weighted optimisation (0.5 for best of n, 0.1 for PPO).
    """
    return scores.mean(axis=0) - penalty * scores.var(axis=0)


@ensemble_rules.register("deviation")
def less_deviation(scores: Array, *, penalty: float = 1.0) -> Array:
    """``mean_k r_k - penalty * std_k r_k``, the population standard deviation: ``[K, B] -> [B]``."""
    return scores.mean(axis=0) - penalty * scores.std(axis=0)


def disagreement(scores: ArrayLike) -> Array:
    """The members' standard deviation of each response's score: ``[K, B] -> [B]``; 0 for a single member."""
    return np.asarray(scores, dtype=np.float64).std(axis=0)


def rule(name: str, penalty: float | None = None) -> Callable[[Array], Array]:
    """Return a rule by name, with its penalty if one is given.

    Raises:
        ConfigError: an unknown rule, a penalty that is negative or that the rule does not have.
    """
    if penalty is not None and penalty < 0:
        raise ConfigError(f"got penalty {penalty}; expected 0 or more: a negative one rewards disagreement")
    return ensemble_rules.bound(name, {} if penalty is None else {"penalty": penalty})


def ensemble(members: Sequence[Reward], combine: Callable[[Array], Array] = less_variance) -> Reward:
    """A reward that joins several; it abstains where a member does, and logs each member and their disagreement.

    Members must be on one scale: models trained alike, each with the mean of the same reference answers subtracted.

    Raises:
        ConfigError: no members.
    """
    if not members:
        raise ConfigError("an ensemble without members; give at least one reward")

    def reward(completions: Sequence[Completion]) -> list[Score]:
        given = [member(completions) for member in members]
        out: list[Score] = []
        for column in zip(*given, strict=True):
            values = [s.value for s in column]
            known = [v for v in values if v is not None]
            parts = {f"member_{k}": v for k, v in enumerate(values) if v is not None}
            if len(known) < len(values):
                out.append(Score(None, parts))
                continue
            scores = np.array(known)[:, None]
            parts["disagreement"] = float(disagreement(scores)[0])
            out.append(Score(float(combine(scores)[0]), parts))
        return out

    return reward
