"""Which tokens a score comes from: integrated gradients, whose sum is the score's difference to a blank answer's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posttrain.errors import ConfigError, ModelError
from posttrain.forest import Branch, Forest, Row, build_forest
from posttrain.models import lora as adapters
from posttrain.models.attention import forest_layout
from posttrain.models.policy import Model


@dataclass(frozen=True)
class Attribution:
    """What each token of prompt and answer adds to the score.

    Attributes:
        tokens: ``[prompt + answer]`` contributions, prompt first.
        score: of the answer.
        blank: the score of the same ids with the answer's content blanked.
        error: ``|sum of tokens - (score - blank)| / |score - blank|``.
        points: where on the path gradients were taken.
    """

    tokens: list[float]
    score: float
    blank: float
    error: float
    points: int


def attribute(
    model: Model,
    prompt: Sequence[int],
    answer: Sequence[int],
    *,
    blank: int,
    keep: Sequence[bool] | None = None,
    tolerance: float = 0.05,
    most: int = 512,
) -> Attribution:
    """Integrated gradients of the score along the straight path from a blank answer's embeddings to the answer's.

    ``a_t = (e_t - b_t) . integral_0^1 d score / d e_t at b + u (e - b) du``, by Gauss-Legendre points, doubled from 16 until
    the sum agrees with the difference of the scores within ``tolerance``. Only blanked tokens can contribute.

    Args:
        model: a reward role; computed in its own dtype, so give one in fp32.
        prompt: ids.
        answer: ids with the stop token.
        blank: the id that stands for nothing said, such as the tokenizer's pad token or a space.
        keep: for each answer token whether it stays in the blank answer; None keeps the last one (the stop token).
        tolerance: of the completeness error.
        most: points at most.

    Raises:
        ConfigError: a ``keep`` of another length, or one that blanks nothing.
        ModelError: the sum still disagrees at ``most`` points.

    Source: Sundararajan et al. 2017, arXiv 1703.01365, eq. 1 and section 5.
    """
    kept = [False] * (len(answer) - 1) + [True] if keep is None else list(keep)
    if len(kept) != len(answer) or all(kept):
        raise ConfigError(f"'keep' has {len(kept)} entries for {len(answer)} tokens; expected one each, not all true")
    empty = [t if k else blank for t, k in zip(answer, kept, strict=True)]
    embed: Any = model.net.get_input_embeddings()
    with torch.no_grad():
        full, base = (embed(torch.tensor([*prompt, *ids])) for ids in (answer, empty))
        score, blanked = (float(_scores(model, x[None], prompt, answer)[0]) for x in (full, base))
    difference, points = score - blanked, 16
    if difference == 0:
        return Attribution([0.0] * len(full), score, blanked, 0.0, 0)
    while True:
        parts = (_mean_gradient(model, base, full, prompt, answer, points) * (full - base).double()).sum(-1)
        error = abs(float(parts.sum()) - difference) / abs(difference)
        if error <= tolerance:
            return Attribution(parts.tolist(), score, blanked, error, points)
        if points * 2 > most:
            raise ModelError(
                f"contributions add up to {float(parts.sum()):.4f} of a difference of {difference:.4f} at {points} points; "
                "raise most, or take another blank token"
            )
        points *= 2


def _mean_gradient(
    model: Model, base: Tensor, full: Tensor, prompt: Sequence[int], answer: Sequence[int], points: int
) -> Tensor:
    """``[T, d]`` the gradient's mean along the path, in float64."""
    at, weight = np.polynomial.legendre.leggauss(points)
    total = torch.zeros(base.shape, dtype=torch.float64)
    for start in range(0, points, 16):
        u = torch.tensor((at[start : start + 16] + 1) / 2, dtype=base.dtype)[:, None, None]
        w = torch.tensor(weight[start : start + 16] / 2)[:, None, None]
        path = (base + u * (full - base)).detach().requires_grad_()
        (slope,) = torch.autograd.grad(_scores(model, path, prompt, answer).sum(), path)
        total += (slope.double() * w).sum(0)
    return total


def _scores(model: Model, embedded: Tensor, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Scores ``[S]`` of sequences given as embeddings ``[S, T, d]``, packed like any forest."""
    assert model.scalar is not None
    forest: Forest = build_forest([Row(prompt, [Branch(answer, {})])] * len(embedded))
    wide = torch.promote_types(embedded.dtype, torch.float32)
    with adapters.active(model.net, model.adapter):
        if model.plain:
            places = torch.arange(embedded.shape[1])
            states = [model.trunk(inputs_embeds=x[None], position_ids=places[None], use_cache=False) for x in embedded]
            ends = torch.stack([s.last_hidden_state[0, -1] for s in states])
        else:
            flat = embedded.reshape(1, -1, embedded.shape[-1])
            layout = forest_layout(forest)
            found = model.trunk(inputs_embeds=flat, position_ids=forest.positions[None], use_cache=False, layout=layout)
            ends = found.last_hidden_state[0].index_select(0, forest.end)
    return model.scalar(ends.to(wide))[:, 0]
