"""Reinforcement learning of a policy against a reward model."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from posttrain.data.collate import prompt_ids
from posttrain.losses.shaping import mismatch_weights
from posttrain.models.load import load_policy, new_reward, save_merged, value_role
from posttrain.models.lora import Lora, save_adapter
from posttrain.models.policy import Model
from posttrain.rewards.base import Reward
from posttrain.rollout.engine import Sampling
from posttrain.rollout.environment import find_environment
from posttrain.rollout.local import LocalEngine
from posttrain.stages import Context, Reinforce
from posttrain.train.diagnose import Watch, evidence_of
from posttrain.train.ema import Average
from posttrain.train.journal import Journal
from posttrain.train.log import JsonLines
from posttrain.train.loop import fit
from posttrain.train.online_merging import OnlineMerge
from posttrain.train.optim import Optim
from posttrain.train.policy_gradient import estimator, policy_gradient
from posttrain.train.rollouts import Plan, RolloutSource
from posttrain.work.beside import against_start, around, with_gold
from posttrain.work.conversing import conversing, offered
from posttrain.work.inputs import Start, choose_dtype, load_examples, refuse_weights, start_from
from posttrain.work.online_merging import merged_steps
from posttrain.work.rewarding import judge_dir, network_of, reads_ids, reward_of, scored_by
from posttrain.work.supervised import adapters, training_run


def run(stage: Reinforce, ctx: Context) -> None:
    """Sample, score, update; then write the policy."""
    row, start = stage.row(), start_from(stage.model, ctx)
    dtype = choose_dtype(stage.dtype, start.path)
    policy = load_policy(start.path, dtype=dtype, lora=adapters(stage), train=True, seed=ctx.seed)
    reference = Model(policy.net) if policy.adapter else load_policy(start.path, dtype=dtype)
    reward, scorer = rewarded(stage, ctx, start, dtype)
    value = critic(stage, scorer, start.path, ctx, dtype) if "critic" in row.needs else None
    environment = None if stage.environment is None else find_environment(stage.environment)
    examples = offered(load_examples(stage, ctx, "prompts"), environment)
    refuse_weights(examples, "reinforcement learning")
    ids, report = prompt_ids(start.tokenizer, examples, max_length=stage.max_length, overlong=stage.overlong)
    ctx.console.print(f"prompts: {report}", highlight=False)
    examples = [examples[i] for i in report.index]
    reward = against_start(stage, ctx, start, reference, reward, examples, ids)
    reward, gold = with_gold(stage, ctx, start, reward, dtype)
    samples = SamplesFile(ctx.dir / "samples.jsonl")
    source = RolloutSource(
        plan=plan(stage, ctx.seed),
        examples=examples,
        prompt_ids=ids,
        engine=conversing(
            LocalEngine(policy, start.stop_ids, stage.slots), environment, start, examples, ids, stage.max_length
        ),
        reward=reward,
        reference=reference,
        value=value,
        advantage=estimator(row, gamma=stage.gamma, lam=stage.lam),
        policy=policy,
        mismatch=None if stage.mismatch is None else mismatch_weights[stage.mismatch],
        decode=start.decode,
        on_samples=samples.write,
        journal=Journal(ctx.dir / "journal"),
    )
    objective = policy_gradient(
        row,
        longest=stage.max_new_tokens,
        value_clip=stage.value_clip,
        temperature=stage.temperature,
        # bf16 rounds the logits of sampler and trainer apart; the ratio stays right, being taken to the sampler's own
        ratio_tolerance=1e-4 if dtype == torch.float32 else 0.1,
    )
    source, objective = around(stage, ctx, start, source, objective)
    average = averaged(stage, reference)
    run = training_run(stage, ctx, stage.steps, "reinforce")
    if stage.max_kl is not None:  # the last checkpoint that was measured is one of those before the newest rollout
        run = replace(run, keep=max(run.keep, 1 + math.ceil(stage.updates_per_rollout / run.save_every)))
    evidence = dict if stage.anchor else evidence_of(policy, reference, ids[0])  # an anchor is meant to move
    watch = Watch(ctx.dir, ctx.console, stage.max_kl, evidence)
    with ExitStack() as stack:
        hooks = [stack.enter_context(hook) for hook in (gold, watch) if hook is not None]
        roles = {"policy": policy} | ({} if value is None else {"value": value})
        roles |= {"reference": reference} if "kl_to_other" in objective.reads["policy"] else {}
        optim = optimiser(stage, merged_steps(stage, ctx, start, policy), average)
        fit(roles, objective, source, optim=optim, run=run, hooks=hooks)
    if average is not None and stage.ema:
        average.put(policy.parameters())
    save(policy, stage, start.path, ctx.dir, start.tokenizer)


def averaged(stage: Reinforce, reference: Model) -> Average | None:
    """The average of the policy's weights: to be written at the end, or as the reference that follows."""
    if stage.anchor:
        return Average(1 - stage.anchor, into=dict(reference.net.named_parameters()))
    return Average(stage.ema) if stage.ema else None


