"""SPPO: rounds of self-play in which win rates are what log-ratios are to become (Wu et al. 2024, arXiv 2405.00675)."""

from __future__ import annotations

from posttrain.stages import SFT, Generate, Label, MeasurePreference, Prefer, Recipe, Select, Stage, TrainReward


def sppo(model: str = "smollm2", data: str = "default", judge: str | None = None, rounds: int = 3) -> Recipe:
    """Self-play: each round estimates how often an answer beats the policy's own samples, and moves log-ratios towards that.

    What follows is the laptop block, with the paper's number in brackets where it differs (section 5). ``judge`` is a comparison,
    module:function of prompt and two answers [PairRM]; without one it is a reward model of the data's rankings.
    """
    policy: Stage = SFT(model=model, data=data, epochs=2, prompts_per_step=8, lora_rank=16, lr=3e-4)  # [instruct]
    stages: dict[str, Stage] = {"sft": policy}
    start, ranker = policy, judge
    if ranker is None:
        ranker = TrainReward(model=start, data=data, epochs=2, prompts_per_step=8, lora_rank=16, lr=5e-4)
        stages["ranker"] = ranker
    for turn in range(1, rounds + 1):  # [3]
        samples = Generate(
            model=policy,
            data=data,  # [another third of 60k prompts each round]
            samples=5,  # [5]
            temperature=0.7,
            top_p=0.9,
            max_new_tokens=64,
        )
        rated = Label(data=samples, reward=ranker)  # each answer's mean probability to beat one of the five
        pairs = Select(data=rated, builder="best_worst")  # trained on, with their win rates against all five
        policy = Prefer(
            model=policy,  # which is also the reference of this round
            data=pairs,
            loss="sppo",
            options={"eta": 30},  # [1000]: a target within reach of few steps
            epochs=2,
            prompts_per_step=8,  # [64]
            lora_rank=16,  # [0: the whole network]
            lr=1e-4,  # [5e-7, by RMSprop]
            schedule="linear",
            warmup_steps=2,  # [a tenth of the steps]
        )
        stages |= {f"samples{turn}": samples, f"rated{turn}": rated, f"pairs{turn}": pairs, f"policy{turn}": policy}
    stages["measure"] = MeasurePreference(policy=policy, reference=start, data=data, test=data, overlong="drop")
    return Recipe("sppo", stages, "self-play with win rates against the policy's own samples")
