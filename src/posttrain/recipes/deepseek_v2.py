"""DeepSeek-V2: GRPO in two stages, reasoning first, then preferences by several rewards (DeepSeek-AI 2024, arXiv 2405.04434)."""

from __future__ import annotations

from dataclasses import replace

from posttrain.stages import SFT, Merge, Recipe, Reinforce, Select, TrainReward
from posttrain.stages.checked import EvaluateTask, MixRewards


def deepseek_v2(model: str = "small-base", data: str = "sums", general: str = "smallworld") -> Recipe:
    """DeepSeek-V2: fine-tuning, GRPO on checked reasoning, then GRPO on preferences, ``c1 helpful + c2 safe + c3 rule``.

    What follows is the laptop block, for the small base model, with the paper's numbers in brackets (section 4); its three
    coefficients, GRPO's sizes and rates were not published. Where it learns a reward of reasoning, a program checks answers here.
    """
    worked = Select(data=data, part="demonstrations", builder="demonstrated")
    said = Select(data=general, part="demonstrations", builder="demonstrated")
    both = Select(data=(worked, said), builder="demonstrated")
    sft = SFT(model=model, data=both, epochs=2, prompts_per_step=8, lr=1e-3)  # [1.5M rows, 2 epochs, 5e-6]
    helpful = TrainReward(model=sft, data=general, **REWARD)
    harms = Select(data=general, part="rankings", builder="harmlessness")
    safe = TrainReward(model=sft, data=harms, head_seed=1, **REWARD)
    rule = "posttrain.rewards.tagged:finished"
    reward = MixRewards(rewards=(helpful, safe), named=(rule, "accuracy"), weights=(1.0, 0.5, 0.5, 1.0), where=WHERE)
    learnt1 = Reinforce(model=sft, data=data, reward=reward, steps=32, **RL)
    reason = Merge(policy=learnt1, base=sft)
    learnt2 = Reinforce(model=reason, data=general, reward=reward, steps=32, **RL)
    prefer = Merge(policy=learnt2, base=reason)
    checks = EvaluateTask(policies=(sft, reason, prefer), reward="accuracy", data=data, max_new_tokens=96)
    tastes = EvaluateTask(policies=(sft, reason, prefer), reward=reward, data=general, max_new_tokens=96)
    stages = {"worked": worked, "said": said, "both": both, "sft": sft, "helpful": helpful, "harms": harms}
    stages |= {"safe": safe, "reward": reward, "learnt1": learnt1, "reason": reason}
    stages |= {"learnt2": learnt2, "prefer": prefer, "checks": checks, "tastes": tastes}
    return Recipe("deepseek_v2", stages, "reasoning first, then preferences", typed=dict.fromkeys(stages, HELD))


def mixed(model: str = "small-base", data: str = "sums", general: str = "smallworld") -> Recipe:
    """The same with both kinds of prompts in every step, for as many steps: what two stages are compared with."""
    old = deepseek_v2(model, data, general).stages
    checked = Select(data=data, part="prompts", builder="asked")
    asked = Select(data=general, part="prompts", builder="asked")
    prompts = Select(data=(checked, asked), builder="asked")
    kept = ("worked", "said", "both", "sft", "helpful", "harms", "safe", "reward")
    stages = {name: old[name] for name in kept}
    learnt = Reinforce(model=old["sft"], data=prompts, reward=old["reward"], steps=64, **RL)
    policy = Merge(policy=learnt, base=old["sft"])
    stages |= {"checked": checked, "asked": asked, "prompts": prompts, "learnt": learnt, "prefer": policy}
    stages |= {k: replace(old[k], policies=(old["sft"], policy)) for k in ("checks", "tastes")}
    return Recipe("deepseek_v2_mixed", stages, "reasoning and preferences at once", typed=dict.fromkeys(stages, HELD))


REWARD = {"epochs": 2, "prompts_per_step": 8, "lr": 1e-3}
WHERE = ("open", "open", "open", "checked")
RL = {"algorithm": "grpo", "kl": 0.01, "lr": 3e-4, "warmup_steps": 4, "prompts_per_step": 16, "samples_per_prompt": 8}
RL |= {"updates_per_rollout": 2, "max_new_tokens": 96, "cut_score": -1.0, "slots": 128}
HELD = frozenset({"data", "lr", "max_new_tokens", "updates_per_rollout", "reward", "lora_rank"})
