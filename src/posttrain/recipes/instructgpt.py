"""InstructGPT: demonstrations, comparisons, PPO-ptx (Ouyang et al. 2022, "Training language models to follow instructions")."""

from __future__ import annotations

from posttrain.stages import SFT, Evaluate, Merge, Recipe, Reinforce, TrainReward


def instructgpt(model: str = "smollm2", data: str = "default") -> Recipe:
    """InstructGPT's three stages: supervised fine-tuning, a reward model, PPO with a KL penalty.

    Stages default to the paper's numbers; what follows is the laptop block, with the paper's number in brackets.
    """
    sft = SFT(
        model=model,
        data=data,
        epochs=2,  # [16] of 13k demonstrations
        prompts_per_step=8,  # [32]
        lora_rank=16,  # [0: the whole network]
        lr=3e-4,  # [9.65e-6]: adapters take about thirty times the rate
    )
    reward = TrainReward(model=sft, data=data, rows=(0, 64), **REWARD)
    unseen = TrainReward(model=sft, data=data, rows=(64, 128), head_seed=1, **REWARD)
    reinforce = Reinforce(
        model=sft,
        data=data,
        reward=reward,
        lora_rank=16,
        lr=1e-3,  # [2.55e-6 to 2.55e-5]
        value_lr=3e-4,  # [9e-6]: only the critic's head is trained
        warmup_steps=2,  # [10]
        steps=32,  # [4000]: 16 rollouts of 2 updates
        lam=1.0,  # [0.95]: the small critic explains little, so credit is not left to it
        prompts_per_step=12,  # [512]
        samples_per_prompt=2,  # [1]: the second shares the first one's prompt
        updates_per_rollout=2,  # [8]
        max_new_tokens=64,
        kl=0.02,
        ptx=0.1,  # [27.8, on pretraining text]: a little of the demonstrations' likelihood, as the demo is short
        ptx_share=0.1,  # [8]: one demonstration beside the 12 answers of an update, so that it costs little
        ema=0.0,  # [0.992 an iteration, which is longer than this run]
        cut_score=-1.0,  # an answer without its end is worth less than a demonstration
    )
    evaluate = Evaluate(
        base=model,
        data=data,
        sft=sft,
        policy=reinforce,
        reward=reward,
        unseen=unseen,
        rows=(0, 64),
        max_new_tokens=64,
    )
    final = Merge(policy=reinforce, base=sft, after=evaluate)
    stages = {"sft": sft, "reward": reward, "reward_unseen": unseen, "reinforce": reinforce}
    stages |= {"evaluate": evaluate, "model": final}
    return Recipe("instructgpt", stages, "supervised fine-tuning, a reward model, PPO-ptx")


REWARD = {"epochs": 2, "prompts_per_step": 8, "lora_rank": 16, "lr": 5e-4}  # [1, 64, 0, 9e-6]