def rewarded(stage: Reinforce, ctx: Context, start: Start, dtype: torch.dtype) -> tuple[Reward, Model | None]:
    """The stage's reward, and the network that a critic can stand on: the very one that scores, where it reads sampled ids."""
    judge, most = judge_dir(stage.reward, ctx), 2 * stage.max_tokens
    scorer = None if judge is None else network_of(judge, start.tokenizer, dtype)
    if scorer is None or judge is None or not reads_ids(judge, start.tokenizer):
        return reward_of(stage.reward, ctx, dtype=dtype, max_tokens=most, tokenizer=start.tokenizer), scorer
    return scored_by(scorer, judge, max_tokens=most), scorer


def optimiser(stage: Reinforce, merge: OnlineMerge | None, average: Average | None) -> Optim:
    """The stage's optimiser; one whose steps are fused into the backward pass clips nothing."""
    return Optim(
        lr=stage.lr,
        role_lr={"value": stage.value_lr},
        schedule=stage.schedule,
        warmup_steps=stage.warmup_steps,
        clip=math.inf if stage.fused else 1.0,
        merge=merge,
        average=average,
        fused=stage.fused,
    )


def critic(stage: Reinforce, scorer: Model | None, start: str, ctx: Context, dtype: torch.dtype) -> Model:
    """The value role on the reward model's network, which keeps scoring with its adapter off.

    A critic trained as a whole gets a network of its own. Where the reward is no model, or one that reads other tokens, the
    critic begins as the policy's start with a head of zeros.
    """
    judge = judge_dir(stage.reward, ctx)
    if scorer is None or judge is None:
        base = blank_critic(start, dtype, ctx.seed)
    else:
        base = scorer if stage.lora_rank else network_of(judge, None, dtype)
        assert base is not None
    if stage.lora_rank and not stage.value_rank:
        return value_role(base, lora=None, seed=ctx.seed, head_only=True)
    lora = Lora(rank=stage.value_rank, alpha=2 * stage.value_rank) if stage.lora_rank else None
    return value_role(base, lora=lora, seed=ctx.seed + 1)


def blank_critic(start: str, dtype: torch.dtype, seed: int) -> Model:
    """What a critic stands on where no reward model's network can be: the policy's start, with a head of zeros."""
    base = new_reward(start, dtype=dtype, seed=seed)
    base.net.requires_grad_(False)
    assert base.scalar is not None
    torch.nn.init.zeros_(base.scalar.weight)
    return base


def plan(stage: Reinforce, seed: int) -> Plan:
    """The stage's numbers as a rollout plan."""
    row = stage.row()
    return Plan(
        prompts=stage.prompts_per_step,
        samples=stage.samples_per_prompt,
        updates=stage.updates_per_rollout,
        sampling=Sampling(max_new_tokens=stage.max_new_tokens, temperature=stage.temperature),
        kl=row.numbers["kl"] if row.penalty.startswith("reward") else 0.0,
        kl_target=stage.kl_target,
        least=2 if row.needs & {"groups", "pairs"} else 1,
        greedy="greedy" in row.needs,
        rounds=row.numbers["rounds"],
        mask_cut=stage.mask_cut,
        overlong_share=row.numbers["overlong_share"],
        gamma=stage.gamma,
        lam=stage.lam,
        whiten_rewards=stage.whiten_rewards,
        cut_score=stage.cut_score,
        seed=seed,
        max_tokens=2 * stage.max_tokens,
    )


class SamplesFile:
    """``samples.jsonl``, opened at the first write so that a resumed run cuts it back to where it goes on."""

    def __init__(self, path: Path) -> None:
        """Write to ``path``."""
        self.path = path
        self.lines: JsonLines | None = None

    def write(self, step: int, records: list[dict[str, Any]]) -> None:
        """Append the responses of a rollout, forced to disk."""
        self.lines = self.lines or JsonLines(self.path, step)
        self.lines.write(step, *records)
        self.lines.sync()


def save(policy: Model, stage: Reinforce, base: str, directory: Path, tokenizer: Any) -> None:
    """Write the adapter for peft, or the whole model."""
    if policy.adapter is None:
        save_merged(policy, base, directory / "policy", tokenizer)
        return
    shape = Lora(rank=stage.lora_rank, alpha=stage.lora_alpha)
    save_adapter(policy.net, policy.adapter, directory / "policy", str(base), shape)
    tokenizer.save_pretrained(directory / "policy")


def load_trained(directory: Path, base: str, dtype: torch.dtype) -> Model:
    """Load what `save` wrote: the base with the adapter on, or the model directory."""
    if not (directory / "adapter_config.json").exists():
        return load_policy(str(directory), dtype=dtype)
    from posttrain.models.lora import load_adapter

    model = load_policy(base, dtype=dtype)
    load_adapter(model.net, model.net.base_model, "policy", directory)
    return replace(model, adapter="policy")
