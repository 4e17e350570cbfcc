"""One stage each, for ``posttrain train``: the systems' own stages with their laptop blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from posttrain.recipes.dpo import dpo as dpo_recipe
from posttrain.recipes.instructgpt import instructgpt
from posttrain.recipes.online import laptop
from posttrain.recipes.reward_model import reward_model
from posttrain.stages import Prefer, PreferLabelled, Recipe, TrainReward, TrainScorer


def sft() -> Recipe:
    """Supervised fine-tuning on demonstrations."""
    return Recipe("train-sft", {"sft": instructgpt().stages["sft"]}, "supervised fine-tuning")


def reward(kind: str = "bradley_terry") -> Recipe:
    """A reward model of a kind (`posttrain list kinds`), Bradley-Terry on pairs or rankings unless named."""
    stage = reward_model().stages["reward"]
    if kind != "bradley_terry":
        stage = TrainScorer(**{k: v for k, v in vars(stage).items() if k in vars(TrainReward())}, kind=kind)
    return Recipe("train-reward", {"reward": stage}, "a reward model")


def dpo() -> Recipe:
    """Direct preference optimisation on pairs or rankings."""
    return Recipe("train-dpo", {"dpo": dpo_recipe().stages["dpo"]}, "direct preference optimisation")


def ppo(reward: str) -> Recipe:
    """PPO on prompts against a reward model, the directory of a finished reward stage."""
    stage = replace(instructgpt().stages["reinforce"], model="smollm2", reward=reward)
    return Recipe("train-ppo", {"ppo": stage}, "reinforcement learning against a reward model")


def __getattr__(name: str) -> Callable[..., Recipe]:
    """The recipe that trains with a preference loss, whose name is the function's: DPO's laptop block, on the loss's own data."""
    from posttrain.errors import ConfigError
    from posttrain.losses import explored_losses, find_loss, unpaired_losses, valued_losses

    try:
        kind = find_loss(name)
    except ConfigError as error:
        raise AttributeError(f"module {__name__} has no attribute '{name}'") from error
    if kind is explored_losses:
        return _online(name)

    def recipe() -> Recipe:
        stage = replace(dpo_recipe().stages["dpo"], loss=name, beta=None)
        if kind in (unpaired_losses, valued_losses):
            stage = PreferLabelled(**{k: v for k, v in vars(stage).items() if k in vars(Prefer())})
        return Recipe(f"train-{name}", {name: stage}, (kind[name].__doc__ or "").partition("\n")[0])

    recipe.__module__, recipe.__qualname__ = __name__, name
    return recipe


def _online(name: str) -> Callable[..., Recipe]:
    """The recipe of a loss that learns from samples made while it runs."""

    def recipe(reward: str) -> Recipe:
        return laptop(name, name, reward)

    recipe.__module__, recipe.__qualname__ = __name__, name
    return recipe
