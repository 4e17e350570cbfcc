"""One stage for each preference loss, for ``posttrain train LOSS``, with DPO's laptop block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from posttrain.recipes.dpo import dpo
from posttrain.recipes.online import laptop
from posttrain.stages import Prefer, PreferLabelled, Recipe


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
        stage = replace(dpo().stages["dpo"], loss=name, beta=None)
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
