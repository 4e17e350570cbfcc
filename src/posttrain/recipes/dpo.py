"""DPO on pairs or rankings (Rafailov et al. 2023, "Direct preference optimization: your language model is secretly a reward model")."""

from __future__ import annotations

from posttrain.stages import SFT, EvaluatePreference, Prefer, Recipe, Stage


def dpo(
    model: str = "smollm2",
    data: str = "default",
    test: str = "default",
    sft: bool = False,
    limit: int | None = None,
    test_limit: int | None = None,
) -> Recipe:
    """Direct preference optimisation, after supervised fine-tuning if asked, measured on held-out rankings.

    ``sft`` trains on the data's demonstrations first. What follows is the laptop block, with the paper's numbers
    (appendix B) in brackets.
    """
    stages: dict[str, Stage] = {}
    start: str | Stage = model  # an instruct model has had its fine-tuning
    if sft:
        start = stages["sft"] = SFT(model=model, data=data, epochs=2, prompts_per_step=8, lora_rank=16, lr=3e-4)
    prefer = stages["dpo"] = Prefer(
        model=start,
        data=data,
        limit=limit,
        loss="dpo",
        beta=0.1,  # [0.1; 0.5 on summaries]
        epochs=2,  # [1]
        prompts_per_step=8,  # [64 pairs]; a ranking of four has six
        lora_rank=16,  # [0: the whole network]
        lr=1e-4,  # [1e-6, by RMSprop]: adapters take more, AdamW about as much
        warmup_steps=4,  # [150]
        max_length=1024,
        overlong="drop",
    )
    stages["evaluate"] = EvaluatePreference(
        policy=prefer, reference=start, data=data, test=test, limit=limit, test_limit=test_limit, overlong="drop"
    )
    return Recipe("dpo", stages, "preference optimisation without a reward model")
