"""Activation checkpointing: a decoder layer keeps its input alone, and is computed again when its gradient is wanted.

Memory of a forward pass over N tokens falls from all that L layers keep to ``N L d`` numbers and one layer's own; time
rises by one forward pass of the layers, a third of their forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from posttrain.errors import ModelError


@contextmanager
def recomputed(trunk: nn.Module, state: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Run with every decoder layer of ``trunk`` checkpointed; without gradient nothing changes.

    A backward pass comes when other roles have used the network since: ``state`` puts it into the state of this pass
    (which adapter is on, whose attention) wherever a layer is computed.

    Raises:
        ModelError: a network whose decoder layers are not marked as transformers marks those that can be computed again.
    """
    if not torch.is_grad_enabled():
        yield
        return
    layers = [m for m in trunk.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            f"{type(trunk).__name__} has no layers that can be computed again; train with checkpointing off"
        )
    own: list[Any] = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = _kept_by_input(layer.forward, state)
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _kept_by_input(
    forward: Callable[..., Any], state: Callable[[], AbstractContextManager[None]]
) -> Callable[..., Any]:
    """A layer's forward whose graph holds its arguments only."""

    def stated(*args: Any, **kwargs: Any) -> Any:
        with state():
            return forward(*args, **kwargs)

    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(stated, *args, use_reentrant=False, **kwargs)

    return run
