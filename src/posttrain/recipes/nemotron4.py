"""Nemotron-4: prompts, answers and preferences made by models, from weak to strong, and reward-aware PO (Nvidia 2024, arXiv 2406.11704)."""

from __future__ import annotations

from typing import Any

from posttrain.stages import SFT, Generate, Label, MakePrompts, MeasurePreference, Prefer, Recipe, Select, TrainReward


def nemotron4(model: str = "small-base", data: str = "smallworld", iterations: int = 2, rounds: int = 3) -> Recipe:
    """Each iteration's model makes the data from which the next one is trained anew; the last one is then tuned to reward gaps.

    What follows is the laptop block, for the small base model, with the report's numbers in brackets (section 3). People gave
    a few demonstrations and the reward model's rankings [20k of them]; everything else is sampled.
    """
    policy: SFT | Prefer = SFT(
        model=model, data=data, limit=24, epochs=2, prompts_per_step=8, lr=1e-3
    )  # [Mixtral 8x7B]
    weak, reward = policy, TrainReward(model=policy, data=data, epochs=3, prompts_per_step=16, lr=1e-3)
    stages: dict[str, Any] = {"weak": weak, "reward": reward}

    def rated(name: str, by: SFT | Prefer, prompts: MakePrompts) -> Label:
        stages[f"answers{name}"] = own = Generate(model=by, data=prompts, samples=4, max_new_tokens=64)
        stages[f"scored{name}"] = found = Label(data=own, reward=reward, cut_score=-2.0)
        return found

    for turn in range(1, iterations + 1):  # [2: each begins from a better base, too]
        asked = MakePrompts(model=policy, count=96)  # [by topics and tasks]
        scored = rated(f"{turn}", policy, asked)
        kept = Select(data=scored, builder="best", options={"least": -1.0})  # [those that the reward model passes]
        sft = SFT(model=model, data=kept, epochs=3, prompts_per_step=16, lr=1e-3)  # [200k, 3 epochs, 1e-7 to 5e-7]
        pairs = Select(data=scored, builder="best_worst", options={"margin": 0.5})  # judged by the reward model
        policy = Prefer(
            model=sft,
            data=pairs,
            loss="dpo_nll",
            options={"weight": 1e-3, "beta": 0.05},  # [1e-5 to 1e-3, 3e-4 to 3e-3]
            prompts_per_step=16,  # [256]
            lr=3e-4,  # [3e-8 to 3e-7]
            warmup_steps=2,
        )
        made = {"asked": asked, "kept": kept, "sft": sft, "pairs": pairs, "dpo": policy}
        stages |= {f"{name}{turn}": stage for name, stage in made.items()}
    for turn in range(1, rounds + 1):  # [3 of 300k pairs, each against the one before]
        pairs = Select(data=rated(f"_rpo{turn}", policy, asked), builder="best_worst")
        policy = Prefer(
            model=policy,
            data=pairs,
            loss="reward_aware_po",
            options={"eta": 1.0, "beta": 0.2},  # [1, 1e-3 to 1]
            prompts_per_step=16,
            lr=3e-4,  # [3e-7]
            warmup_steps=2,
        )
        stages |= {f"rpo_pairs{turn}": pairs, f"rpo{turn}": policy}
    stages["measure"] = MeasurePreference(policy=policy, reference=weak, data=data, test=data, overlong="drop")
    return Recipe("nemotron4", stages, "synthetic alignment data from weak to strong, then reward-aware PO")
