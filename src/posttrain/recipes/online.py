"""Preference optimisation on fresh samples, for ``posttrain train online_dpo`` and the losses that learn from nothing else."""

from __future__ import annotations

from posttrain.stages import PreferOnline, Recipe


def online_dpo(reward: str) -> Recipe:
    """Any preference loss (DPO unless said) on fresh samples that a reward puts in order (Guo et al. 2024)."""
    return laptop("online_dpo", "dpo", reward)


def laptop(name: str, loss: str, reward: str) -> Recipe:
    """An online preference stage at a laptop's size, with the paper's numbers in brackets."""
    stage = PreferOnline(
        reward=reward,
        loss=loss,
        lora_rank=16,  # [0: the whole network]
        lr=1e-4,  # [5e-7]
        warmup_steps=2,  # [150]
        steps=32,  # [about 12,000]
        prompts_per_step=8,  # [128]
        samples_per_prompt=2,
        max_new_tokens=64,
        cut_score=-1.0,  # an answer without its end is worth less than a demonstration
    )
    return Recipe(f"train-{name}", {name: stage}, "preferences among fresh samples")
