"""One policy-gradient stage each, for ``posttrain train ALGORITHM``, with a laptop block."""

from __future__ import annotations

from collections.abc import Callable

from posttrain.stages import Recipe, Reinforce
from posttrain.train.algorithms import ALGORITHMS, find_algorithm


def __getattr__(name: str) -> Callable[[str], Recipe]:
    """The recipe that trains with a row of the table, whose name is the function's."""
    if name not in ALGORITHMS:
        raise AttributeError(f"module {__name__} has no attribute '{name}'")

    def recipe(reward: str) -> Recipe:
        return laptop(name, reward)

    recipe.__module__, recipe.__qualname__, recipe.__doc__ = __name__, name, f"{ALGORITHMS[name].summary}."
    return recipe


def laptop(algorithm: str, reward: str) -> Recipe:
    """An algorithm at a laptop's size; the paper's numbers stand in its row."""
    row = find_algorithm(algorithm)
    compares = bool(row.needs & {"groups", "pairs"})
    stage = Reinforce(
        model="smollm2",
        reward=reward,
        algorithm=algorithm,
        lora_rank=16,
        lr=1e-3,  # adapters take about a thousand times the rate of the papers' whole networks
        value_lr=3e-4,
        warmup_steps=2,
        steps=32,
        prompts_per_step=6 if "groups" in row.needs else 12,
        samples_per_prompt=4 if "groups" in row.needs else 2 if compares else 1,
        updates_per_rollout=1,
        max_new_tokens=64,
        cut_score=-1.0,  # an answer without its end is worth less than a demonstration
    )
    return Recipe(f"train-{algorithm}", {algorithm: stage}, row.summary)
