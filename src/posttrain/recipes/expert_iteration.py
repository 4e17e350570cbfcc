"""Expert iteration on answers that can be checked, as ReST-EM has it (Singh et al. 2023, "Beyond human data", arXiv 2312.06585)."""

from __future__ import annotations

from posttrain.stages import SFT, Generate, Label, Recipe, Select, Stage

GOLD = "posttrain.data.smallworld_gold:gold_total"


def expert_iteration(
    model: str = "small-base", data: str = "smallworld", reward: str = GOLD, least: float = 0.85, rounds: int = 3
) -> Recipe:
    """Expert iteration: the newest policy answers, and in each round the start is trained again on the answers that are right.

    Right is what ``reward`` scores ``least`` or more: 1 of a reward that checks, as in ``--model smollm2 --data gsm8k
    --reward math``. Without one it is the small world's own score, of which right answers of a fitting length have at
    least 0.85. Beginning from the start each time keeps what it knows beside the task. What follows is the laptop block, for
    the small base model, with the paper's number in brackets where it differs; a larger model wants adapters
    (``--policy0.lora-rank 16 --policy0.lr 3e-4``, and so on).
    """
    policy: Stage | str = model
    stages: dict[str, Stage] = {}
    for turn in range(rounds + 1):  # [3]
        own = Generate(
            model=policy,
            data=data,
            samples=8,  # [32, of problems in code 64]
            max_new_tokens=64,  # [1,024]
        )
        checked = Label(data=own, reward=reward, cut_score=-1.0)
        stages |= {f"own{turn}": own, f"checked{turn}": checked}
        if turn == rounds:  # these answers only show how good the last policy is
            break
        right = Select(data=checked, builder="best", options={"most": 10, "least": least})  # no more than 10 a prompt
        policy = SFT(
            model=model,
            data=right,
            epochs=2,  # [until held-out answers get no better]
            prompts_per_step=16,
            lr=1e-3,
        )
        stages |= {f"right{turn}": right, f"policy{turn}": policy}
    typed = {name: frozenset({"model"}) for name, stage in stages.items() if isinstance(stage, Generate | SFT)}
    return Recipe(
        "expert_iteration", stages, "learns from its own answers that are right, from the start in every round", typed
    )
