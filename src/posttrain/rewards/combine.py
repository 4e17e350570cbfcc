"""Rewards made of rewards: gates, conditions, and sums whose weights change as training goes on (`weighted_sum` is in base)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from posttrain.errors import ConfigError, RewardError
from posttrain.rewards.base import Completion, Reward, Score, weighted_sum
from posttrain.types import Example


def gate(reward: Reward, by: Reward, *, least: float, otherwise: float) -> Reward:
    """``reward`` where ``by`` scores at least ``least``, else ``otherwise``; abstains where ``by`` does.

    ``reward`` is asked for what passes only; the gate's score is logged as ``gate``.
    """

    def both(completions: Sequence[Completion]) -> list[Score]:
        keys = asked(by, completions, "gate")
        open_to = [i for i, k in enumerate(keys) if k.value is not None and k.value >= least]
        inner = dict(zip(open_to, asked(reward, [completions[i] for i in open_to], "gated reward"), strict=True))
        out: list[Score] = []
        for i, key in enumerate(keys):
            if key.value is None:
                out.append(Score(None))
            else:
                found = inner.get(i, Score(otherwise))
                out.append(Score(found.value, {**found.parts, "gate": key.value}, found.steps))
        return out

    return both


def when(condition: Callable[[Example], bool], reward: Reward, otherwise: Reward | None = None) -> Reward:
    """``reward`` on prompts for which a condition holds, ``otherwise`` (None = abstain) on the rest."""

    def chosen(completions: Sequence[Completion]) -> list[Score]:
        holds = [condition(c.example) for c in completions]
        out = [Score(None)] * len(completions)
        for part, which in ((reward, True), (otherwise, False)):
            places = [i for i, h in enumerate(holds) if h == which]
            if part is not None and places:
                for i, score in zip(places, asked(part, [completions[i] for i in places], "reward"), strict=True):
                    out[i] = score
        return out

    return chosen


@dataclass
class Scheduled:
    """``sum of weight(step) * reward``, by name; the source says at which step it is (`begin`)."""

    rewards: Mapping[str, tuple[Callable[[int], float], Reward]]
    step: int = 0

    def begin(self, step: int) -> None:
        """What follows is scored for the rollout that begins at ``step``."""
        self.step = step

    def __call__(self, completions: Sequence[Completion]) -> list[Score]:
        """Score with this step's weights."""
        return weighted_sum({name: (weight(self.step), r) for name, (weight, r) in self.rewards.items()})(completions)


def ramp(first: float, last: float, *, begin: int = 0, end: int) -> Callable[[int], float]:
    """A weight that moves in a straight line from ``first`` at step ``begin`` to ``last`` at step ``end``, and stays."""
    if end <= begin:
        raise ConfigError(f"got a ramp from step {begin} to {end}; expected an end after its beginning")
    return lambda step: first + (last - first) * min(1.0, max(0.0, (step - begin) / (end - begin)))


def asked(reward: Reward, completions: Sequence[Completion], name: str) -> list[Score]:
    """A reward's scores, as many as it was given completions.

    Raises:
        RewardError: another number of them.
    """
    scores = reward(completions) if completions else []
    if len(scores) != len(completions):
        raise RewardError(f"the {name} gave {len(scores)} scores for {len(completions)} responses; expected one each")
    return scores


def with_part(reward: Reward, other: Reward, name: str) -> Reward:
    """``reward``, with another's score as the part ``name`` of each; abstains where either does."""

    def both(completions: Sequence[Completion]) -> list[Score]:
        found = zip(asked(reward, completions, "reward"), asked(other, completions, name), strict=True)
        return [
            Score(None) if s.value is None or o.value is None else Score(s.value, {**s.parts, name: o.value}, s.steps)
            for s, o in found
        ]

    return both
