"""DNO: batched on-policy learning from pairs with a large gap, a teacher's answer among them (Rosset et al. 2024, arXiv 2404.03715)."""

from __future__ import annotations

from posttrain.stages import SFT, Generate, Label, MeasurePreference, Prefer, Recipe, Select, Stage, TrainReward

COMPARED = {"least": 0.6, "gap": 0.4, "own_gap": 0.2}  # [5, 2, 1 of 6 points]: probabilities to beat the others
SCORED = {"least": 0.0, "gap": 1.0, "own_gap": 0.5}  # of a reward model, whose mean on the data's answers is 0


def dno(model: str = "smollm2", data: str = "default", judge: str | None = None, rounds: int = 3) -> Recipe:
    """DNO in its practical form: a judge rates five samples and the teacher's answer, and pairs far apart are learnt from.

    What follows is the laptop block, with the paper's number in brackets where it differs (section 4). The teacher's answers are the
    data's demonstrations. ``judge`` is a comparison, module:function of prompt and two answers [GPT-4, in points]; without
    one it is a reward model of the data's rankings.
    """
    policy: Stage = SFT(model=model, data=data, epochs=2, prompts_per_step=8, lora_rank=16, lr=3e-4)  # [Orca 2.5]
    stages: dict[str, Stage] = {"sft": policy}
    start, ranker, rated = policy, judge, list[Stage]()
    if ranker is None:
        ranker = TrainReward(model=start, data=data, epochs=2, prompts_per_step=8, lora_rank=16, lr=5e-4)
        stages["ranker"] = ranker
    for turn in range(1, rounds + 1):  # [6]
        answers = Generate(
            model=policy, data=data, part="demonstrations", samples=5, temperature=0.7, top_p=0.95, max_new_tokens=64
        )
        rated.append(Label(data=answers, reward=ranker))
        stages |= {f"answers{turn}": answers, f"rated{turn}": rated[-1]}
        if turn > 1:  # [at most 30 % of the round before, 15 % of the one before that]
            stages[f"old{turn}"] = Select(data=rated[-2], builder="ranked", chunk=(turn % 3, 3))
        batch = (rated[-1], stages[f"old{turn}"]) if turn > 1 else rated[-1]
        pairs = Select(data=batch, builder="dno", options=COMPARED if judge else SCORED)
        policy = Prefer(
            model=policy,  # which is also the reference of this round
            data=pairs,
            loss="dpo",
            beta=0.1,  # [0.1 or 0.05]
            epochs=1,
            prompts_per_step=16,  # [64]
            lora_rank=16,  # [0: the whole network]
            lr=1e-4,  # [5e-5, lower later]
            warmup_steps=2,
        )
        stages |= {f"pairs{turn}": pairs, f"policy{turn}": policy}
    stages["measure"] = MeasurePreference(policy=policy, reference=start, data=data, test=data, overlong="drop")
    return Recipe("dno", stages, "batched on-policy pairs with a large gap, a teacher's answer among them")
