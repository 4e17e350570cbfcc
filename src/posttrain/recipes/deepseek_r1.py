"""DeepSeek-R1: reasoning by checked rewards, kept by rejection sampling, then all kinds of prompts (DeepSeek-AI 2025, arXiv 2501.12948)."""

from __future__ import annotations

from posttrain.stages import SFT, Generate, Label, Merge, Recipe, Reinforce, Select, TrainReward
from posttrain.stages.checked import EvaluateTask, MixRewards


def deepseek_r1(model: str = "small-base", data: str = "sums", general: str = "smallworld") -> Recipe:
    """DeepSeek-R1: cold start, GRPO on accuracy and form, its best samples, the base tuned on those, GRPO on all kinds of prompts.

    What follows is the laptop block, for the small base model, with the paper's numbers in brackets (section 2.3); sizes that it
    does not give are in no bracket. Its reward for staying in one language is left out: the small world has one.
    """
    cold = SFT(model=model, data=data, epochs=2, prompts_per_step=8, lr=1e-3)  # [thousands of long thoughts; V3-Base]
    learnt1 = Reinforce(model=cold, data=data, reward="thought", steps=48, **RL)
    reason = Merge(policy=learnt1, base=cold)
    samples = Generate(model=reason, data=data, samples=4, max_new_tokens=96)
    scored = Label(data=samples, reward="thought", cut_score=0.0)
    kept = Select(data=scored, builder="best", options={"most": 2, "least": 2.0})  # right, and in form [600,000]
    other = Select(data=general, part="demonstrations", builder="demonstrated")  # [200,000]
    both = Select(data=(kept, other), builder="demonstrated")
    sft = SFT(model=model, data=both, epochs=2, prompts_per_step=8, lr=1e-3)  # [2 epochs, from the base again]
    helpful = TrainReward(model=sft, data=general, epochs=2, prompts_per_step=8, lr=1e-3)
    checked = Select(data=data, part="prompts", builder="asked")
    asked = Select(data=general, part="prompts", builder="asked")
    prompts = Select(data=(checked, asked), builder="asked")
    reward = MixRewards(rewards=(helpful,), named=("thought",), weights=(1.0, 1.0), where=("open", "checked"))
    learnt2 = Reinforce(model=sft, data=prompts, reward=reward, steps=24, **RL)
    final = Merge(policy=learnt2, base=sft)
    policies = (cold, reason, sft, final)
    evaluate = EvaluateTask(policies=policies, reward="thought", data=data, max_new_tokens=96)
    stages = {
        "cold": cold,
        "learnt1": learnt1,
        "reason": reason,
        "samples": samples,
        "scored": scored,
        "kept": kept,
        "other": other,
    }
    stages |= {"both": both, "sft": sft, "helpful": helpful, "checked": checked, "asked": asked, "prompts": prompts}
    stages |= {"reward": reward, "learnt2": learnt2, "final": final, "evaluate": evaluate}
    held = dict.fromkeys(stages, HELD)
    return Recipe("deepseek_r1", stages, "reasoning by checked rewards, then everything else", typed=held)


RL = {
    "algorithm": "grpo",
    "kl": 0.001,  # [0.001]
    "lr": 3e-4,  # [3e-6]
    "warmup_steps": 4,
    "prompts_per_step": 16,  # [32]
    "samples_per_prompt": 8,  # [16]
    "updates_per_rollout": 2,
    "max_new_tokens": 96,  # [32,768]
    "cut_score": -1.0,
    "slots": 128,
}
HELD = frozenset({"data", "lr", "max_new_tokens", "updates_per_rollout", "reward", "lora_rank"})
