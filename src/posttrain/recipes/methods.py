"""One stage each, for ``posttrain train``: the systems' own stages with their laptop blocks."""

from __future__ import annotations

from dataclasses import replace

from posttrain.recipes.dpo import dpo as dpo_recipe
from posttrain.recipes.instructgpt import instructgpt
from posttrain.recipes.reward_model import reward_model
from posttrain.stages import Recipe, TrainEnsemble, TrainReward, TrainScorer


def sft() -> Recipe:
    """Supervised fine-tuning on demonstrations."""
    return Recipe("train-sft", {"sft": instructgpt().stages["sft"]}, "supervised fine-tuning")


def reward(kind: str = "bradley_terry") -> Recipe:
    """A reward model of a kind (`posttrain list kinds`), Bradley-Terry on pairs or rankings unless named."""
    stage = reward_model().stages["reward"]
    if kind != "bradley_terry":
        stage = TrainScorer(**{k: v for k, v in vars(stage).items() if k in vars(TrainReward())}, kind=kind)
    return Recipe("train-reward", {"reward": stage}, "a reward model")


def ensemble(kind: str = "bradley_terry") -> Recipe:
    """Several reward models of a kind as one, scored by mean, minimum or less their variance (Coste et al. 2024: five)."""
    stage = reward_model().stages["reward"]
    return Recipe(
        "train-ensemble", {"ensemble": TrainEnsemble(**vars(stage), kind=kind)}, "an ensemble of reward models"
    )


def dpo() -> Recipe:
    """Direct preference optimisation on pairs or rankings."""
    return Recipe("train-dpo", {"dpo": dpo_recipe().stages["dpo"]}, "direct preference optimisation")


def ppo(reward: str) -> Recipe:
    """PPO on prompts against a reward model, the directory of a finished reward stage."""
    stage = replace(
        instructgpt().stages["reinforce"], model="smollm2", reward=reward, ptx=0.0
    )  # prompts have no answers
    return Recipe("train-ppo", {"ppo": stage}, "reinforcement learning against a reward model")
