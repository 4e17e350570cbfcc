"""From scored responses to what a policy loss reads of each token: rewards, advantages, returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from posttrain.forest import Batch, Branch, Forest, Row, build_forest, take
from posttrain.losses.advantages import Returns, gae, token_reward, whitened_gae
from posttrain.ops.masked import masked_mean, segment_sum, to_padded, whiten
from posttrain.rewards.base import Completion
from posttrain.rewards.gold import GOLD, gold_metrics
from posttrain.rollout.engine import Rollout
from posttrain.train.rollout_plan import Group, Plan

Advantage = Callable[[Returns], Tensor]


def group_forest(groups: Sequence[Group], plan: Plan) -> tuple[Forest, Tensor]:
    """All responses as a forest with the mask "sampled" of tokens that are trained, and ``[M]`` those of scored responses.

    The two differ where cut responses count for the baseline and not for the loss.
    """
    rows: list[Row] = []
    live: list[bool] = []
    for group in groups:
        marks = group.live(plan)
        live += [m and own for r, m in zip(group.rollouts, marks, strict=True) for own in r.own]
        trained = [m and not (plan.mask_cut and r.truncated) for r, m in zip(group.rollouts, marks, strict=True)]
        branches = [
            Branch(r.ids, {"sampled": [m and own for own in r.own]}, r.truncated)
            for r, m in zip(group.rollouts, trained, strict=True)
        ]
        rows.append(Row(group.rollouts[0].request.ids, branches))
    return build_forest(rows), torch.tensor(live, dtype=torch.bool)


def of_sampled(tokens: Mapping[str, Tensor], rollouts: Sequence[Rollout]) -> dict[str, Tensor]:
    """Numbers of tokens ``[M]``, 0 at those that an environment gave, so that no sum over a response counts them."""
    own = torch.tensor([own for r in rollouts for own in r.own], dtype=torch.bool)
    return {name: torch.where(own, values, 0.0) for name, values in tokens.items()}


def estimate(
    groups: Sequence[Group],
    plan: Plan,
    advantage: Advantage | None,
    forest: Forest,
    live: Tensor,
    tokens: Mapping[str, Tensor],
    kl: float,
) -> tuple[dict[str, Tensor], Tensor]:
    """``advantage`` and ``return`` of each token ``[M]``, and the score of each response ``[B]``.

    Args:
        groups: the rollout.
        plan: its numbers.
        advantage: the estimator; None = whitened GAE.
        forest: of `group_forest`.
        live: tokens of responses that have a score, ``[M]``.
        tokens: ``old_logp``, ``ref_logp`` unless ``kl`` is 0, and, with a critic, ``old_value``, all ``[M]``.
        kl: coefficient of the penalty in the reward.
    """
    size, dtype = len(forest.end), tokens["old_logp"].dtype
    score = torch.tensor([s or 0.0 for g in groups for s in g.scores], dtype=dtype)
    wide = {name: to_padded(x, forest.branch, size)[0] for name, x in tokens.items()}
    on, real = to_padded(live, forest.branch, size)
    reward = token_reward(score, wide["old_logp"], wide["ref_logp" if kl else "old_logp"], on, kl=kl)
    if plan.whiten_rewards:
        reward = whiten(reward, on, shift=False)
    values = wide.get("old_value")
    best = torch.tensor([g.baseline or 0.0 for g in groups], dtype=dtype)[forest.group] if plan.greedy else None
    steps, ends = _steps(groups, on, dtype)
    given = Returns(
        score=score,
        reward=reward,
        mask=on,
        group=forest.group,
        values=values,
        baseline=best,
        steps=steps,
        ends=ends,
    )
    advantage = advantage or partial(whitened_gae, gamma=plan.gamma, lam=plan.lam)
    base = torch.zeros_like(reward) if values is None else values
    returns = gae(reward, base, on, gamma=plan.gamma, lam=plan.lam)[1]
    return {"advantage": advantage(given)[real], "return": returns[real]}, score


def _steps(groups: Sequence[Group], on: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Scores of steps at their last tokens, and where those are, both ``[B, T]``; None where the reward gives none."""
    if not any(group.steps for group in groups):
        return None, None
    scores, ends = torch.zeros(on.shape, dtype=dtype), torch.zeros_like(on)
    for b, found in enumerate(steps for group in groups for steps in group.steps):
        for place, value in found.items():
            scores[b, place], ends[b, place] = value, True
    return scores, ends & on


