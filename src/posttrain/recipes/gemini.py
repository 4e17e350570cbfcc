"""Gemini: the reward model and the policy improve each other (Gemini team 2023, arXiv 2312.11805, section 6)."""

from __future__ import annotations

from posttrain.stages import SFT, EvaluateReward, Generate, Merge, Recipe, Reinforce, Stage, TrainReward, TrainScorer
from posttrain.stages.refining import Refine


def gemini(model: str = "small-base", data: str = "smallworld", judge: str | None = None, rounds: int = 3) -> Recipe:
    """Gemini: learn from a reward model, find on fresh samples where people disagree with it, label there, train it anew.

    The report gives the loop and no numbers; these are a laptop's, for the small base model. ``judge`` (module:function of a
    prompt and two answers) plays the people; without one a pairwise model of the second half of the data's rankings does.
    """
    sft = SFT(model=model, data=data, epochs=2, prompts_per_step=8, lr=1e-3)
    stages: dict[str, Stage] = {"sft": sft}
    if judge is None:
        stages["judge"] = TrainScorer(model=sft, kind="pairwise", data=data, rows=(48, 96), epochs=4, **REWARD)
    people: Stage | str = judge or stages["judge"]
    reward: Stage = TrainReward(model=sft, data=data, rows=(0, FIRST), epochs=2, **REWARD)
    stages["reward0"], rows = reward, data
    for turn in range(rounds):
        tuned = learnt(sft, data, reward)
        policy = Merge(policy=tuned, base=sft)
        own = Generate(model=policy, data=data, samples=6, max_new_tokens=64)
        found = Refine(
            data=rows, limit=None if turn else FIRST, samples=own, reward=reward, judge=people, count=128
        )  # rows add up
        reward = TrainReward(model=sft, data=found, epochs=2, head_seed=turn + 1, **REWARD)
        made = {"tuned": tuned, "policy": policy, "own": own, "found": found}
        stages |= {f"{name}{turn}": stage for name, stage in made.items()} | {f"reward{turn + 1}": reward}
        rows = found
    stages["tuned"] = learnt(sft, data, reward)
    stages["model"] = Merge(policy=stages["tuned"], base=sft)
    stages["evaluate"] = EvaluateReward(base=model, reward=reward, data=data, test=data)
    return Recipe("gemini", stages, "reward model and policy improve each other")


def learnt(sft: Stage, data: str, reward: Stage) -> Reinforce:
    """A policy of the supervised one, by the newest reward model."""
    return Reinforce(
        model=sft,
        data=data,
        reward=reward,
        lora_rank=16,
        lr=1e-3,
        value_lr=3e-4,
        warmup_steps=2,
        steps=24,
        prompts_per_step=16,
        samples_per_prompt=2,
        updates_per_rollout=1,
        max_new_tokens=64,
        kl=0.02,
        cut_score=-1.0,
    )


FIRST = 24  # rankings of the first reward model
REWARD = {"prompts_per_step": 8, "lr": 1e-3}
