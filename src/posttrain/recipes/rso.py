"""RSO: pairs of samples by statistical rejection, then preference optimisation (Liu et al. 2023, arXiv 2309.06657)."""

from __future__ import annotations

from posttrain.stages import SFT, EvaluatePreference, Generate, Label, Prefer, Recipe, Select, TrainReward


def rso(model: str = "smollm2", data: str = "default") -> Recipe:
    """RSO: the policy's samples, accepted so that they follow the best policy that the reward allows, paired and learnt from.

    What follows is the laptop block, with the paper's number in brackets where it differs (section 4 and appendix).
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
    candidates = Generate(
        model=sft,
        data=data,
        samples=16,  # [64]
        temperature=0.7,
        top_k=40,
        max_new_tokens=64,
    )
    scored = Label(data=candidates, reward=ranker, cut_score=-1.0)
    pairs = Select(
        data=scored,
        builder="rso",  # first-round ranking, as in the paper's main results
        options={"samples": 4, "beta": 0.5},  # [8, 0.5]
    )
    policy = Prefer(
        model=sft,
        data=pairs,
        loss="rso_sigmoid",  # normalised by the supervised policy
        options={"gamma": 0.05},
        epochs=2,
        prompts_per_step=16,  # [32 pairs]
        lora_rank=16,  # [0: the whole network]
        lr=1e-4,  # [1e-5, by Adafactor]
        warmup_steps=4,
    )
    evaluate = EvaluatePreference(policy=policy, reference=sft, data=data, test=data, overlong="drop")
    stages = {"sft": sft, "ranker": ranker, "candidates": candidates, "scored": scored, "pairs": pairs}
    stages |= {"policy": policy, "evaluate": evaluate}
    return Recipe("rso", stages, "pairs of samples by statistical rejection, then preference optimisation")
