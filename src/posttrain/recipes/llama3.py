"""Llama 3: six rounds of reward model, rejection sampling, fine-tuning, DPO, each an average (Llama team 2024, arXiv 2407.21783)."""

from __future__ import annotations

from posttrain.stages import SFT, Generate, Label, MeasurePreference, Merge, Prefer, Recipe, Select, Stage, TrainReward


def llama3(model: str = "small-base", data: str = "smallworld", judge: str | None = None, rounds: int = 6) -> Recipe:
    """Rounds in which the best model so far answers, people compare, a reward model picks what the next model learns from.

    What follows is the laptop block, for the small base model, with the paper's numbers in brackets (section 4.1).
    ``judge`` (module:function of prompt and two answers) is whom annotators are played by; without one it is a reward model of the
    data's rankings. Each round trains again from ``model``; averages are of runs that differ in batch and beta.
    """
    best: Stage = SFT(model=model, data=data, prompts_per_step=8, epochs=2, lr=1e-3)
    annotator: Stage | str = judge or TrainReward(model=best, data=data, prompts_per_step=8, epochs=2, lr=1e-3)
    stages: dict[str, Stage] = {"start": best}
    if isinstance(annotator, Stage):
        stages["annotator"] = annotator
    compared = list[Stage]()
    for turn in range(1, rounds + 1):  # [6]
        asked = Generate(model=best, data=data, samples=4, max_new_tokens=64)  # [2 or more, of several models]
        compared.append(Label(data=asked, reward=annotator))
        ranked = Select(data=tuple(compared), builder="ranked")  # all comparisons so far
        reward = TrainReward(model=best, data=ranked, prompts_per_step=16, epochs=1, lr=1e-3)  # [no margin]
        own = Generate(model=best, data=data, part="demonstrations", samples=8, max_new_tokens=64)  # [10 to 30]
        scored = Label(data=own, reward=reward, part="samples")  # the data's own answer is one of them
        kept = Select(data=scored, builder="best", options={"most": 2})
        fine = [SFT(model=model, data=kept, prompts_per_step=n, epochs=3, lr=1e-3) for n in (16, 24)]  # [lr 1e-5]
        sft = Merge(policy=fine[0], others=(fine[1],), base=fine[0])
        pairs = Select(data=tuple(compared[-2:]), builder="best_worst", options={"margin": 0.3})  # clearly better
        after = [
            Prefer(
                model=sft,
                data=pairs,
                loss="dpo_nll_masked",  # format tokens masked in both answers
                options={"weight": 0.2, "beta": beta},  # [0.2, 0.1]
                prompts_per_step=16,
                epochs=2,
                lr=4e-4,  # [1e-5]
                warmup_steps=2,
            )
            for beta in (0.1, 0.2)
        ]
        best = Merge(policy=after[0], others=(after[1],), base=sft)
        made = {"asked": asked, "compared": compared[-1], "ranked": ranked, "reward": reward}
        made |= {"own": own, "scored": scored, "kept": kept, "sft_a": fine[0], "sft_b": fine[1], "sft": sft}
        made |= {"pairs": pairs, "dpo_a": after[0], "dpo_b": after[1], "model": best}
        stages |= {f"{name}{turn}": stage for name, stage in made.items()}
    stages["measure"] = MeasurePreference(policy=best, reference=stages["start"], data=data, test=data)
    return Recipe("llama3", stages, "rounds of reward model, rejection sampling, fine-tuning and DPO, averaged")
