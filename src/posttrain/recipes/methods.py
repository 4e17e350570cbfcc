"""One stage each, for ``posttrain train``: the systems' own stages with their laptop blocks."""

from __future__ import annotations

from dataclasses import replace

from posttrain.recipes.dpo import dpo as dpo_recipe
from posttrain.recipes.instructgpt import instructgpt
from posttrain.recipes.reward_model import reward_model
from posttrain.stages import Recipe


def sft() -> Recipe:
    """Supervised fine-tuning on demonstrations."""
    return Recipe("train-sft", {"sft": instructgpt().stages["sft"]}, "supervised fine-tuning")


def reward() -> Recipe:
    """A Bradley-Terry reward model on pairs or rankings."""
    return Recipe("train-reward", {"reward": reward_model().stages["reward"]}, "a reward model")


def dpo() -> Recipe:
    """Direct preference optimisation on pairs or rankings."""
    return Recipe("train-dpo", {"dpo": dpo_recipe().stages["dpo"]}, "direct preference optimisation")


def ppo(reward: str) -> Recipe:
    """PPO on prompts against a reward model, the directory of a finished reward stage."""
    stage = replace(instructgpt().stages["reinforce"], model="smollm2", reward=reward)
    return Recipe("train-ppo", {"ppo": stage}, "reinforcement learning against a reward model")
