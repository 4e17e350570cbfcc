"""SLiC-HF, sample and rank (Zhao et al. 2023, "SLiC-HF: sequence likelihood calibration with human feedback")."""

from __future__ import annotations

from posttrain.stages import SFT, EvaluatePreference, Generate, Label, Prefer, Recipe, Select, TrainReward


def slic_hf(model: str = "smollm2", data: str = "default") -> Recipe:
    """SLiC-HF: the supervised policy's samples meet in a tournament, and its likelihoods are calibrated by who won.

    What follows is the laptop block, with the paper's number in brackets where it differs.
    """
    sft = SFT(model=model, data=data, epochs=2, prompts_per_step=8, lora_rank=16, lr=3e-4)  # [T5-large, whole]
    ranker = TrainReward(
        model=sft,  # [T5-XXL that reads both answers]; ours scores each
        data=data,
        epochs=2,
        prompts_per_step=8,
        lora_rank=16,
        lr=5e-4,
    )
    samples = Generate(model=sft, data=data, samples=8, temperature=0.7, top_k=40, max_new_tokens=64)
    scored = Label(data=samples, reward=ranker, cut_score=-1.0)
    pairs = Select(data=scored, builder="tournament")  # seven pairs of eight samples
    policy = Prefer(
        model=sft,
        data=pairs,
        loss="slic",  # no reference: the likelihood of the winner holds the policy, which the paper found as good as the target's
        options={"delta": 1.0, "lam": 0.1},  # [1.0, not said]
        epochs=1,
        prompts_per_step=16,  # [32 pairs]
        lora_rank=16,  # [0: the whole network]
        lr=5e-5,  # [1e-5, by Adafactor]
        warmup_steps=4,
    )
    evaluate = EvaluatePreference(policy=policy, reference=sft, data=data, test=data, overlong="drop")
    stages = {"sft": sft, "ranker": ranker, "samples": samples, "scored": scored, "pairs": pairs}
    stages |= {"policy": policy, "evaluate": evaluate}
    return Recipe("slic_hf", stages, "sequence likelihoods calibrated by a tournament of samples")
