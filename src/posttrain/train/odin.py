"""A reward model of two heads, of which one takes what length says, so that the other is left with quality (ODIN)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, logsigmoid

from posttrain.forest import Batch
from posttrain.models.policy import Model
from posttrain.ops.masked import segment_sum
from posttrain.train.terms import Check, Stats, Term, objectives, ordered_right, pair_shares


class OrthogonalHead(nn.Linear):
    """A linear head whose weight is orthogonal to another's, by construction: ``w - (w . u) u``, u the other's direction."""

    def __init__(self, other: nn.Linear) -> None:
        super().__init__(other.in_features, 1, bias=False, dtype=other.weight.dtype)
        self.kept_from = (other,)  # in a tuple: its parameters aren't this head's
        nn.init.zeros_(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        """``[B, d] -> [B, 1]``."""
        unit = nn.functional.normalize(self.kept_from[0].weight.detach(), dim=-1)
        return linear(input, self.weight - (self.weight * unit).sum(-1, keepdim=True) * unit)


def length_role(reward: Model) -> Model:
    """The second role: the reward model's own trunk and adapter, and a head that is orthogonal to its."""
    assert reward.scalar is not None
    return replace(reward, scalar=OrthogonalHead(reward.scalar).requires_grad_(True), head_only=True)


@objectives.register("reward_odin", columns=("rank", "weight"))
@dataclass(frozen=True)
class Odin:
    """``-log sigmoid(gap of q + l) + weight ((1 - corr(l, n)) + |corr(q, n)|)`` a pair, q the reward's score, l the length head's.

    n is the response's tokens; correlations are over the step's responses, each less its prompt's mean. Train the roles
    ``{"reward": model, "length": length_role(model)}`` and keep the first.

    Source: Chen et al. 2024, arXiv 2402.07319, eq. 4-6, with the heads orthogonal by construction in place of a penalty.
    """

    weight: float = 1.0
    reads = {"reward": frozenset({"score"}), "length": frozenset({"score"})}  # noqa: RUF012
    mask = None
    temperature = 1.0
    whole_groups = True
    coupled = True

    def __call__(self, stats: Stats, batch: Batch) -> dict[str, Term]:
        """The ranking loss of the sum, the two correlations, and the share of pairs that quality alone orders right."""
        quality, other = stats["reward"]["score"], stats["length"]["score"]
        better, worse, share = pair_shares(batch, quality.dtype)
        both = quality + other
        tokens = centred(batch.forest.lengths.to(quality.dtype), batch.forest.group)
        with_quality = correlation(centred(quality, batch.forest.group), tokens)
        with_other = correlation(centred(other, batch.forest.group), tokens)
        prompts = batch.counts["prompts"]
        gap = (quality[better] - quality[worse]).detach()
        return {
            "loss/ranking": Term((-logsigmoid(both[better] - both[worse]) * share).sum(), "prompts"),
            "loss/length": Term(((1 - with_other) + with_quality.abs()) * prompts, "prompts", self.weight),
            "accuracy/pairs": Term((ordered_right(gap) * share).sum(), "prompts", 0.0),
            "correlation/quality": Term(with_quality.detach() * prompts, "prompts", 0.0),
            "correlation/length": Term(with_other.detach() * prompts, "prompts", 0.0),
        }

    def check(self, stats: Stats, batch: Batch, step: int) -> list[Check]:
        """Scores are finite."""
        score = stats["reward"]["score"].detach()
        return [Check("scores finite", f"{score.mean():+.3f}", "finite", bool(score.isfinite().all()))]


def centred(values: Tensor, group: Tensor) -> Tensor:
    """``[B]`` less the mean of their group ``[B]``."""
    size = int(group.max()) + 1
    count = torch.bincount(group, minlength=size).to(values.dtype)
    return values - (segment_sum(values, group, size) / count)[group]


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's correlation of two centred ``[B]``; 0 where one doesn't vary."""
    return (x * y).sum() / (x.square().sum() * y.square().sum()).clamp(min=1e-12).sqrt()
