"""Phi-3: supervised fine-tuning, then DPO with unwanted behaviour as rejected (Abdin et al. 2024, arXiv 2404.14219, section 4)."""

from __future__ import annotations

from posttrain.stages import SFT, MeasurePreference, Prefer, Recipe, Select


def phi3(model: str = "smollm2", data: str = "default", test: str = "default") -> Recipe:
    """Fine-tuning, then DPO against outputs that show what the model is not to do; the data names them as failures.

    The report publishes no numbers; what follows is the laptop block alone.
    """
    sft = SFT(model=model, data=data, epochs=2, prompts_per_step=8, lora_rank=16, lr=3e-4, warmup_steps=4)
    pairs = Select(data=data, part="rankings", builder="unwanted")
    prefer = Prefer(
        model=sft,
        data=pairs,
        loss="dpo",
        beta=0.1,
        epochs=1,
        prompts_per_step=8,
        lora_rank=16,
        lr=1e-4,
        warmup_steps=4,
        max_length=1024,
        overlong="drop",
    )
    measure = MeasurePreference(policy=prefer, reference=sft, data=data, test=test, overlong="drop")
    stages = {"sft": sft, "pairs": pairs, "dpo": prefer, "measure": measure}
    return Recipe("phi3", stages, "fine-tuning, then unwanted behaviour as rejected")
