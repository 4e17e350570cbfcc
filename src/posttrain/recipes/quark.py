"""Quark: the policy learns to write at a level of reward, told by a token (Lu et al. 2022, arXiv 2205.13636)."""

from __future__ import annotations

from posttrain.stages import SFT, EvaluateQuark, Quark, Recipe, TrainReward


def quark(model: str = "smollm2", data: str = "default") -> Recipe:
    """Quark: explore, sort the pool of all answers into bins of reward, learn each answer after its bin's token.

    The paper unlearns toxic, negative and repetitive text by a classifier's scores; here the reward model is trained on the
    data's rankings. What follows is the laptop block, with the number of the authors' code in brackets.
    """
    sft = SFT(model=model, data=data, epochs=2, prompts_per_step=8, lora_rank=16, lr=3e-4)
    reward = TrainReward(model=sft, data=data, epochs=2, prompts_per_step=8, lora_rank=16, lr=5e-4)
    policy = laptop(reward, sft, data)
    evaluate = EvaluateQuark(policy=policy, reference=sft, reward=reward, data=data)
    stages = {"sft": sft, "reward": reward, "policy": policy, "evaluate": evaluate}
    return Recipe("quark", stages, "answers learnt after a token for their reward")


def train(reward: str) -> Recipe:
    """Quark: each sampled answer learnt after a token for its bin of reward (Lu et al. 2022)."""
    return Recipe("train-quark", {"quark": laptop(reward, "smollm2", "default")}, "answers learnt after reward tokens")


def laptop(reward: TrainReward | str, model: SFT | str, data: str) -> Quark:
    """The stage at a laptop's size."""
    return Quark(
        model=model,  # [GPT-2 large]
        data=data,
        reward=reward,
        bins=5,  # [5]
        beta=0.05,  # [0.05]
        eta=0.06,  # [0.06]
        lr=1e-4,  # [1e-5]
        warmup_steps=8,  # [500]
        steps=192,  # [23,400: 3M episodes]
        explore_every=32,  # [500]
        rows_per_step=16,  # [128]
        samples_per_prompt=1,
        max_new_tokens=64,  # [20]
        cut_score=-1.0,  # an answer without its end is worth less than a demonstration
    )
