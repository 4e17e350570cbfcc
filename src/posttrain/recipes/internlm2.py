"""InternLM2: COOL RLHF, a conditional reward model and online rounds (Cai et al. 2024, arXiv 2403.17297, section 4.3)."""

from __future__ import annotations

from posttrain.stages import SFT, Generate, Merge, Recipe, Reinforce, Stage, TrainScorer
from posttrain.stages.refining import AutoRate, Patch, Refine


def internlm2(model: str = "small-base", data: str = "smallworld", judge: str | None = None, rounds: int = 3) -> Recipe:
    """COOL RLHF: one reward model told the domain by a system prompt, PPO, and rounds with patches and labels where it errs.

    What follows is the laptop block for the small base model, with the paper's numbers in brackets. ``judge`` (module:function
    of a prompt and two answers) plays the annotators; without one a pairwise model of half of the rankings does.
    """
    sft = SFT(model=model, data=data, epochs=2, prompts_per_step=8, lr=1e-3)
    early = Generate(model=sft, data=data, samples=4, max_new_tokens=64)
    stages: dict[str, Stage] = {"sft": sft, "early": early}
    if judge is None:
        stages["judge"] = TrainScorer(model=sft, kind="pairwise", data=data, rows=(48, 96), epochs=4, **REWARD)
    people: Stage | str = judge or stages["judge"]
    rows: str | Stage = data
    for turn in range(rounds):  # [3]
        reward = TrainScorer(
            model=sft, kind="conditional", data=rows, epochs=2, domains=DOMAINS, **REWARD
        )  # [2.4M, 1 epoch]
        tuned = Reinforce(model=sft, data=data, reward=reward, max_new_tokens=64, **PPO)
        policy = Merge(policy=tuned, base=sft)
        stages |= {f"reward{turn}": reward, f"tuned{turn}": tuned, f"policy{turn}": policy}
        if turn < rounds - 1:
            late = Generate(model=policy, data=data, samples=4, max_new_tokens=64)
            slow = Refine(data=rows, samples=late, reward=reward, judge=people, count=96)
            rows = Patch(data=slow, early=early, late=late, judge=people, count=50)  # fast [20 to 100 pairs]
            stages |= {f"late{turn}": late, f"slow{turn}": slow, f"fast{turn}": rows}
    found = tuple(stages[f"policy{turn}"] for turn in range(rounds))
    stages["rated"] = AutoRate(policies=found, baseline=sft, reward=reward, judge=people, data=data, max_new_tokens=64)
    return Recipe("internlm2", stages, "a conditional reward model and online rounds")


REWARD = {"prompts_per_step": 8, "lr": 1e-3}  # [16,384 tokens, 1e-5 to 5e-6]
PPO = {
    "lora_rank": 16,  # [0: the whole network]
    "lr": 1e-3,  # [1e-6]
    "value_rank": 16,  # the critic is the reward model's trunk [the whole network]
    "value_lr": 1e-3,  # [5e-6]
    "value_warmup": 4,  # rollouts for the critic alone [50]
    "steps": 32,  # [400]
    "prompts_per_step": 16,  # [about 500]
    "samples_per_prompt": 2,
    "updates_per_rollout": 1,
    "kl": 0.01,
    "lam": 0.99,
    "value_clip": 1e6,  # none
    "ptx": 0.5,  # on half as many demonstrations as samples
    "ptx_share": 0.5,
    "cut_score": -1.0,
}
HELPFUL, HARMLESS, MATH = "score the help.", "score the harm.", "score the sum."
KINDS = "advise ask copy describe explain list plan reverse rewrite safe sort summarise"
DOMAINS = dict.fromkeys(KINDS.split(), HELPFUL) | {"harmful": HARMLESS, "decline": HARMLESS}
DOMAINS |= dict.fromkeys(["add", "arithmetic", "count"], MATH)
