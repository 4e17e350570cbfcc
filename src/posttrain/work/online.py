"""Preference optimisation of a policy on its own fresh samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from posttrain.data.collate import prompt_ids
from posttrain.forest import Row
from posttrain.models.load import load_policy, save_merged
from posttrain.models.policy import Model
from posttrain.rollout.engine import Engine, Sampling
from posttrain.rollout.local import LocalEngine
from posttrain.rollout.mixture import ByDraw, MixtureEngine
from posttrain.stages import Context, PreferOnline
from posttrain.train.journal import Journal
from posttrain.train.loop import fit
from posttrain.train.objectives import objective_of
from posttrain.train.online import OnlineSource, opponent
from posttrain.train.reference import row_logp
from posttrain.train.rollouts import Plan
from posttrain.work.inputs import Start, choose_dtype, load_examples, refuse_weights, start_from
from posttrain.work.online_merging import merged_steps
from posttrain.work.prefer import MARGIN, token_columns
from posttrain.work.reinforce import SamplesFile
from posttrain.work.rewarding import compares, reward_of
from posttrain.work.supervised import adapters, optimiser, training_run


def run(stage: PreferOnline, ctx: Context) -> None:
    """Sample, score, put in order, update; then write the policy."""
    start = start_from(stage.model, ctx)
    dtype = choose_dtype(stage.dtype, start.path)
    objective = objective_of(stage.loss, stage.loss_options(), MARGIN[dtype])
    policy = load_policy(start.path, dtype=dtype, lora=adapters(stage), train=True, seed=ctx.seed)
    against = "reference" in objective.facts.get("needs", ("reference",))
    own = Model(policy.net) if policy.adapter else None
    reference = (own or load_policy(start.path, dtype=dtype)) if against else None
    merge = merged_steps(stage, ctx, start, policy)
    examples = load_examples(stage, ctx, "prompts")
    refuse_weights(examples, "learning from fresh samples")
    ids, report = prompt_ids(start.tokenizer, examples, max_length=stage.max_length, overlong=stage.overlong)
    ctx.console.print(f"prompts: {report}", highlight=False)
    samples = SamplesFile(ctx.dir / "samples.jsonl")

    def columns(rows: Sequence[Row]) -> dict[str, list[Tensor]]:
        known = token_columns(objective, reference or policy, rows, start, stage.max_tokens)
        return known | ({"ref_logp": row_logp(reference, rows, max_tokens=stage.max_tokens)} if reference else {})

    source = OnlineSource(
        plan=plan(stage, ctx.seed),
        examples=[examples[i] for i in report.index],
        prompt_ids=ids,
        engine=engine(stage, objective, policy, reference, start),
        reward=reward_of(stage.reward, ctx, dtype=dtype, max_tokens=2 * stage.max_tokens, tokenizer=start.tokenizer),
        reference=reference,
        value=None,
        policy=policy,
        decode=start.decode,
        on_samples=samples.write,
        journal=Journal(ctx.dir / "journal"),
        objective=objective,
        token_columns=columns,
        compared=compares(stage.reward),
        max_length=stage.max_length + stage.max_new_tokens,
    )
    run = training_run(stage, ctx, stage.steps, ctx.dir.name)
    roles = {"policy": policy}
    if reference is not None and "kl" in objective.facts.get("reads", ()):
        roles["reference"] = reference
    fit(roles, objective, source, optim=optimiser(stage, merge), run=run)
    save_merged(policy, start.path, ctx.dir, start.tokenizer)


def engine(stage: PreferOnline, objective: Any, policy: Model, reference: Model | None, start: Start) -> Engine:
    """Who samples: the policy, and the opponent that the loss wants."""
    own, whom = LocalEngine(policy, start.stop_ids, stage.slots), opponent(objective)
    if not whom or reference is None:
        return own
    if whom == "mixture":
        other = MixtureEngine(policy, reference, stage.share, start.stop_ids, stage.slots)
    else:
        other = LocalEngine(reference, start.stop_ids, stage.slots)
    return ByDraw(own, other, start.stop_ids)


def plan(stage: PreferOnline, seed: int) -> Plan:
    """The stage's numbers as a rollout plan: a rollout has the prompts of all the steps that it serves."""
    updates = stage.max_staleness + 1
    return Plan(
        prompts=stage.prompts_per_step * updates,
        samples=stage.samples_per_prompt,
        updates=updates,
        sampling=Sampling(max_new_tokens=stage.max_new_tokens, temperature=stage.temperature),
        kl=0.0,
        cut_score=stage.cut_score,
        seed=seed,
        max_tokens=2 * stage.max_tokens,
    )
