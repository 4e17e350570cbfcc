"""PPO for a reward under a limit on cost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from posttrain.data.collate import prompt_ids
from posttrain.errors import ModelError
from posttrain.losses.policy import policy_losses
from posttrain.models.load import load_policy, load_reward, save_merged, value_role
from posttrain.models.lora import Lora
from posttrain.models.policy import Model
from posttrain.rewards.base import Reward
from posttrain.rewards.combine import with_part
from posttrain.rollout.engine import Sampling
from posttrain.rollout.local import LocalEngine
from posttrain.stages import Context, Stage
from posttrain.stages.safety import ReinforceSafely
from posttrain.train.diagnose import Watch, evidence_of
from posttrain.train.journal import Journal
from posttrain.train.loop import fit
from posttrain.train.optim import Optim
from posttrain.train.rollouts import Plan
from posttrain.train.safe import COST, ConstrainedPolicyGradient, ConstrainedRollouts, Constraint
from posttrain.work.inputs import Start, choose_dtype, load_examples, refuse_weights, stage_dir, start_from
from posttrain.work.reinforce import SamplesFile, blank_critic
from posttrain.work.rewarding import reads_alike, record_of, reward_of, scored_by
from posttrain.work.supervised import adapters, training_run


@dataclass(frozen=True)
class Judge:
    """What scores responses, and where it is a model its directory and the network that a critic can stand on."""

    score: Reward
    place: Path | None = None
    network: Model | None = None


def run(stage: ReinforceSafely, ctx: Context) -> None:
    """Sample, score, weigh reward against cost, update; then write the policy."""
    start = start_from(stage.model, ctx)
    dtype = choose_dtype(stage.dtype, start.path)
    policy = load_policy(start.path, dtype=dtype, lora=adapters(stage), train=True, seed=ctx.seed)
    reference = Model(policy.net) if policy.adapter else load_policy(start.path, dtype=dtype)
    most = 2 * stage.max_tokens
    good = judge_of(stage.reward, "reward", ctx, start, dtype, most)
    harm = judge_of(stage.cost, "cost", ctx, start, dtype, most)
    examples = load_examples(stage, ctx, "prompts")
    refuse_weights(examples, "reinforcement learning")
    ids, report = prompt_ids(start.tokenizer, examples, max_length=stage.max_length, overlong=stage.overlong)
    ctx.console.print(f"prompts: {report}", highlight=False)
    source = ConstrainedRollouts(
        plan=plan(stage, ctx.seed),
        examples=[examples[i] for i in report.index],
        prompt_ids=ids,
        engine=LocalEngine(policy, start.stop_ids, stage.slots),
        reward=with_part(good.score, harm.score, COST),
        reference=reference,
        value=critic(stage, good, start.path, ctx.seed, dtype),
        cost_value=critic(stage, harm, start.path, ctx.seed + 1, dtype),
        constraint=constraint(stage),
        clip=stage.token_clip,
        policy=policy,
        decode=start.decode,
        on_samples=SamplesFile(ctx.dir / "samples.jsonl").write,
        journal=Journal(ctx.dir / "journal"),
    )
    objective = ConstrainedPolicyGradient(
        loss=policy_losses.bound("ppo_clip", {"clip": stage.clip}),
        value_clip=stage.value_clip,
        temperature=stage.temperature,
        # bf16 rounds the logits of sampler and trainer apart; the ratio stays right, being taken to the sampler's own
        ratio_tolerance=1e-4 if dtype == torch.float32 else 0.1,
    )
    rates = {"value": stage.value_lr, "cost_value": stage.value_lr}
    optim = Optim(lr=stage.lr, role_lr=rates, schedule=stage.schedule, warmup_steps=stage.warmup_steps)
    assert source.value is not None
    roles = {"policy": policy, "value": source.value, "cost_value": source.cost_value}
    with Watch(ctx.dir, ctx.console, None, evidence_of(policy, reference, ids[0])) as watch:
        run = training_run(stage, ctx, stage.steps, ctx.dir.name)
        fit(roles, objective, source, optim=optim, run=run, hooks=[watch])
    save_merged(policy, start.path, ctx.dir, start.tokenizer)


def constraint(stage: ReinforceSafely) -> Constraint:
    """The stage's limit on cost and how its multiplier moves."""
    return Constraint(
        limit=stage.cost_limit,
        multiplier=stage.multiplier,
        rate=stage.multiplier_rate,
        most=stage.multiplier_most,
        window=stage.window,
    )


def judge_of(value: Stage | str, field: str, ctx: Context, start: Start, dtype: torch.dtype, max_tokens: int) -> Judge:
    """What a stage's ``reward`` or ``cost`` names: a model that reads the policy's own tokens, or a function.

    Raises:
        ModelError: a model of costs as the reward or the other way round, or one of other tokens.
    """
    if isinstance(value, str) and not Path(value).is_dir():
        return Judge(reward_of(value, ctx, dtype=dtype, max_tokens=max_tokens))
    place = stage_dir(value, ctx, field)
    record: dict[str, Any] = {"kind": "bradley_terry"} | record_of(place)
    if (field == "cost") != (record["sign"] < 0):
        wanted = "of kind 'cost'" if field == "cost" else "whose better answers score higher"
        raise ModelError(f"{field}: '{place}' is a reward model of kind '{record['kind']}'; expected one {wanted}")
    if not reads_alike(place, start.tokenizer):
        raise ModelError(f"{field}: '{place}' reads other tokens than the policy; train it from the policy's own start")
    network = load_reward(str(place), dtype=dtype)
    return Judge(scored_by(network, place, max_tokens=max_tokens), place, network)


def critic(stage: ReinforceSafely, judge: Judge, start: str, seed: int, dtype: torch.dtype) -> Model:
    """A value role on the judge's network, which keeps scoring with its adapter off; trained whole, a network of its own.

    Where the judge is a function, it begins as the policy's start with a head of zeros.
    """
    if judge.network is None:
        base = blank_critic(start, dtype, seed)
    else:
        base = judge.network if stage.lora_rank else load_reward(str(judge.place), dtype=dtype)
    if stage.lora_rank and not stage.value_rank:
        return value_role(base, lora=None, seed=seed, head_only=True)
    lora = Lora(rank=stage.value_rank, alpha=2 * stage.value_rank) if stage.lora_rank else None
    return value_role(base, lora=lora, seed=seed)


def plan(stage: ReinforceSafely, seed: int) -> Plan:
    """The stage's numbers as a rollout plan."""
    return Plan(
        prompts=stage.prompts_per_step,
        samples=stage.samples_per_prompt,
        updates=stage.updates_per_rollout,
        sampling=Sampling(max_new_tokens=stage.max_new_tokens, temperature=stage.temperature),
        kl=stage.kl,
        gamma=stage.gamma,
        lam=stage.lam,
        cut_score=stage.cut_score,
        seed=seed,
        max_tokens=2 * stage.max_tokens,
    )
