"""Gemma 2: a reward model ten times the policy, conversations, averaged policies, an auto-rater (Gemma team 2024)."""

from __future__ import annotations

from posttrain.stages import SFT, EvaluateReward, Merge, Recipe, Reinforce, Stage, TrainReward, TrainScorer
from posttrain.stages.refining import AutoRate, Converse


def gemma2(
    model: str = "small-base", big: str = "smollm2", data: str = "smallworld", judge: str | None = None
) -> Recipe:
    """Gemma 2: policies learn from a far larger reward model on conversations; those of several settings are merged.

    The report (arXiv 2408.00118, section 4) has a reward model an order of magnitude larger than the policy, oriented towards
    several turns, and averages models of runs with different hyperparameters, for which it cites WARP (arXiv 2406.16768). The
    auto-rater that sees to hyperparameters and reward hacking is Gemma 1's (arXiv 2403.08295). Neither gives numbers; these
    are a laptop's. ``big`` has 75 times the parameters of the small model and a tokenizer of its own: it reads text. ``judge``
    (module:function of a prompt and two answers) is the auto-rater; without one a pairwise model of ``big`` is.
    """
    talks = Converse(data=data, turns=2)
    sft = SFT(model=model, data=talks, epochs=2, prompts_per_step=8, lr=1e-3)
    reward = TrainReward(model=big, data=talks, epochs=1, prompts_per_step=8, lora_rank=16, lr=5e-4)
    stages: dict[str, Stage] = {"talks": talks, "sft": sft, "reward": reward}
    if judge is None:
        stages["judge"] = TrainScorer(
            model=big, kind="pairwise", data=data, rows=(0, 32), epochs=1, prompts_per_step=8, lora_rank=16, lr=5e-4
        )
    parts = {f"policy_{name}": policy(sft, talks, reward, **own) for name, own in SETTINGS.items()}
    first, *others = parts.values()
    merged = Merge(policy=first, others=tuple(others), base=sft, method="warp", options={"eta": 1.0})
    rated = AutoRate(
        policies=(*parts.values(), merged),
        baseline=sft,
        reward=reward,
        judge=judge or stages["judge"],
        data=talks,
        max_new_tokens=64,
    )
    stages |= {**parts, "model": merged, "rated": rated}
    stages["evaluate"] = EvaluateReward(base=big, reward=reward, data=data, test=data)
    return Recipe("gemma2", stages, "a large reward model, conversations, merged policies, an auto-rater")


def policy(sft: Stage, talks: Stage, reward: Stage, *, lr: float, kl: float) -> Reinforce:
    """A policy of one setting."""
    return Reinforce(
        model=sft, data=talks, reward=reward, algorithm="rloo", lr=lr, kl=kl, warmup_steps=2, steps=24,
        prompts_per_step=8, samples_per_prompt=4, updates_per_rollout=1, max_new_tokens=64, cut_score=-1.0, slots=64,
    )  # fmt: skip


SETTINGS = {"near": {"lr": 1e-4, "kl": 0.1}, "middle": {"lr": 2e-4, "kl": 0.05}, "far": {"lr": 3e-4, "kl": 0.02}}
