"""Hermes 3: supervised fine-tuning, then DPO on an adapter whose base is the reference (Teknium et al. 2024, arXiv 2408.11857)."""

from __future__ import annotations

from posttrain.stages import SFT, EvaluatePreference, Prefer, Recipe


def hermes3(model: str = "smollm2", data: str = "default", test: str = "default") -> Recipe:
    """Fine-tuning, then DPO with LoRA: the reference is the model with its adapter off, and embeddings get NEFTune noise.

    What follows is the laptop block, with the report's numbers in brackets. Its DPO used RMSProp and dropout 0.05 on the
    adapters; here AdamW, and no dropout.
    """
    sft = SFT(
        model=model,
        data=data,
        epochs=2,  # [4] of 390M tokens
        prompts_per_step=8,  # [48 packed rows of 8192 tokens]
        lr=3e-4,  # [7e-6, the whole network]: adapters take more
        lora_rank=16,  # [0]
        warmup_steps=4,  # [300]
    )
    prefer = Prefer(
        model=sft,
        data=data,
        loss="dpo",
        beta=0.1,
        lora_rank=32,  # [32]
        lora_alpha=16,  # [16]
        noise=5.0,  # [5]
        lr=2e-4,  # [3e-6]
        schedule="linear",  # [linear]
        warmup_steps=4,  # [9]
        epochs=1,
        prompts_per_step=8,
        max_length=1024,
        overlong="drop",
    )
    evaluate = EvaluatePreference(policy=prefer, reference=sft, data=data, test=test, overlong="drop")
    stages = {"sft": sft, "dpo": prefer, "evaluate": evaluate}
    return Recipe("hermes3", stages, "DPO on an adapter, the base without it as reference")
