"""Judges that need no model: comparisons by name, for where a recipe asks for someone who says which answer is better."""

from __future__ import annotations

from posttrain.data.smallworld_gold import gold_total
from posttrain.rewards.refine import noisy
from posttrain.rollout.engine import uniforms

FLIPS = 0.1
"""How often `noisy_gold` says the opposite of what is true."""


def true_gold(prompt: str, a: str, b: str) -> float:
    """1 where answer a has the higher gold total in the small world, 0 where it has the lower one, 1/2 at a tie."""
    gap = gold_total(prompt, a) - gold_total(prompt, b)
    return 0.5 if gap == 0 else float(gap > 0)


def noisy_gold(prompt: str, a: str, b: str) -> float:
    """An annotator of the small world: `true_gold`, but wrong on one pair of answers in ten, and on the same ones whenever asked."""
    return noisy(true_gold, FLIPS, lambda key: float(uniforms((key,), 1)[0]))(prompt, a, b)
