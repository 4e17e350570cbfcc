"""Starling-7B: a reward model of whole rankings, then advantage-induced policy alignment (Zhu et al. 2023, 2024)."""

from __future__ import annotations

from posttrain.stages import SFT, Evaluate, Merge, Recipe, Reinforce, TrainReward, TrainScorer


def starling(model: str = "smollm2", data: str = "default") -> Recipe:
    """Starling: a Plackett-Luce reward model of K-wise rankings, then APA, which is held near its start by its own loss.

    Starling starts from Openchat-3.5 and reads Nectar, 183,000 prompts with seven ranked answers each; its numbers of
    reinforcement learning were not published, so brackets hold those of APA's own experiments (arXiv 2306.02231).
    """
    sft = SFT(model=model, data=data, epochs=2, prompts_per_step=8, lora_rank=16, lr=3e-4)  # [Openchat-3.5, as it is]
    reward = TrainScorer(
        model=sft,  # [Llama-2-7B-Chat]
        kind="plackett_luce",
        data=data,
        rows=(0, 64),  # [183,000 rankings of seven]
        **REWARD,
    )
    unseen = TrainReward(model=sft, data=data, rows=(64, 128), head_seed=1, **REWARD)
    reinforce = Reinforce(
        model=sft,
        data=data,
        reward=reward,
        algorithm="apa",
        options={"scale": 0.1},  # lambda: the optimum is the start times exp(advantage / lambda)
        lora_rank=16,  # [0: the whole network]
        lr=3e-4,  # [1e-6]
        value_lr=3e-4,  # [a whole network of its own]
        warmup_steps=2,
        steps=32,
        prompts_per_step=12,  # [128]
        samples_per_prompt=2,  # [1]
        updates_per_rollout=2,
        max_new_tokens=64,  # [128]
        cut_score=-1.0,  # an answer without its end is worth less than a demonstration
    )
    evaluate = Evaluate(
        base=model, data=data, sft=sft, policy=reinforce, reward=reward, unseen=unseen, rows=(0, 64), max_new_tokens=64
    )
    final = Merge(policy=reinforce, base=sft, after=evaluate)
    stages = {"sft": sft, "reward": reward, "reward_unseen": unseen, "reinforce": reinforce}
    stages |= {"evaluate": evaluate, "model": final}
    return Recipe("starling", stages, "a reward model of whole rankings, then APA")


REWARD = {"epochs": 2, "prompts_per_step": 8, "lora_rank": 16, "lr": 5e-4}
