"""Qwen2: offline DPO, then online DPO on the best and worst of fresh samples, each step merged (Yang et al. 2024, arXiv 2407.10671)."""

from __future__ import annotations

from posttrain.stages import SFT, MeasurePreference, Prefer, PreferOnline, Recipe, TrainReward


def qwen2(model: str = "small-base", data: str = "smallworld") -> Recipe:
    """Fine-tuning, DPO on the data's pairs, then DPO on fresh samples that a reward model puts in order, by a merging optimiser.

    What follows is the laptop block, for the small base model, with the report's numbers in brackets (section 4). Each online step
    is merged with what the model had learnt since ``model``, against the tax of alignment (Lu et al. 2024, arXiv 2405.17931).
    """
    sft = SFT(model=model, data=data, epochs=2, prompts_per_step=8, lr=1e-3)  # [500k rows, 2 epochs, 7e-6 to 7e-7]
    reward = TrainReward(model=sft, data=data, epochs=3, prompts_per_step=8, lr=1e-3)
    offline = Prefer(model=sft, data=data, loss="dpo", beta=0.1, prompts_per_step=8, lr=1e-4, warmup_steps=2)
    online = PreferOnline(
        model=offline,
        data=data,
        reward=reward,
        loss="dpo",
        beta=0.1,
        samples_per_prompt=4,  # [several: the reward model picks best and worst]
        prompts_per_step=16,
        steps=24,
        lr=3e-4,  # [unreported; 1e-7 to 5e-5 in the optimiser's paper]
        warmup_steps=2,
        max_new_tokens=64,
        cut_score=-1.0,
        merging="ondare",
        merging_base=model,
        merging_alpha=1e-5,  # [1e-7 and more, searched]
        merging_keep=0.5,
    )
    measure = MeasurePreference(policy=online, reference=sft, data=data, test=data)
    stages = {"sft": sft, "reward": reward, "offline": offline, "online": online, "measure": measure}
    return Recipe("qwen2", stages, "offline, then online preference optimisation with merged steps")
