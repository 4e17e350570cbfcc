"""A policy that learns to look things up: conversations with an environment, and a reward that asks for support."""

from __future__ import annotations

from posttrain.stages import SFT, Merge, Recipe, Reinforce
from posttrain.stages.checked import EvaluateTask


def tool_use(model: str = "small-base", data: str = "notes", environment: str = "retrieval") -> Recipe:
    """Demonstrations of which half guess, then GRPO in conversations: an answer counts that is right and was retrieved.

    Each prompt has notes of its own, drawn anew, so nothing can be known without looking. What the environment answers is read
    and not trained.
    """
    cold = SFT(model=model, data=data, epochs=4, prompts_per_step=8, lr=1e-3)
    tuned = Reinforce(
        model=cold,
        data=data,
        environment=environment,
        reward="supported",
        algorithm="grpo",
        kl=0.001,
        lr=3e-4,
        warmup_steps=4,
        steps=48,
        prompts_per_step=16,
        samples_per_prompt=8,
        updates_per_rollout=2,
        max_new_tokens=32,
        cut_score=-1.0,
        slots=128,
    )
    policy = Merge(policy=tuned, base=cold)
    evaluate = EvaluateTask(
        policies=(cold, policy), reward="supported", environment=environment, data=data, max_new_tokens=32
    )
    held = {name: frozenset({"data", "lr", "updates_per_rollout", "reward", "lora_rank"}) for name in ("cold", "tuned")}
    stages = {"cold": cold, "tuned": tuned, "policy": policy, "evaluate": evaluate}
    return Recipe("tool_use", stages, "answers that are looked up", typed=held)
