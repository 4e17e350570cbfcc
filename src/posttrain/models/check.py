"""Is a network exact over forests? Asked once when a role is loaded, on three rows, against its own attention."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch

from posttrain.forest import Branch, Row, build_forest
from posttrain.models.policy import Model, hidden_states

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}  # of the states' norm


def checked(model: Model) -> Model:
    """Return the role as it is, or with ``plain`` rows and a warning where shared prompts change its states.

    Compares ``|forest - plain| / |plain|`` over the states ``[N, d]`` of three rows with 1, 2 and 3 branches.
    """
    error = forest_error(model)
    limit = TOLERANCE[model.net.dtype]
    if error <= limit:
        return model
    warnings.warn(
        f"{type(model.net).__name__}: states over shared prompts differ from its own forward by {error:.1e} (limit {limit:g}); "
        "every row is computed by itself, which is slower",
        stacklevel=2,
    )
    return replace(model, plain=True)


def forest_error(model: Model) -> float:
    """Relative difference of the states; infinite if the network can't run over a forest at all."""
    draw = torch.Generator().manual_seed(0)
    embedding: Any = model.net.get_input_embeddings()
    vocabulary = min(1000, embedding.num_embeddings)

    def tokens(count: int) -> list[int]:
        return torch.randint(0, vocabulary, (count,), generator=draw).tolist()

    forest = build_forest([Row(tokens(5 + k), [Branch(tokens(3 + b), {}) for b in range(k)]) for k in (1, 2, 3)])
    with torch.no_grad():
        plain = hidden_states(replace(model, plain=True), forest).double()
        try:
            shared = hidden_states(model, forest).double()
        except (
            NotImplementedError,
            TypeError,
            AttributeError,
            RuntimeError,
            KeyError,
            ValueError,
        ):  # no attention interface, sinks, other states
            return float("inf")
    return float((shared - plain).norm() / plain.norm())
