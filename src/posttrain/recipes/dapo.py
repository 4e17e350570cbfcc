"""DAPO: policy gradients on answers that a program checks, without critic or KL (Yu et al. 2025, arXiv 2503.14476)."""

from __future__ import annotations

from posttrain.stages import SFT, Merge, Recipe, Reinforce
from posttrain.stages.checked import EvaluateTask


def dapo(model: str = "small-base", data: str = "sums") -> Recipe:
    """DAPO: clip-higher, prompts sampled until their answers differ, tokens of equal weight, long answers punished softly.

    The paper trains Qwen2.5-32B, a base model, on 17,000 problems of mathematics whose answers are whole numbers, from its own
    samples alone. The small base model has never seen a worked sum, so here a few demonstrations come before. What follows is
    the laptop block, with the paper's number in brackets (section 4.1).
    """
    cold = SFT(model=model, data=data, epochs=3, prompts_per_step=8, lr=1e-3, warmup_steps=4)  # [none: a base model]
    tuned = Reinforce(
        model=cold,
        data=data,
        reward="accuracy",  # [1 where the answer is right, -1 where it is not: the same once standardised]
        algorithm="dapo",
        options={"low": 0.2, "high": 0.28},  # [0.2, 0.28]
        rounds=8,  # [until the batch is full]
        overlong_share=0.2,  # [the last 4,096 of 20,480 tokens]
        mask_cut=True,  # [answers without their end are no part of the loss]
        lr=3e-4,  # [1e-6]
        warmup_steps=4,  # [20 rollouts]
        steps=96,  # [of 16 updates a rollout]
        prompts_per_step=16,  # [512]
        samples_per_prompt=8,  # [16]
        updates_per_rollout=4,  # [16]
        max_new_tokens=96,  # [20,480]
        slots=128,
    )
    policy = Merge(policy=tuned, base=cold)
    evaluate = EvaluateTask(policies=(cold, policy), reward="accuracy", data=data, max_new_tokens=96)
    held = {
        "cold": frozenset({"data", "epochs"}),
        "tuned": frozenset({"data", "lr", "lora_rank", "updates_per_rollout", "samples_per_prompt", "max_new_tokens"}),
        "evaluate": frozenset({"max_new_tokens"}),
    }
    return Recipe(
        "dapo",
        {"cold": cold, "tuned": tuned, "policy": policy, "evaluate": evaluate},
        "checked answers, no critic",
        typed=held,
    )
