"""Quark: reward tokens are added to a model, and it learns to write at the level that each stands for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging as hf_logging

from posttrain.data.collate import prompt_ids
from posttrain.errors import ConfigError
from posttrain.evals import results as sections
from posttrain.evals.statistics import spearman
from posttrain.models.load import load_generation_config, load_policy, load_tokenizer, save_merged
from posttrain.rewards.base import Completion
from posttrain.rollout.engine import Rollout, Sampling
from posttrain.rollout.local import LocalEngine
from posttrain.stages import Context
from posttrain.stages.quark import EvaluateQuark, Quark
from posttrain.train.journal import Journal
from posttrain.train.loop import fit
from posttrain.train.quark import QuarkSource, RewardConditioned
from posttrain.train.rollouts import Plan
from posttrain.work.heldout import machine, stage_seconds
from posttrain.work.inputs import Start, choose_dtype, load_examples, refuse_weights, start_from
from posttrain.work.measure import answers
from posttrain.work.reinforce import SamplesFile
from posttrain.work.rewarding import reward_of
from posttrain.work.supervised import optimiser, training_run

NAME = "<|reward_{}|>"


def run(stage: Quark, ctx: Context) -> None:
    """Explore, sort, learn; then write the model with its tokens."""
    start = start_from(stage.model, ctx)
    dtype = choose_dtype(stage.dtype, start.path)
    examples = load_examples(stage, ctx, "prompts")
    refuse_weights(examples, "Quark")
    ids, report = prompt_ids(start.tokenizer, examples, max_length=stage.max_length, overlong=stage.overlong)
    ctx.console.print(f"prompts: {report}", highlight=False)
    if stage.explore_every > len(ids):
        raise ConfigError(
            f"got explore_every={stage.explore_every} and {len(ids)} prompts; expected at most as many steps between explorations"
        )
    begun = ctx.dir / "start"
    tokens = with_reward_tokens(start, begun, stage.bins, ctx.seed)
    policy = replace(load_policy(str(begun), dtype=dtype, train=True, seed=ctx.seed), outputs=tokens[0])
    reference = replace(load_policy(start.path, dtype=dtype), outputs=tokens[0], unseen=1)
    source = QuarkSource(
        plan=plan(stage, len(ids), ctx.seed),
        examples=[examples[i] for i in report.index],
        prompt_ids=ids,
        engine=LocalEngine(policy, start.stop_ids, stage.slots),
        reward=reward_of(stage.reward, ctx, dtype=dtype, max_tokens=2 * stage.max_tokens, tokenizer=start.tokenizer),
        reference=None,
        value=None,
        policy=policy,
        decode=start.decode,
        on_samples=SamplesFile(ctx.dir / "samples.jsonl").write,
        journal=Journal(ctx.dir / "journal"),
        tokens=tokens,
        per_step=stage.rows_per_step,
    )
    objective = RewardConditioned(beta=stage.beta, eta=stage.eta, direction=stage.kl_direction)
    run = training_run(stage, ctx, stage.steps, ctx.dir.name)
    fit({"policy": policy, "reference": reference}, objective, source, optim=optimiser(stage), run=run)
    save_merged(policy, str(begun), ctx.dir, load_tokenizer(str(begun)))
    shutil.rmtree(begun)


def plan(stage: Quark, prompts: int, seed: int) -> Plan:
    """A rollout answers every prompt and serves the steps until the next."""
    return Plan(
        prompts=prompts,
        samples=stage.samples_per_prompt,
        updates=stage.explore_every,
        sampling=Sampling(max_new_tokens=stage.max_new_tokens),
        kl=0.0,
        cut_score=stage.cut_score,
        seed=seed,
        max_tokens=2 * stage.max_tokens,
    )


def with_reward_tokens(start: Start, directory: Path, bins: int, seed: int) -> list[int]:
    """Write the start with ``bins`` more tokens, and return their ids, the best first; one that was written is kept.

    Their embeddings are drawn from a normal distribution with mean and deviation of each dimension over the known ones. The
    chat template begins with the best token, and generation is told never to write any.

    Raises:
        ConfigError: a model that has reward tokens, or no chat template in one piece.
    """
    names = [NAME.format(k) for k in range(bins)]
    tokenizer = load_tokenizer(start.path)
    if NAME.format(0) in tokenizer.get_vocab():
        raise ConfigError(f"'{start.path}' has reward tokens already; start from the model that it was trained from")
    if not isinstance(tokenizer.chat_template, str):
        raise ConfigError(f"'{start.path}' has no single chat template for the best token to stand in; give it one")
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    ids = [int(i) for i in tokenizer.convert_tokens_to_ids(names)]
    if (directory / "config.json").exists():
        return ids
    tokenizer.chat_template = names[0] + tokenizer.chat_template
    hf_logging.disable_progress_bar()
    net = AutoModelForCausalLM.from_pretrained(start.path, dtype=torch.float32)
    table: Any = net.get_input_embeddings()
    known = table.weight.detach()[: ids[0]]
    noise = torch.randn(bins, known.shape[1], generator=torch.Generator().manual_seed(seed))
    if ids[-1] >= len(table.weight):
        net.resize_token_embeddings(ids[-1] + 1, mean_resizing=False)
    embedding: Any = net.get_input_embeddings()
    with torch.no_grad():
        embedding.weight[ids] = known.mean(0) + known.std(0) * noise
    net.generation_config = load_generation_config(start.path) or GenerationConfig()
    net.generation_config.suppress_tokens = ids
    partial = directory.with_name(f"{directory.name}.{os.getpid()}.tmp")
    net.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)
    return ids


def evaluate(stage: EvaluateQuark, ctx: Context) -> None:
    """Sample after each token, score, and write ``results.json``."""
    begun = start_from(stage.reference, ctx, "reference")
    dtype = choose_dtype(stage.dtype, begun.path)
    place = str(ctx.inputs["policy"])
    tokens = reward_tokens(place)
    examples = load_examples(stage, ctx, "heldout_prompts")[: stage.prompts]
    ids = prompt_ids(begun.tokenizer, examples, max_length=2048)[0]
    judge = reward_of(stage.reward, ctx, dtype=dtype, max_tokens=stage.max_tokens, tokenizer=begun.tokenizer)
    policy = replace(load_policy(place, dtype=dtype), outputs=tokens[0])
    writers = {"start": (load_policy(begun.path, dtype=dtype), [])}
    writers |= {f"bin {k}": (policy, [tokens[k]]) for k in reversed(range(len(tokens)))}
    scores: dict[str, dict[str, Any]] = {}
    texts: dict[str, list[list[str]]] = {}
    written: dict[str, list[list[Rollout]]] = {}
    for name, (model, before) in writers.items():
        prompts = [[*before, *p] for p in ids]
        found = answers(
            model, prompts, begun.stop_ids, seed=ctx.seed, samples=stage.samples, max_new_tokens=stage.max_new_tokens
        )
        completions = completions_of(begun, examples, ids, found)
        values = [np.nan if s.value is None else s.value for s in judge(completions)]
        scores[name] = {"reward": np.array(values).reshape(len(ids), -1)}
        texts[name] = [[begun.decode(r.ids) for r in row] for row in found]
        written[name] = found
    means = [float(scores[f"bin {k}"]["reward"].mean()) for k in range(len(tokens))]
    rho = spearman(range(len(tokens)), [-m for m in means])
    section = sections.policy_section(
        scores,
        length={n: [[len(r.ids) for r in row] for row in rows] for n, rows in written.items()},
        truncated={n: [[r.truncated for r in row] for row in rows] for n, rows in written.items()},
    )
    results = sections.closing_results(
        machine=machine(),
        policy=section,
        samples=sections.sample_rows([e.prompt[-1].content for e in examples], texts, scores),
        stages=stage_seconds(ctx),
    )
    ctx.console.print(f"rank correlation of token and mean score: {rho:+.2f}", highlight=False)
    sections.write_results(results | {"bin_means": means, "rank_correlation": rho}, ctx.dir / "results.json")


def reward_tokens(directory: str) -> list[int]:
    """The ids of a model's reward tokens, the best first.

    Raises:
        ConfigError: it has none.
    """
    vocabulary, found = load_tokenizer(directory).get_vocab(), list[int]()
    while (name := NAME.format(len(found))) in vocabulary:
        found.append(vocabulary[name])
    if not found:
        raise ConfigError(f"'{directory}' has no reward tokens; expected a model that the stage Quark wrote")
    return found


def completions_of(
    start: Start, examples: Sequence[Any], ids: Sequence[Sequence[int]], written: Sequence[Sequence[Rollout]]
) -> list[Completion]:
    """What a reward sees of the answers, whose prompts it reads without a reward token."""
    return [
        Completion(
            example=example,
            text=start.decode(r.ids),
            prompt_ids=tuple(prompt),
            ids=r.ids,
            truncated=r.truncated,
            group=k,
        )
        for k, (example, prompt, row) in enumerate(zip(examples, ids, written, strict=True))
        for r in row
    ]
