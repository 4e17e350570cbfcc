"""ChatGLM-RLHF: PPO on rewards that start at 0, with the likelihood of old answers beside (Hou et al. 2024, arXiv 2404.00934)."""

from __future__ import annotations

from posttrain.stages import SFT, Evaluate, Merge, Recipe, Reinforce, TrainReward


def chatglm_rlhf(model: str = "smollm2", data: str = "default") -> Recipe:
    """ChatGLM-RLHF: each reward is less that of the start's own answer to the prompt, and old answers are learnt on beside PPO.

    The optimiser's step is fused into the backward pass. The paper's reward model learns from pairs whose lengths are balanced in
    buckets (`posttrain.data.lengths`). What follows is the laptop block, with the paper's number in brackets where it gives one.
    """
    sft = SFT(model=model, data=data, epochs=2, prompts_per_step=8, lora_rank=16, lr=3e-4)
    reward = TrainReward(model=sft, data=data, rows=(0, 64), **REWARD)
    unseen = TrainReward(model=sft, data=data, rows=(64, 128), head_seed=1, **REWARD)
    reinforce = Reinforce(
        model=sft,
        data=data,
        reward=reward,
        against_start=1,  # one answer of the supervised model a prompt, as in the paper
        ptx=0.5,  # [not published]: weight of the likelihood of demonstrations
        ptx_share=0.25,  # [not published]: 3 demonstrations beside 12 answers
        fused=True,  # each weight moves in the backward pass; gradients are not clipped
        lora_rank=16,  # [0: the whole network]
        lr=5e-4,  # [1e-6]
        value_lr=3e-4,
        warmup_steps=2,
        steps=32,  # [600 to 800 iterations]
        lam=1.0,
        prompts_per_step=12,
        samples_per_prompt=2,
        updates_per_rollout=2,
        max_new_tokens=64,
        kl=0.02,
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
    stages = {"sft": sft, "reward": reward, "reward_unseen": unseen, "reinforce": reinforce, "evaluate": evaluate}
    stages |= {"model": Merge(policy=reinforce, base=sft, after=evaluate)}
    return Recipe("chatglm_rlhf", stages, "PPO on rewards relative to the start's own answers, old answers kept")


REWARD = {"epochs": 2, "prompts_per_step": 8, "lora_rank": 16, "lr": 5e-4}  # [1.21e5 comparisons]
