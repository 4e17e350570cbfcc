"""How far a response is from what a reward model was trained on, and a reward that falls with that distance.

The distance is Mahalanobis' over the trunk's state at the score token, with one covariance for all responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors.numpy import load_file, save_file

from posttrain.errors import ConfigError, ModelError
from posttrain.models.policy import Model
from posttrain.rewards.base import Completion, Reward, Score
from posttrain.rewards.model import features_and_scores, group_rows

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Familiar:
    """What is familiar to a reward model.

    Attributes:
        mean: ``[d]`` of the features it was fitted to.
        whiten: ``[d, d]``, so that ``|whiten (x - mean)|`` is the distance.
        threshold: the distance under which ``quantile`` of familiar responses stay.
    """

    mean: Array
    whiten: Array
    threshold: float


def fit_familiar(features: ArrayLike, *, shrinkage: float = 1e-3, quantile: float = 0.99) -> Familiar:
    """Fit mean and covariance ``(1 - s) C + s tr(C)/d I`` to half of the features ``[N, d]``, the threshold to the others.

    With the same rows for both, and no more of them than dimensions, familiar responses never seen would all lie beyond it.

    Raises:
        ConfigError: fewer than 8 rows, a shape other than ``[N, d]``, features that aren't finite or don't vary.

    Source: Lee et al. 2018, arXiv 1807.03888 (one shared covariance).
    """
    x = np.asarray(features, dtype=np.float64)
    if x.ndim != 2 or len(x) < 8:
        raise ConfigError(f"got features of shape {x.shape}; expected [N, d] with N of at least 8 responses")
    if not np.isfinite(x).all():
        raise ConfigError("features hold numbers that are not finite; the model's states overflow")
    if not 0 < shrinkage <= 1 or not 0 < quantile < 1:
        raise ConfigError(f"got shrinkage {shrinkage}, quantile {quantile}; expected both between 0 and 1")
    fitted, held = x[::2], x[1::2]
    mean = fitted.mean(axis=0)
    centred = fitted - mean
    covariance = centred.T @ centred / len(fitted)
    scale = float(np.trace(covariance)) / x.shape[1]
    if scale <= 0:
        raise ConfigError("all features are equal; expected responses that differ")
    values, vectors = np.linalg.eigh((1 - shrinkage) * covariance + shrinkage * scale * np.eye(x.shape[1]))
    whiten = vectors.T / np.sqrt(values)[:, None]
    found = Familiar(mean, whiten, 0.0)
    return Familiar(mean, whiten, float(np.quantile(distance(found, held), quantile)))


def distance(familiar: Familiar, features: ArrayLike) -> Array:
    """``sqrt((x - mean)' C^-1 (x - mean))`` of each row: ``[B, d] -> [B]``."""
    return np.linalg.norm((np.asarray(features, dtype=np.float64) - familiar.mean) @ familiar.whiten.T, axis=1)


def save_familiar(familiar: Familiar, path: Path) -> None:
    """Write it as safetensors."""
    tensors = {"mean": familiar.mean, "whiten": np.ascontiguousarray(familiar.whiten)}
    save_file(tensors | {"threshold": np.array([familiar.threshold])}, path)


def load_familiar(path: Path) -> Familiar:
    """Read what `save_familiar` wrote.

    Raises:
        ModelError: another kind of file.
    """
    found = load_file(path)
    if found.keys() != {"mean", "whiten", "threshold"}:
        raise ModelError(
            f"'{path}' holds {sorted(found)}; expected mean, whiten and threshold, as save_familiar writes"
        )
    return Familiar(found["mean"], found["whiten"], float(found["threshold"][0]))


def familiar_reward(
    model: Model, familiar: Familiar, *, mean: float = 0.0, penalty: float = 1.0, max_tokens: int = 1024
) -> Reward:
    """A reward ``r - mean - penalty * max(0, z - threshold)`` with z the response's distance; z is logged."""

    def reward(completions: Sequence[Completion]) -> list[Score]:
        rows, places = group_rows(completions)
        features, scores = features_and_scores(model, rows, max_tokens=max_tokens)
        far = [distance(familiar, row) for row in features]
        out: list[Score] = []
        for r, b in places:
            z = float(far[r][b])
            value = scores[r][b] - mean - penalty * max(0.0, z - familiar.threshold)
            out.append(Score(value, {"reward_model": scores[r][b] - mean, "distance": z}))
        return out

    return reward
