"""Rewards of answers in tags: whether what the last ``<answer>`` holds is right, and whether thought and answer stand where they should."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from posttrain.data.reasoning import KEY
from posttrain.errors import RewardError
from posttrain.rewards.answers import normal, verified
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


def supported() -> Reward:
    """1 where the answer is right and stands in what an environment answered, as whole words; a right guess scores 0.

    Whether it was right, whether it was supported and whether anything was looked up are logged apart.

    Raises (when called):
        RewardError: no response had an environment.
    """
    right = accuracy()

    def reward(completions: Sequence[Completion]) -> list[Score]:
        if completions and not any(c.turns for c in completions):
            raise RewardError(
                "reward 'supported' reads what an environment answered; got none, give one with environment"
            )
        out: list[Score] = []
        for c, score in zip(completions, right(completions), strict=True):
            answers = [normal(m.content) for m in c.turns if m.role != "assistant"]
            wanted = normal(said(c.text))
            found = float(bool(wanted) and any(f" {wanted} " in f" {text} " for text in answers))
            parts = {"supported": found, "looked": float(bool(answers))}
            known = {} if score.value is None else {"accuracy": score.value}
            out.append(Score(None if score.value is None else score.value * found, known | parts))
        return out

    return reward


def finished(prompt: str, answer: str) -> float:
    """1 where an answer has words, ends as a sentence does and keeps no tags, else 0: a rule for prompts that no program checks."""
    del prompt
    said = answer.strip()
    return float(said[-1:] in (".", "?", "!") and any(c.isalpha() for c in said) and "<" not in said)


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
