"""Reward under a limit on cost as one stage, for ``posttrain train safe_rlhf``."""

from __future__ import annotations

from posttrain.stages import Recipe, ReinforceSafely


def safe_rlhf(reward: str, cost: str) -> Recipe:
    """PPO for a reward while the mean cost is held below a limit by a multiplier (Dai et al. 2023, Safe RLHF)."""
    return Recipe("train-safe_rlhf", {"safe_rlhf": constrained(reward, cost)}, "reward under a limit on cost")


def constrained(reward: str, cost: str) -> ReinforceSafely:
    """The stage at a laptop's size, with the paper's numbers in brackets."""
    return ReinforceSafely(
        reward=reward,
        cost=cost,
        cost_limit=0.0,  # [0]; lower is safer
        multiplier_rate=0.1,  # [0.1]
        lora_rank=16,  # [0: the whole network]
        lr=1e-3,  # [1e-5]: adapters take about a hundred times the rate
        schedule="constant",  # [cosine]
        value_lr=3e-4,  # [5e-6]: only the critics' heads are trained
        warmup_steps=2,  # [3 % of the steps]
        steps=32,
        prompts_per_step=12,  # [128]
        samples_per_prompt=2,  # [1]: the second shares the first one's prompt
        max_new_tokens=64,  # [512]
        kl=0.02,  # [0.01]
        cut_score=-1.0,  # an answer without its end is worth less than a demonstration
    )
