"""A trained reward model as a reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from posttrain.forest import Batch, Branch, Row, build_forest, split
from posttrain.models.policy import Model, forward_stats, hidden_states
from posttrain.rewards.base import Completion, Reward, Score


def score_rows(
    model: Model, rows: Sequence[Row], *, max_tokens: int = 1024, on_done: Callable[[int], None] | None = None
) -> list[list[float]]:
    """Score every branch of every row at its last token, each prompt computed once; one list a row."""
    batch = Batch(build_forest(rows), {}, {}, {})
    scores: list[float] = []
    with torch.no_grad():
        for part in split(batch, max_tokens, whole_groups=False):
            scores.extend(forward_stats(model, part.forest, frozenset({"score"}))["score"].tolist())
            if on_done is not None:
                on_done(len(scores))
    out: list[list[float]] = []
    for row in rows:
        out.append([scores.pop(0) for _ in row.branches])
    return out


def features_and_scores(
    model: Model, rows: Sequence[Row], *, max_tokens: int = 1024
) -> tuple[list[NDArray[np.float64]], list[list[float]]]:
    """The trunk's states at each response's score token, ``[K, d]`` a row, and the scores; one pass."""
    batch = Batch(build_forest(rows), {}, {}, {})
    states: list[torch.Tensor] = []
    with torch.no_grad():
        for part in split(batch, max_tokens, whole_groups=False):
            states.append(hidden_states(model, part.forest).index_select(0, part.forest.end))
        flat = torch.cat(states)
        flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
        assert model.scalar is not None
        found = model.scalar(flat)[:, 0].tolist()
    ends = np.cumsum([len(row.branches) for row in rows])[:-1]
    return np.split(flat.double().numpy(), ends), [x.tolist() for x in np.split(np.array(found), ends)]


def group_rows(completions: Sequence[Completion]) -> tuple[list[Row], list[tuple[int, int]]]:
    """Rows that share each prompt, and for each completion where it went ``(row, branch)``."""
    members: dict[tuple[int, ...], list[Branch]] = {}
    order = {ids: i for i, ids in enumerate(dict.fromkeys(c.prompt_ids for c in completions))}
    places: list[tuple[int, int]] = []
    for c in completions:
        branches = members.setdefault(c.prompt_ids, [])
        places.append((order[c.prompt_ids], len(branches)))
        branches.append(Branch(c.ids, {}, c.truncated))
    return [Row(ids, members[ids]) for ids in order], places


def reward_model(model: Model, *, mean: float = 0.0, temperature: float = 1.0, max_tokens: int = 1024) -> Reward:
    """A reward that scores with a model of the policy's own tokenizer; ``mean`` is subtracted, then divided by ``temperature``.

    ``mean`` is the model's average score of demonstrations, so that those average 0 (Ouyang et al. 2022, section 3.5).
    """

    def reward(completions: Sequence[Completion]) -> list[Score]:
        rows, places = group_rows(completions)
        scores = score_rows(model, rows, max_tokens=max_tokens)
        return [Score((scores[r][b] - mean) / temperature) for r, b in places]

    return reward