def updates(batch: Batch, count: int) -> list[Batch]:
    """Cut a rollout into ``count`` batches of whole prompts, each with its own counts; advantages stay as they are."""
    trees = [(t, range(len(tree.branches))) for t, tree in enumerate(batch.forest.trees)]
    out: list[Batch] = []
    for part in range(count):
        piece = take(batch, trees[part::count])
        sampled = piece.forest.masks["sampled"]
        counts = {"tokens": int(sampled.sum()), "branches": len(piece.forest.branch[sampled].unique())}
        out.append(Batch(piece.forest, piece.tokens, piece.branches, {k: float(max(n, 1)) for k, n in counts.items()}))
    return out


def rollout_metrics(
    groups: Sequence[Group], plan: Plan, forest: Forest, live: Tensor, tokens: Mapping[str, Tensor]
) -> dict[str, float]:
    """Means over the rollout, before any update."""
    scores = [s for g in groups for s in g.scores]
    rollouts = [r for g in groups for r in g.rollouts]
    known = torch.tensor([s for s in scores if s is not None])
    found = {
        "reward/mean": float(known.mean()),
        "reward/std": float(known.std(correction=0)),
        "policy/entropy": float(-masked_mean(tokens["old_logp"], live)),
        "length/mean": sum(len(r.ids) for r in rollouts) / len(rollouts),
        "truncated/share": sum(r.truncated for r in rollouts) / len(rollouts),
        "abstained/share": sum(s is None for s in scores) / len(scores),
    }
    parts = [part for g in groups for part in g.parts]
    found |= gold_metrics(parts)
    for name in sorted({name for part in parts for name in part} - {GOLD}):
        values = [part[name] for part in parts if name in part]
        found[f"reward/part/{name}"] = sum(values) / len(values)
    if "ref_logp" in tokens:
        kl = segment_sum(tokens["old_logp"] - tokens["ref_logp"], forest.branch, len(rollouts))
        found["kl/mean"] = float(kl.mean())
    if plan.least > 1 or plan.greedy:
        found["groups/dropped"] = sum(not any(g.live(plan)) for g in groups) / len(groups)
    if "old_value" in tokens:
        returns, error = tokens["return"], tokens["return"] - tokens["old_value"]
        spread = masked_mean((returns - masked_mean(returns, live)) ** 2, live)
        residual = masked_mean((error - masked_mean(error, live)) ** 2, live)
        found["value/explained"] = float(1 - residual / spread.clamp(min=1e-8))
    return found


def sample_means(groups: Sequence[Group]) -> dict[str, float]:
    """Means over a rollout whose training makes no batch of all its tokens: scores, nats and tokens of its responses."""
    rollouts, scores = [r for g in groups for r in g.rollouts], [s for g in groups for s in g.scores]
    known = torch.tensor([s for s in scores if s is not None], dtype=torch.float64)
    logp = [x for r in rollouts for x in r.logp]
    return {
        "reward/mean": float(known.mean()),
        "reward/std": float(known.std(correction=0)),
        "policy/entropy": -sum(logp) / len(logp),
        "length/mean": len(logp) / len(rollouts),
        "truncated/share": sum(r.truncated for r in rollouts) / len(rollouts),
        "abstained/share": sum(s is None for s in scores) / len(scores),
    }


def records(
    completions: Sequence[Completion], groups: Sequence[Group], more: Sequence[Mapping[str, Any]] = ()
) -> list[dict[str, Any]]:
    """A line of ``samples.jsonl`` for each response, with ``more`` of each."""
    scores = [s for g in groups for s in g.scores]
    parts = [part for g in groups for part in g.parts]
    return [
        {
            "prompt": c.example.prompt[-1].content,
            "completion": c.text,
            "reward": s,
            **m,
            "length": len(c.ids),
            "truncated": c.truncated,
            **({"parts": dict(p)} if p else {}),
            **({"turns": [(t.role, t.content) for t in c.turns]} if c.turns else {}),
        }
        for c, s, p, m in zip(completions, scores, parts, more or [{}] * len(completions), strict=True)
    ]


def divergences(batch: Batch, count: int) -> list[float | None]:
    """``sum_t (old_logp - ref_logp)`` of each response, nats; None where there is no reference."""
    if "ref_logp" not in batch.tokens:
        return [None] * count
    gap = batch.tokens["old_logp"] - batch.tokens["ref_logp"]
    return segment_sum(gap, batch.forest.branch, count).tolist()
