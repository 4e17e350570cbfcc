"""Preferences made while training: fresh samples, scored, put in order, as the batches that offline data gives.

A `RolloutSource` samples, scores and journals; what it makes of a group here is a pair, a ranking or labelled answers, whatever
the objective's loss reads. So any loss of preferences trains online through its own objective.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from posttrain.errors import ConfigError, RewardError
from posttrain.forest import Batch, Branch, Row
from posttrain.losses import explored_losses, listwise_losses, unpaired_losses, valued_losses
from posttrain.losses.games import win_rates
from posttrain.rewards.base import Completion
from posttrain.train.estimates import records, sample_means
from posttrain.train.rollout_plan import Group
from posttrain.train.rollouts import RolloutSource
from posttrain.train.sources import DataSource, response_source, with_mismatched


@dataclass(frozen=True)
class Arranged:
    """Which of a prompt's responses are trained on, in this order, and numbers of each by column."""

    places: tuple[int, ...]
    columns: Mapping[str, tuple[float, ...]]


def opponent(objective: Any) -> str:
    """Whom the loss wants a sample of beside the policy's: "reference", "mixture" of both, or "" for the policy alone."""
    return objective.facts.get("opponent", "")


def arrange(objective: Any, scores: Sequence[float | None], *, compared: bool = False) -> Arranged | None:
    """What a loss learns from the responses to one prompt; None where their scores leave nothing to learn.

    A loss of pairs gets the best over the worst, ties in favour of the earlier; one of lists all that have a score. Scores are
    turned into what the loss reads: win rates among the prompt's responses where it reads those. ``compared``: scores are
    probabilities to beat the prompt's other responses already.

    Raises:
        ConfigError: a loss that learns from something else.
    """
    if objective.registry is valued_losses:
        raise ConfigError(
            f"'{objective.loss}' learns a value network from answers with ratings; use the stage PreferLabelled"
        )
    known = [k for k, s in enumerate(scores) if s is not None]
    given = [float(s) for s in scores if s is not None]
    if opponent(objective) and len(known) < len(scores):
        return None
    if opponent(objective) == "mixture":
        return Arranged((0,), {"score": (given[0] if compared else _sigmoid(given[0] - given[1]),), "rank": (0,)})
    if len(set(given)) < 2:
        return None
    better, worse = given.index(max(given)), given.index(min(given))
    picked = range(len(given)) if objective.registry is listwise_losses else [better, worse]
    order = sorted(set(given), reverse=True)
    rank = tuple(order.index(given[i]) if len(picked) > 2 else int(i == worse) for i in picked)
    columns: dict[str, tuple[float, ...]] = {"rank": rank}
    if objective.registry is explored_losses:
        columns["explored"] = tuple(int(known[i] > 0) for i in picked)
    if objective.registry is unpaired_losses:
        columns = {"label": tuple(int(i == better) for i in picked)}
    meaning = objective.facts.get("scores")
    if meaning is not None:
        read = {"score": given, "win rate": _rates(given, compared), "rank": [-float(order.index(s)) for s in given]}
        columns["score"] = tuple(read[meaning][i] for i in picked)
    return Arranged(tuple(known[i] for i in picked), columns)


def _sigmoid(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float64).sigmoid())


def _rates(scores: Sequence[float], compared: bool) -> list[float]:
    """The probability to beat one of the prompt's responses, itself among them."""
    count = len(scores)
    if compared:
        return [(s * (count - 1) + 0.5) / count for s in scores]
    return win_rates(torch.tensor(scores, dtype=torch.float64), torch.zeros(count, dtype=torch.long)).tolist()


@dataclass
class OnlineSource(RolloutSource):
    """Preferences among fresh samples, with what the objective's loss reads.

    ``objective`` says what; ``token_columns`` gives what is known of each token of some rows beside the policy's numbers,
    ``ref_logp`` first of all. ``compared``: the reward's scores are probabilities to win. The samples of a rollout serve
    ``plan.updates`` steps, each on its own share of the prompts, so they are ``plan.updates - 1`` updates old at most. Prompts
    without an order are left out and counted. With an `opponent`, the second sample of a prompt is its, not the policy's.
    """

    objective: Any = None
    token_columns: Callable[[Sequence[Row]], Mapping[str, Sequence[Tensor]]] = lambda rows: {}
    compared: bool = False
    max_length: int = 2048
    _made: DataSource | None = None

    def metrics(self, step: int) -> Mapping[str, float]:
        """What the rollout measured, and how old the samples of this step are."""
        return {**super().metrics(step), "rollout/staleness": float(step % self.plan.updates)}

    def _estimated(self, step: int, groups: Sequence[Group]) -> Batch:
        """The rollout as one batch of rows as the data source of the same loss makes them."""
        found = [(g, a) for g in groups if (a := arrange(self.objective, g.scores, compared=self.compared)) is not None]
        if len(found) < self.plan.updates:
            raise RewardError(
                f"step {step}: of {len(groups)} prompts {len(found)} have responses of which one is better, expected at least "
                f"{self.plan.updates}; use more samples a prompt, a higher temperature, or a reward that tells them apart"
            )
        rows, columns = self._rows(found)
        self._made = response_source(rows, columns, self.token_columns(rows), per_step=len(rows), seed=0)
        self._metrics |= self._measured(groups) | {"rollout/tied": 1 - len(found) / len(groups)}
        return self._made.make_batch(range(len(rows)))

    def _rows(self, found: Sequence[tuple[Group, Arranged]]) -> tuple[list[Row], dict[str, list[list[float]]]]:
        """Rows with their columns; labelled answers are a row each, as in data."""
        rows: list[Row] = []
        columns: dict[str, list[list[float]]] = {name: [] for name in found[0][1].columns}
        for group, arranged in found:
            picked = [group.rollouts[k] for k in arranged.places]
            branches = [Branch(r.ids, {"loss": [True] * len(r.ids)}, r.truncated) for r in picked]
            each = "label" in columns
            rows += (
                [Row(picked[0].request.ids, [b]) for b in branches] if each else [Row(picked[0].request.ids, branches)]
            )
            for name, values in arranged.columns.items():
                columns[name] += [[v] for v in values] if each else [list(values)]
        if "label" in columns:
            if self.objective.facts.get("mismatched"):
                rows = with_mismatched(rows, max_length=self.max_length, seed=self.plan.seed)
                columns["label"] = [
                    [*v, *(0 for _ in r.branches[1:])] for v, r in zip(columns["label"], rows, strict=True)
                ]
            columns["matched"] = [[1, *(0 for _ in r.branches[1:])] for r in rows]
        return rows, columns

    def _cut(self, batch: Batch) -> list[Batch]:
        """Each update's share, with counts of its own."""
        assert self._made is not None
        return [self._made.make_batch(range(k, self._made.size, self.plan.updates)) for k in range(self.plan.updates)]

    def _measured(self, groups: Sequence[Group]) -> dict[str, float]:
        """Means over the policy's own samples."""
        own = slice(0, 1) if opponent(self.objective) else slice(None)
        return sample_means([replace(g, rollouts=g.rollouts[own], scores=g.scores[own]) for g in groups])

    def _records(
        self, completions: Sequence[Completion], groups: Sequence[Group], batch: Batch
    ) -> list[dict[str, Any]]:
        """A line of ``samples.jsonl`` for each response; its KL is not measured."""
        return records(completions, groups)
