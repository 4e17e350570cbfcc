"""Tasks of reasoning-gym, each scored by its own checker, in a process that can be killed."""

from __future__ import annotations

import re
from typing import Any

from posttrain.data.reasoning import KEY, score
from posttrain.rewards.answers import marked_answer
from posttrain.rewards.base import Reward

_TAGGED = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL)


def reasoning_gym() -> Reward:
    """The task's own checker of what `said` finds in a response, under a deadline of ten seconds; abstains on other prompts."""
    from posttrain.rewards.workers import killable

    return killable("posttrain.rewards.reasoning:check")


def check(prompt: str, completion: str, meta: dict[str, Any]) -> float | None:
    """The score of one response, by what its example's ``meta`` says it was asked; None where that is no such task."""
    return score(prompt, said(completion), meta[KEY]) if KEY in meta else None


def said(text: str) -> str:
    """What a response gives as its answer, the surest sign first.

    In the last ``<answer>`` tag; as `marked_answer` reads it; after the last " = " of its last line; else all of it.
    """
    if tagged := _TAGGED.findall(text):
        return tagged[-1].strip()
    if (marked := marked_answer(text)) is not None:
        return marked
    result = text.strip().rpartition("\n")[2].rpartition(" = ")
    return result[2].strip().rstrip(".") or text.strip() if result[1] else text.strip()
