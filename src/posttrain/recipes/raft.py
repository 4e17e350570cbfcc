"""RAFT: learn from the best of several samples, again and again (Dong et al. 2023, "RAFT: reward ranked finetuning", arXiv 2304.06767)."""

from __future__ import annotations

from posttrain.stages import SFT, Generate, Label, MeasurePreference, Recipe, Select, Stage, TrainReward


def raft(model: str = "smollm2", data: str = "default", rounds: int = 3) -> Recipe:
    """RAFT: in each round the policy answers every prompt several times and imitates the answer that a reward model likes best.

    A round climbs as far as best of n does from the policy of the round before. What follows is the laptop block, with the
    paper's number in brackets where it differs (section 4 and appendix).
    """
    sft = SFT(model=model, data=data, epochs=2, prompts_per_step=8, lora_rank=16, lr=3e-4)  # [LLaMA-7B, 1 epoch]
    judge = TrainReward(model=sft, data=data, epochs=2, prompts_per_step=8, lora_rank=16, lr=5e-4)
    policy: Stage = sft
    stages: dict[str, Stage] = {"sft": sft, "judge": judge}
    for turn in range(1, rounds + 1):
        own = Generate(
            model=policy,
            data=data,  # all prompts [2,048 new ones]
            samples=8,  # [32]
            temperature=1.0,  # [0.85]
            max_new_tokens=64,  # [128]
        )
        scored = Label(data=own, reward=judge, cut_score=-100.0)  # an answer without its end is never the best
        kept = Select(data=scored, builder="best", options={"most": 1})
        policy = SFT(
            model=policy,
            data=kept,
            epochs=2,
            prompts_per_step=8,  # [32]
            lora_rank=16,  # [0: the whole network]
            lr=2e-4,  # [2e-5]
        )
        stages |= {f"own{turn}": own, f"scored{turn}": scored, f"kept{turn}": kept, f"policy{turn}": policy}
    stages["measure"] = MeasurePreference(policy=policy, reference=sft, data=data, test=data, overlong="drop")
    return Recipe("raft", stages, "learns from the best of its own answers, round after round")
