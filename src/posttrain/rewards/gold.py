"""A gold reward that nothing is trained on, measured beside the one that is; and a reward relative to the start's own answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from posttrain.errors import ConfigError
from posttrain.rewards.base import Completion, Reward, Score
from posttrain.rewards.combine import asked

GOLD = "gold/reward"
"""The part of a score that is the gold reward's."""
RAW = "raw"
"""The part of a relative score that is the reward itself."""


def begin(reward: Any, step: int) -> None:
    """Tell a reward whose weights move at which step it is."""
    if callable(told := getattr(reward, "begin", None)):
        told(step)


@dataclass
class WithGold:
    """A reward with another's score as the part `GOLD`, in every ``every``-th rollout; values are the reward's own.

    The gold score reaches logs and samples and nothing that is trained; where gold abstains or is not finite the part is
    absent, and `gold_metrics` says how often. Rollouts begin every ``updates`` steps.
    """

    reward: Reward
    gold: Reward
    updates: int = 1
    every: int = 1
    on: bool = True

    def begin(self, step: int) -> None:
        """What follows is scored for the rollout that begins at ``step``."""
        self.on = step // self.updates % self.every == 0
        begin(self.reward, step)
        begin(self.gold, step)

    def __call__(self, completions: Sequence[Completion]) -> list[Score]:
        """Score, and measure if it is this rollout's turn."""
        scores = asked(self.reward, completions, "reward")
        if not self.on:
            return scores
        found = asked(self.gold, completions, "gold reward")
        known = [g.value is not None and math.isfinite(g.value) for g in found]
        return [
            replace(s, parts={**s.parts, GOLD: g.value}) if k and g.value is not None else s
            for s, g, k in zip(scores, found, known, strict=True)
        ]


def gold_metrics(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean gold of responses, from the parts of their scores, and the share that has one; empty where none has."""
    values = [part[GOLD] for part in parts if GOLD in part]
    return {GOLD: sum(values) / len(values), "gold/known": len(values) / len(parts)} if values else {}


@dataclass
class Relative:
    """``r(x, y) - base(x)``: a reward less what it gave the start's own answers to the same prompt; abstains where that is unknown.

    ``base`` is by prompt key. The reward itself is the part `RAW`.

    Source: Hou et al. 2024, ChatGLM-RLHF, arXiv 2404.00934, section 4.1 (one answer of the supervised model a prompt).
    """

    reward: Reward
    base: Mapping[str, float | None]

    def begin(self, step: int) -> None:
        """Tell the reward its step."""
        begin(self.reward, step)

    def __call__(self, completions: Sequence[Completion]) -> list[Score]:
        """Score against each prompt's base.

        Raises:
            ConfigError: a prompt that has no base.
        """
        out: list[Score] = []
        for c, s in zip(completions, asked(self.reward, completions, "reward"), strict=True):
            if c.example.prompt_key not in self.base:
                raise ConfigError(
                    f"no answer of the start to {c.example.prompt[-1].content[:60]!r}; expected one a prompt"
                )
            base = self.base[c.example.prompt_key]
            if s.value is None or base is None:
                out.append(Score(None))
            else:
                out.append(Score(s.value - base, {**s.parts, RAW: s.value}, s.steps))
        return out


def mean_scores(completions: Sequence[Completion], scores: Sequence[Score]) -> dict[str, float | None]:
    """The mean score by prompt key; None where the reward abstained on all of a prompt's answers."""
    found: dict[str, list[float]] = {}
    for c, s in zip(completions, scores, strict=True):
        found.setdefault(c.example.prompt_key, []).extend([] if s.value is None else [s.value])
    return {key: sum(values) / len(values) if values else None for key, values in found.items()}
