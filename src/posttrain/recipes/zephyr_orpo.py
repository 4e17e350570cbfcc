"""Zephyr 141B-A35B: one stage of ORPO from a base model (Hugging Face H4, Argilla and KAIST 2024; Hong et al. 2024, arXiv 2403.07691)."""

from __future__ import annotations

from posttrain.stages import MeasurePreference, Prefer, Recipe


def zephyr_orpo(model: str = "small-base", data: str = "smallworld", test: str = "smallworld") -> Recipe:
    """ORPO from a base model: the likelihood of chosen answers and the odds against rejected ones, in one stage, without reference.

    What follows is the laptop block, for the small base model, with the released configuration's numbers in brackets (7k
    pairs of Capybara, AdamW in 8 bits). Another model wants ``--orpo.lora-rank 16 --orpo.lr 2e-4``.
    """
    orpo = Prefer(
        model=model,  # [Mixtral 8x22B, a base]
        data=data,
        loss="orpo",
        options={"lam": 0.05},  # [0.05]
        epochs=3,  # [3]
        prompts_per_step=8,  # [32]
        lr=1e-3,  # [5e-6]
        schedule="cosine",  # [inverse square root]
        warmup_steps=4,  # [100]
        max_length=1024,  # [2048]
        overlong="drop",
    )
    measure = MeasurePreference(policy=orpo, reference=model, data=data, test=test, overlong="drop")
    held = {"orpo": frozenset({"model", "lr", "epochs"}), "measure": frozenset({"reference"})}
    stages = {"orpo": orpo, "measure": measure}
    return Recipe("zephyr_orpo", stages, "one stage from a base model, without reference", typed=held)
