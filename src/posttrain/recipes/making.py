"""One stage each that makes data, for ``posttrain generate``, ``label`` and ``select``."""

from __future__ import annotations

from posttrain.stages import Generate, Label, Recipe, Select


def generate() -> Recipe:
    """Sample answers of a policy to prompts."""
    return Recipe("generate", {"generate": Generate()}, "answers of a policy")


def label(data: str, reward: str) -> Recipe:
    """Score answers by a reward model, or by module:function."""
    return Recipe("label", {"label": Label(data=data, reward=reward)}, "scores of answers")


def select(data: str, builder: str) -> Recipe:
    """Make pairs, rankings or demonstrations of scored answers by a builder."""
    return Recipe("select", {"select": Select(data=data, builder=builder)}, "data to train on")
