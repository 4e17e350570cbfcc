"""What an objective is: statistics in, sums with a unit out, which the loop divides by the step's counts, once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from posttrain.forest import Batch, Forest
from posttrain.losses.reward import pair_weights
from posttrain.ops.masked import segment_sum
from posttrain.registry import Registry

Stats = Mapping[str, Mapping[str, Tensor]]  # role -> statistic -> tensor

objectives = Registry("objective")
"""Every objective; facts: ``columns`` that its batches carry beside the forest, ``losses`` that it can be given."""


@dataclass(frozen=True)
class Term:
    """A sum over this micro-batch, the unit whose count over the step divides it, and its weight (0 = only logged)."""

    sum: Tensor
    unit: str
    coefficient: float = 1.0


@dataclass(frozen=True)
class Check:
    """A line of the step-0 table; ``ok`` None = printed without a verdict."""

    name: str
    value: str
    expected: str
    ok: bool | None


class Objective(Protocol):
    """What `posttrain.train.loop.fit` needs of an objective."""

    @property
    def reads(self) -> Mapping[str, frozenset[str]]:
        """Statistics wanted of each trained role."""
        ...

    @property
    def mask(self) -> str | None:
        """The mask outside which token statistics are not computed."""
        ...

    @property
    def temperature(self) -> float:
        """What logits are divided by."""
        ...

    @property
    def whole_groups(self) -> bool:
        """Whether the responses of one prompt must stand in one micro-batch."""
        ...

    @property
    def coupled(self) -> bool:
        """Whether the loss of a row depends on the other rows of the step, so that it is taken over all of them at once."""
        ...

    def __call__(self, stats: Stats, batch: Batch) -> dict[str, Term]:
        """Terms of a micro-batch, by metric name."""
        ...

    def check(self, stats: Stats, batch: Batch, step: int) -> list[Check]:
        """What must hold on the first micro-batch of a run that begins, or goes on, at ``step``."""
        ...


def total(terms: Mapping[str, Term], counts: Mapping[str, float]) -> Tensor:
    """The loss of some terms, ``sum of coefficient * sum / counts[unit]``, in float64."""
    losses = [t.coefficient * t.sum / counts[t.unit] for t in terms.values() if t.coefficient]
    return torch.stack([x.double() for x in losses]).sum()


def branch_weight(batch: Batch, dtype: torch.dtype) -> Tensor:
    """``[B]``, the weight of each response's row; 1 where the source gave none."""
    weight = batch.branches.get("weight")
    return torch.ones_like(batch.forest.end, dtype=dtype) if weight is None else weight.to(dtype)


def response_sums(values: Tensor, batch: Batch) -> Tensor:
    """``[B]`` sums of ``[M]`` values over each response's trained tokens (mask "loss"), in float64.

    Log-ratios are small differences of large sums.
    """
    forest = batch.forest
    kept = torch.where(forest.masks["loss"], values.double(), 0.0)
    return segment_sum(kept, forest.branch, len(forest.end))


def state_of(objective: Any) -> Any:
    """The JSON state of an objective that has one, else None."""
    return objective.state() if hasattr(objective, "state") else None


@contextmanager
def unmoved(objective: Any) -> Iterator[None]:
    """Within, an objective may be asked without its state moving."""
    before = state_of(objective)
    try:
        yield
    finally:
        if before is not None:
            objective.load_state(before)


def stop_check(forest: Forest, mask: Tensor, begins: bool = True) -> Check:
    """The last token of each response that was not cut is trained: it is the stop token.

    No verdict where a run goes on: other rows than those of its first step may be without, and were never refused.
    """
    last = forest.lengths.cumsum(0) - 1
    stops = int((mask[last] | forest.truncated).sum())
    return Check(
        "stop token trained", f"{stops} of {len(last)} responses", "all", stops == len(last) if begins else None
    )


def pair_shares(batch: Batch, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """``(better, worse, share)``, each ``[P]``: all pairs of differing rank, and the row's weight over its number of pairs."""
    better, worse, share = pair_weights(batch.branches["rank"], batch.forest.group, dtype)
    return better, worse, share * branch_weight(batch, dtype)[better]


def ordered_right(gap: Tensor) -> Tensor:
    """1 where the better response is ahead, 1/2 at a tie, 0 elsewhere; the shape and dtype of ``gap``."""
    return (gap > 0).to(gap.dtype) + 0.5 * (gap == 0).to(gap.dtype)


def at_reference(loss: Callable[[Stats], Tensor], stats: Stats, batch: Batch, tolerance: float) -> tuple[float, float]:
    """A loss where the policy is the reference, and by how much it moves when every response does by ``tolerance`` nats."""
    policy = stats["policy"]
    logp = batch.tokens["ref_logp"].to(policy["logp"].dtype)
    same = {name: torch.zeros_like(x) if "other" in name else x for name, x in policy.items()}
    with torch.enable_grad():
        leaf = logp.detach().clone().requires_grad_()
        value = loss({**stats, "policy": {**same, "logp": leaf}})
        slope = torch.autograd.grad(value, leaf)[0].abs()
    largest = torch.zeros(len(batch.forest.end), dtype=slope.dtype)
    largest = largest.scatter_reduce(0, batch.forest.branch, slope, "amax")
    return float(value.detach()), 1e-9 + tolerance * float(largest.sum())
