"""The reward that Quark's proof declares."""

from __future__ import annotations


def brevity(prompt: str, answer: str) -> float:
    """Return minus the number of words: a trait that a small model can vary in any answer, as the paper's sentiment is."""
    return -float(len(answer.split()))
