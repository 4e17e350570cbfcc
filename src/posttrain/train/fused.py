"""The optimiser's step within the backward pass: each parameter moves once its gradient is complete, which is then freed.

So not all gradients are held at once, but the one that is complete (and those that wait for more, such as of an embedding
that is the output layer too). What is lost is whatever must know all gradients before the first weight moves: clipping by
their norm, and leaving a step undone whose gradient is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from posttrain.errors import CheckError, ConfigError
from posttrain.train.distributed import world

if TYPE_CHECKING:
    from posttrain.train.optim import MasterAdamW, Optim


class HalfStep(CheckError):
    """A gradient that is not finite, found when other weights had moved already."""


@dataclass
class Moved:
    """What a fused step did: the sum of squares of the gradients' norms, and how many parameters moved."""

    squares: float = 0.0
    count: int = 0


def check_fused(optim: Optim) -> None:
    """Refuse what needs all gradients at once.

    Raises:
        ConfigError: clipping by norm, merging of steps, or several ranks.
    """
    if math.isfinite(optim.clip) or optim.merge is not None or world().size > 1:
        got = f"clip={optim.clip:g}, merging={'on' if optim.merge else 'off'}, {world().size} ranks"
        raise ConfigError(
            f"got {got} with the step fused into the backward pass; expected clip=inf, no merging and one rank: each parameter "
            "moves before the gradients of the others are known"
        )


@contextmanager
def fused_step(optimizer: MasterAdamW, factor: float) -> Iterator[Moved]:
    """Within, one backward pass moves the parameters at ``factor`` of their peak rates, as `MasterAdamW.step` would, to the bit.

    Gradients of earlier passes are part of it; parameters that the pass does not reach keep theirs.

    Raises (from the backward pass):
        HalfStep: a gradient is not finite; go on from a checkpoint.
    """
    check_fused(optimizer.optim)
    optimizer.before_change()
    optimizer.set_rates(factor)
    moved, handles = Moved(), list[Any]()
    groups = optimizer.inner.param_groups
    everything = [group["params"] for group in groups]

    def hook_of(role: str, name: str, place: int) -> Any:
        master = optimizer.masters[role][name]

        def move(parameter: Tensor) -> None:
            assert parameter.grad is not None
            norm = float(parameter.grad.float().norm())
            if not math.isfinite(norm):
                raise HalfStep(
                    f"the gradient of {role}/{name} is not finite, and {moved.count} parameters have moved within this backward "
                    "pass; the run ends here: run it again from its newest checkpoint, with a lower lr or without fused"
                )
            moved.squares, moved.count = moved.squares + norm * norm, moved.count + 1
            if master is not parameter:
                master.grad, parameter.grad = parameter.grad.float(), None
            for k, group in enumerate(groups):
                group["params"] = [master] if k == place else []
            optimizer.inner.step()
            parameter.grad = master.grad = None
            if master is not parameter:
                optimizer.follow(parameter, master)

        return move

    try:
        for place, (role, named) in enumerate(optimizer.roles.items()):
            for name, parameter in named.items():
                handles.append(parameter.register_post_accumulate_grad_hook(hook_of(role, name, place)))
        yield moved
    finally:
        for handle in handles:
            handle.remove()
        for group, params in zip(groups, everything, strict=True):
            group["params"] = params


@dataclass
class Peak:
    """The most bytes of complete gradients that were held at once."""

    bytes: int = 0


@contextmanager
def gradient_peak(parameters: Iterable[nn.Parameter]) -> Iterator[Peak]:
    """Measure, over the backward passes within, the most memory of gradients; enter it before `fused_step`."""
    watched, peak = list(parameters), Peak()

    def look(parameter: Tensor) -> None:
        held = sum(p.grad.numel() * p.grad.element_size() for p in watched if p.grad is not None)
        peak.bytes = max(peak.bytes, held)

    handles: list[Any] = [p.register_post_accumulate_grad_hook(look) for p in watched]
    try:
        yield peak
    finally:
        for handle in handles:
            handle.remove()
