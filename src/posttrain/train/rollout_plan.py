"""The numbers of a rollout step, and what one prompt's responses are once they have scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from posttrain.errors import ConfigError
from posttrain.rollout.engine import Rollout, Sampling


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The numbers of a rollout step.

    Attributes:
        prompts: prompts a rollout.
        samples: responses a prompt.
        updates: optimiser steps on each rollout, over equal shares of its prompts.
        sampling: how responses are drawn.
        kl: coefficient of the KL penalty in the reward.
        kl_target: nats a sequence that the coefficient is steered to from rollout to rollout (`adaptive_kl`), over
            ``kl_horizon`` responses; None keeps it.
        gamma, lam: discount and lambda of the returns that the critic learns, and of GAE.
        least: responses with a score that a prompt needs, 2 where they are compared; a prompt with fewer is left out and counted.
        greedy: also take each prompt's greedy response, whose score is a baseline.
        rounds: above 1, prompts whose responses all score the same are left out and others sampled in their place, in at
            most so many rounds (Yu et al. 2025, section 3.2).
        whiten_rewards: scale token rewards to variance 1 over the rollout, without moving their mean.
        cut_score: score of a response that ended by length, instead of the reward's; None keeps the reward's.
        mask_cut: such a response is part of its group's baseline but not of the loss.
        overlong_share: share of the longest response over whose last part scores fall by up to 1 (`overlong_penalty`); 0 = none.
        seed: of prompts' order and of draws.
        max_tokens: the memory knob.
    """

    prompts: int
    samples: int
    updates: int
    sampling: Sampling
    kl: float
    kl_target: float | None = None
    kl_horizon: float = 10_000.0
    gamma: float = 1.0
    lam: float = 0.95
    least: int = 1
    greedy: bool = False
    rounds: int = 1
    whiten_rewards: bool = False
    cut_score: float | None = None
    mask_cut: bool = False
    overlong_share: float = 0.0
    seed: int = 0
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        """Refuse plans whose updates would be empty, or whose sampler is not the distribution that is trained."""
        if not 1 <= self.updates <= self.prompts or self.samples < 1 or self.rounds < 1:
            raise ConfigError(
                f"got {self.prompts} prompts, {self.samples} samples, {self.updates} updates a rollout, {self.rounds} rounds; "
                "expected at least 1 of each and no more updates than prompts"
            )
        if self.samples < max(self.least, 2 if self.rounds > 1 else 1):
            raise ConfigError(
                f"got {self.samples} samples a prompt; expected at least 2: the responses to one prompt are compared"
            )
        if not 0 <= self.overlong_share <= 1 or (self.kl_target is not None and self.kl_target <= 0):
            raise ConfigError(
                f"got overlong_share={self.overlong_share}, kl_target={self.kl_target}; expected a share of the longest "
                "response, and nats above 0"
            )
        s = self.sampling
        if s.temperature == 0 or s.top_k is not None or s.top_p < 1:
            raise ConfigError(
                f"got temperature={s.temperature}, top_k={s.top_k}, top_p={s.top_p}; training needs the whole distribution: "
                "temperature above 0, top_k None, top_p 1"
            )

    @property
    def best_guess(self) -> Sampling:
        """How the greedy response is drawn."""
        return replace(self.sampling, temperature=0.0)


@dataclass(frozen=True, kw_only=True)
class Group:
    """The responses to one prompt with their scores, None = the reward abstained.

    ``baseline`` is the score of the greedy response, None = none was asked for, or the reward abstained. ``steps`` are, a
    response each, the scores of its steps of reasoning by the index of the step's last token; ``parts`` what else the reward
    said of each.
    """

    index: int
    rollouts: tuple[Rollout, ...]
    scores: tuple[float | None, ...]
    baseline: float | None = None
    steps: tuple[Mapping[int, float], ...] = ()
    parts: tuple[Mapping[str, float], ...] = ()

    @property
    def flat(self) -> bool:
        """Whether all scores that are known are equal."""
        return len({s for s in self.scores if s is not None}) < 2

    def live(self, plan: Plan) -> list[bool]:
        """Which responses enter baselines and whitening: those with a score, in groups that have enough."""
        known = [s is not None for s in self.scores]
        enough = sum(known) >= plan.least and not (plan.greedy and self.baseline is None)
        return known if enough else [False] * len(known)
