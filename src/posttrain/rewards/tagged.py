"""Rewards of answers in tags: whether what the last ``<answer>`` holds is right, and whether thought and answer stand where they should."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from posttrain.data.reasoning import KEY
from posttrain.rewards.answers import verified
from posttrain.rewards.base import Completion, Reward, Score, weighted_sum
from posttrain.rewards.combine import when
from posttrain.rewards.reasoning import reasoning_gym, said
from posttrain.rewards.text import matches, of_text
from posttrain.types import Example

FORM = r"<think>((?!</?think>|</?answer>).)+</think>\s*<answer>((?!</?think>|</?answer>).)+</answer>"
"""A whole response of one thought and one answer, neither empty."""


def checkable(example: Example) -> bool:
    """Whether a program can say if an answer to a prompt is right."""
    return example.target is not None or KEY in example.meta


def accuracy() -> Reward:
    """1 where the answer in the last ``<answer>`` tag is right, else 0: by the prompt's target, or its task of reasoning-gym.

    Without a tag it is read as elsewhere (`posttrain.rewards.reasoning.said`). A task's part for a near miss is 0 here.
    """
    by_target = of_text(lambda c: None if c.example.target is None else verified(c.example.target, said(c.text)))
    return when(lambda e: KEY in e.meta, whole(reasoning_gym()), by_target)


def whole(reward: Reward) -> Reward:
    """1 where a reward's score is 1, else 0; abstains where it does."""

    def rounded(completions: Sequence[Completion]) -> list[Score]:
        return [replace(s, value=s.value and float(s.value >= 1)) for s in reward(completions)]

    return rounded


def thought() -> Reward:
    """Accuracy plus 1 for the form ``<think>...</think><answer>...</answer>``, logged apart.

    Source: DeepSeek-AI 2025 (DeepSeek-R1), arXiv 2501.12948, section 2.2.2.
    """
    return weighted_sum({"accuracy": (1.0, accuracy()), "format": (1.0, matches(FORM))})
