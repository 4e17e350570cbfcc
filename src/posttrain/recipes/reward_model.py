"""A reward model alone, from pairs or rankings of your own."""

from __future__ import annotations

from posttrain.stages import EvaluateReward, Recipe, TrainReward


def reward_model(
    model: str = "smollm2",
    data: str = "default",
    test: str = "default",
    limit: int | None = None,
    test_limit: int | None = None,
    skip_bad: int = 16,  # faulty rows left out and counted; public sets have some
) -> Recipe:
    """A Bradley-Terry reward model from pairs or rankings, measured on held-out ones beside three baselines."""
    reward = TrainReward(
        model=model,
        data=data,
        limit=limit,
        skip_bad=skip_bad,
        epochs=1,
        prompts_per_step=8,  # Ouyang et al. 2022: 64
        lora_rank=16,
        lr=2e-4,
        warmup_steps=4,
        max_length=1024,
        overlong="drop",
    )
    evaluate = EvaluateReward(
        base=model,
        reward=reward,
        data=data,
        test=test,
        limit=limit,
        test_limit=test_limit,
        skip_bad=skip_bad,
        overlong="drop",
    )
    return Recipe("reward_model", {"reward": reward, "evaluate": evaluate}, "a reward model from pairs or rankings")
