"""The reward protocol: it sees all responses of a step, so that a pairwise judge has the same type as a function of one text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Protocol

from posttrain.errors import RewardError
from posttrain.types import Example, Message


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One sampled response, as text for functions and judges and as ids for models.

    ``group`` is the index of its prompt in the step; ``truncated`` = ended by length. Of a conversation with an environment,
    ``text`` is the policy's last turn and ``turns`` are all of them after the prompt.
    """

    example: Example
    text: str
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    truncated: bool
    group: int
    turns: tuple[Message, ...] = ()


@dataclass(frozen=True)
class Score:
    """A response's reward, None = the reward abstains; ``parts`` are logged beside it.

    ``steps`` are scores of steps of reasoning, by the index in the response of each one's last token.
    """

    value: float | None
    parts: Mapping[str, float] = field(default_factory=dict[str, float])
    steps: Mapping[int, float] = field(default_factory=dict[int, float])


def kept_score(score: Score) -> Any:
    """A score as JSON has it: its value alone where there is nothing else."""
    if not score.steps and not score.parts:
        return score.value
    return {"value": score.value, "steps": list(score.steps.items()), "parts": dict(score.parts)}


def read_score(kept: Any) -> Score:
    """What `kept_score` made."""
    if not isinstance(kept, dict):
        return Score(kept)
    known: dict[str, Any] = kept
    return Score(known["value"], known.get("parts", {}), {int(k): v for k, v in known["steps"]})


class BadScore(RewardError):
    """A score that is NaN or infinite, with all that the reward was given and gave; it never becomes an advantage."""

    def __init__(self, message: str, completions: Sequence[Completion], scores: Sequence[Score]) -> None:
        super().__init__(message)
        self.completions, self.scores = list(completions), list(scores)


def require_finite(completions: Sequence[Completion], scores: Sequence[Score], who: str = "the reward gave") -> None:
    """Pass scores that are finite or None.

    Raises:
        BadScore: one is not; the message begins with ``who`` and quotes the response.
    """
    for c, s in zip(completions, scores, strict=True):
        if s.value is not None and not math.isfinite(s.value):
            raise BadScore(
                f"{who} {s.value} for {c.text[:80]!r}; expected a finite number, or None to abstain",
                completions,
                scores,
            )


class Reward(Protocol):
    """Scores completions, one score each, in their order."""

    def __call__(self, completions: Sequence[Completion]) -> list[Score]:
        """Return as many scores as completions."""
        ...


def from_function(function: Callable[[str, str], float], name: str = "function") -> Reward:
    """Make a reward of ``f(prompt text, completion text) -> float``.

    Raises (when called):
        RewardError: the function returned something that is not a finite number.
    """

    def reward(completions: Sequence[Completion]) -> list[Score]:
        scores: list[Score] = []
        for c in completions:
            value = function(c.example.prompt[-1].content, c.text)
            if not isinstance(value, Real):
                raise RewardError(f"reward '{name}' returned {value!r} for {c.text[:80]!r}; expected a finite number")
            scores.append(Score(float(value)))
        require_finite(completions, scores, f"reward '{name}' returned")
        return scores

    return reward


def weighted_sum(rewards: Mapping[str, tuple[float, Reward]]) -> Reward:
    """``sum of weight * reward``, by name; abstains where any part does, and logs every part.

    Raises (when called):
        RewardError: a part returned another number of scores than it was given completions.
    """

    def reward(completions: Sequence[Completion]) -> list[Score]:
        columns: dict[str, list[Score]] = {}
        for name, (_, part) in rewards.items():
            columns[name] = part(completions)
            if len(columns[name]) != len(completions):
                raise RewardError(f"reward '{name}' gave {len(columns[name])} scores, expected {len(completions)}")
        out: list[Score] = []
        for i in range(len(completions)):
            values = {name: column[i].value for name, column in columns.items()}
            known = {name: v for name, v in values.items() if v is not None}
            total = sum(rewards[name][0] * v for name, v in known.items()) if len(known) == len(values) else None
            out.append(Score(total, known))
        return out

    return reward
