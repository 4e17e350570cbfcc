"""SPIN: fine-tuning by self-play (Chen et al. 2024, "Self-play fine-tuning converts weak language models to strong language models")."""

from __future__ import annotations

from posttrain.stages import SFT, EvaluatePreference, Generate, Prefer, Recipe, Select, Stage


def spin(model: str = "smollm2", data: str = "default", rounds: int = 3) -> Recipe:
    """SPIN: in each round the policy learns to tell the data's answers from those of the policy of the round before.

    Nobody judges: only demonstrations are read. Pairs of a round are joined by those of the round before. What follows is
    the laptop block, with the paper's number in brackets where it differs (appendix B).
    """
    policy: Stage = SFT(model=model, data=data, epochs=2, prompts_per_step=8, lora_rank=16, lr=3e-4)  # [Zephyr's SFT]
    start, own = policy, list[Stage]()
    stages: dict[str, Stage] = {"sft": start}
    for turn in range(rounds):  # [4]
        own.append(
            Generate(
                model=policy,
                data=data,
                part="demonstrations",
                samples=1,  # of each of the data's prompts [50k of them]
                max_new_tokens=64,
            )
        )
        pairs = Select(data=tuple(own[-2:]), builder="spin")
        policy = Prefer(
            model=policy,
            data=pairs,
            loss="dpo",  # the logistic loss of the margin, the reference being the policy of the round before
            beta=0.1 if turn < 3 else 5.0,
            epochs=2,
            prompts_per_step=8,  # [64]
            lora_rank=16,  # [0: the whole network]
            lr=1e-4 if turn < 2 else 5e-5,  # [5e-7, then 1e-7, by RMSprop]
            schedule="linear",
            warmup_steps=2,  # [a tenth of the steps]
        )
        stages |= {f"own{turn}": own[-1], f"pairs{turn}": pairs, f"policy{turn}": policy}
    stages["evaluate"] = EvaluatePreference(policy=policy, reference=start, data=data, test=data, overlong="drop")
    return Recipe("spin", stages, "self-play against the policy's own answers, from demonstrations alone")
