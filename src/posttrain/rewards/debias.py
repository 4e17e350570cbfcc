"""Taking length out of scores afterwards: the residual of a regression on length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from posttrain.errors import ConfigError
from posttrain.rewards.base import Completion, Reward, Score


@dataclass(frozen=True, slots=True)
class LengthSlope:
    """What a character of an answer is worth to a reward model, and the length at which nothing is taken off."""

    slope: float
    length: float


def fit_length_slope(scores: Sequence[ArrayLike], lengths: Sequence[ArrayLike]) -> LengthSlope:
    """Regress score on length in characters within prompts: ``sum (s - s_g)(l - l_g) / sum (l - l_g)^2``, g the prompt's mean.

    Within prompts, so that prompts that ask for long answers don't count.

    Args:
        scores: one row a prompt, of at least one with answers of differing length.
        lengths: one row a prompt.

    Raises:
        ConfigError: rows that differ in length, or lengths that never vary within a prompt.
    """
    if [np.size(s) for s in scores] != [np.size(n) for n in lengths]:
        raise ConfigError("scores and lengths differ; expected one length a score")
    product = square = 0.0
    for score, length in zip(scores, lengths, strict=True):
        s, n = np.asarray(score, dtype=np.float64), np.asarray(length, dtype=np.float64)
        product += float((s - s.mean()) @ (n - n.mean()))
        square += float((n - n.mean()) @ (n - n.mean()))
    if square == 0:
        raise ConfigError("lengths never vary within a prompt; expected answers of differing length")
    return LengthSlope(product / square, float(np.concatenate([np.atleast_1d(n) for n in lengths]).mean()))


def residual(scores: ArrayLike, lengths: ArrayLike, fitted: LengthSlope) -> np.ndarray:
    """``s - slope (l - length)``, elementwise."""
    return np.asarray(scores, dtype=np.float64) - fitted.slope * (np.asarray(lengths, dtype=np.float64) - fitted.length)


def without_length(reward: Reward, fitted: LengthSlope) -> Reward:
    """A reward less what length alone is worth to it; what was taken off is logged."""

    def debiased(completions: Sequence[Completion]) -> list[Score]:
        out: list[Score] = []
        for c, s in zip(completions, reward(completions), strict=True):
            taken = fitted.slope * (len(c.text) - fitted.length)
            value = None if s.value is None else s.value - taken
            out.append(Score(value, {**s.parts, "length": -taken}, s.steps))
        return out

    return debiased
