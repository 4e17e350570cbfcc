"""What a rollout shows of trouble to come: where its KL stands, groups that teach nothing, responses that run out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from posttrain.errors import CheckError
from posttrain.forest import Batch
from posttrain.rollout.engine import Rollout

ROUNDING = 1e-3  # nats that a log-probability may lie above 0


def signs(
    batch: Batch,
    rollouts: Sequence[Rollout],
    scores: Sequence[float | None],
    samples: int,
    tokens: Mapping[str, Tensor],
    stop_ids: frozenset[int],
) -> dict[str, float]:
    """Metrics of a rollout's health.

    Args:
        batch: the rollout's forest.
        rollouts: its responses, ``samples`` a prompt, in prompt order.
        scores: their rewards, None = abstained.
        samples: responses a prompt.
        tokens: ``old_logp`` and, if there is a reference, ``ref_logp``, ``[M]``.
        stop_ids: every id that ends a response.

    Raises:
        CheckError: the sampler gave a log-probability above 0.
    """
    if bool((tokens["old_logp"] > ROUNDING).any()):
        worst = float(tokens["old_logp"].max())
        raise CheckError(
            f"the sampler gave a log-probability of {worst:.3g} nats; expected at most 0: these are no log-probabilities"
        )
    lengths = sorted(len(r.ids) for r in rollouts)
    found = {"length/p95": float(lengths[-(-95 * len(rollouts) // 100) - 1]), **_groups(rollouts, scores, samples)}
    return found | (_kl_at_stops(batch, tokens, stop_ids) if "ref_logp" in tokens else {})


def _kl_at_stops(batch: Batch, tokens: Mapping[str, Tensor], stop_ids: frozenset[int]) -> dict[str, float]:
    """KL to the reference, in nats a response, that stands on stop tokens, and on what follows one."""
    forest, size = batch.forest, len(batch.forest.end)
    gap = (tokens["old_logp"] - tokens["ref_logp"]).double()
    stop = torch.isin(forest.target, torch.tensor(sorted(stop_ids), dtype=torch.long))
    before = stop.long().cumsum(0) - stop.long()  # stop tokens in earlier places, of earlier branches too
    first = forest.lengths.cumsum(0) - forest.lengths
    after = before > before[first][forest.branch]
    return {"kl/stop": float(gap[stop & ~after].sum()) / size, "kl/after_stop": float(gap[after].sum()) / size}


def _groups(rollouts: Sequence[Rollout], scores: Sequence[float | None], samples: int) -> dict[str, float]:
    """Shares of prompts whose responses all have one score, and of those whose responses are all the same."""
    if samples < 2:
        return {}
    groups = [range(start, start + samples) for start in range(0, len(rollouts), samples)]
    flat = [g for g in groups if len({scores[i] for i in g if scores[i] is not None}) < 2]
    same = [g for g in flat if len({rollouts[i].ids for i in g}) == 1]
    return {"groups/flat": len(flat) / len(groups), "groups/identical": len(same) / len(groups)}
