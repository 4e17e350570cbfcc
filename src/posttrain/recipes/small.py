"""The small model in its two forms, trained from nothing on the small world; ``make small`` copies them into the package."""

from __future__ import annotations

from posttrain.stages import SFT, Pretrain, Recipe


def small(documents: int = 34000) -> Recipe:
    """The shipped small model: pretraining on mixed-quality text, then supervised fine-tuning on good answers."""
    base = Pretrain(documents=documents, warmup_steps=200, max_tokens=4096, save_every=500)
    instruct = SFT(
        model=base,
        data=f"smallworld:{documents}",
        epochs=1,
        prompts_per_step=16,
        lr=1.5e-3,
        schedule="linear",
        warmup_steps=100,
        dtype="float32",
        max_tokens=4096,
        save_every=500,
    )
    return Recipe(
        "small", {"base": base, "instruct": instruct}, "a 1.8M-parameter model of the small world, base and instruct"
    )
