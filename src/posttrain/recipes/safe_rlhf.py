"""Safe RLHF: help and harm judged apart, reward under a limit on cost (Dai et al. 2023, arXiv 2310.12773)."""

from __future__ import annotations

from dataclasses import replace

from posttrain.recipes.safety import constrained
from posttrain.stages import SFT, EvaluateSafety, Recipe, RedTeam, Select, TrainReward, TrainScorer


def safe_rlhf(model: str = "smollm2", data: str = "default") -> Recipe:
    """Safe RLHF: a reward model and a cost model, PPO under a limit on cost, and a second round on prompts that went wrong.

    The paper has three rounds, with people's comparisons, a reward and a cost model new in each; here what the policy does wrong
    is found by its cost and one pair of models serves both rounds. What follows is the laptop block, with the paper's number
    in brackets. Data whose comparisons have the axes helpfulness and harmlessness (PKU-SafeRLHF, or ``--data smallworld-safety``)
    is split along them; of other rankings, answers called unsafe are the harm.
    """
    sft = SFT(model=model, data=data, epochs=2, prompts_per_step=8, lora_rank=16, lr=3e-4)  # [3, whole, 2e-5]
    helps = Select(data=data, part="rankings", builder="helpfulness")
    harms = Select(data=data, part="rankings", builder="harmlessness")
    held = Select(data=data, part="heldout_rankings", builder="harmlessness")
    scorer = {"epochs": 2, "prompts_per_step": 8, "lora_rank": 16, "lr": 5e-4}  # [2, 128, whole, 2e-5]
    reward = TrainReward(model=sft, data=helps, **scorer)
    cost = TrainScorer(model=sft, data=harms, kind="cost", head_seed=1, **scorer)
    first = replace(constrained("", ""), model=sft, data=data, reward=reward, cost=cost)
    red = RedTeam(model=first, data=data, cost=cost, samples=4, keep=0.5, max_new_tokens=64)
    second = replace(first, model=first, data=red, steps=16)
    evaluate = EvaluateSafety(
        policies=(sft, first, second), reward=reward, cost=cost, harms=held, data=data, max_new_tokens=64
    )
    stages = {"sft": sft, "helps": helps, "harms": harms, "heldout_harms": held, "reward": reward, "cost": cost}
    stages |= {"policy": first, "red_team": red, "policy2": second, "evaluate": evaluate}
    return Recipe("safe_rlhf", stages, "reward under a limit on cost, with prompts that went wrong")
