"""ReST: grow a set of own answers, improve on ever better parts of it (Gulcehre et al. 2023, arXiv 2308.08998)."""

from __future__ import annotations

from posttrain.stages import SFT, Generate, Label, MeasurePreference, Recipe, Select, Stage, TrainReward


def rest(model: str = "smollm2", data: str = "default", grows: int = 2) -> Recipe:
    """ReST: each Grow step samples once; Improve steps on that set keep what scores above thresholds that rise, at rates that fall.

    Scores are a reward model's, on which the data's own answers average 0; the paper's thresholds are those of a score
    between 0 and 1. What follows is the laptop block, with the paper's number in brackets where it differs (section 4).
    """
    sft = SFT(model=model, data=data, epochs=2, prompts_per_step=8, lora_rank=16, lr=3e-4)  # [a supervised translator]
    judge = TrainReward(model=sft, data=data, epochs=2, prompts_per_step=8, lora_rank=16, lr=5e-4)  # [a learnt metric]
    policy: Stage = sft
    stages: dict[str, Stage] = {"sft": sft, "judge": judge}
    for grow in range(1, grows + 1):  # [1 or 2]
        own = Generate(model=policy, data=data, samples=8, max_new_tokens=64)  # [100 at temperature 0.8]
        scored = Label(data=own, reward=judge, cut_score=-100.0)  # an answer without its end passes no threshold
        stages |= {f"own{grow}": own, f"scored{grow}": scored}
        for step, least in enumerate((-2.0, -1.0, 0.0), 1):  # [0.7, 0.8, 0.9, 0.95, 0.99]
            kept = Select(data=scored, builder="best", options={"most": 8, "least": least})  # all above the threshold
            policy = SFT(
                model=policy,
                data=kept,
                epochs=1,
                prompts_per_step=16,
                lora_rank=16,  # [0: the whole network]
                lr=2e-4 / step,  # [falling too]
            )
            stages |= {f"kept{grow}_{step}": kept, f"policy{grow}_{step}": policy}
    stages["measure"] = MeasurePreference(policy=policy, reference=sft, data=data, test=data, overlong="drop")
    return Recipe("rest", stages, "grows a set of its own answers, improves on ever better parts of it")
