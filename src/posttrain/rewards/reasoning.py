"""Tasks of reasoning-gym, each scored by its own checker, in a process that can be killed."""

from __future__ import annotations

import re
from typing import Any

from posttrain.data.reasoning import KEY, expected, score
from posttrain.rewards.answers import as_number, final_answer, marked_answer
from posttrain.rewards.base import Reward

_TAGGED = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL)


def reasoning_gym() -> Reward:
    """The task's own checker of what `said` finds in a response, under a deadline of ten seconds; abstains on other prompts."""
    from posttrain.rewards.workers import killable

    return killable("posttrain.rewards.reasoning:check")


def check(prompt: str, completion: str, meta: dict[str, Any]) -> float | None:
    """The score of one response, by what its example's ``meta`` says it was asked; None where that is no such task."""
    if KEY not in meta:
        return None
    wanted = expected(meta[KEY])
    return score(prompt, said(completion, number=is_number(wanted)), meta[KEY])


def said(text: str, *, number: bool = False) -> str:
    """What a response gives as its answer, the surest sign first.

    In the last ``<answer>`` tag; as `marked_answer` reads it; the last number, where the answer is a ``number``; else all of it.
    """
    if tagged := _TAGGED.findall(text):
        return tagged[-1].strip()
    marked = final_answer(text) if number else marked_answer(text)
    return text.strip() if marked is None else marked


def is_number(answer: str) -> bool:
    """Whether a right answer is a number and nothing else."""
    return as_number(answer) is not None and final_answer(answer) == answer.strip()
