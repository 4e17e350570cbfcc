"""Scores read from a trunk's states: at a response's last token, at each token, and a gate at the prompt's."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.forest import Forest

SCORES = frozenset({"score", "value", "scores", "marks", "gate"})
"""Statistics of a scalar head (or one of k outputs) and its gate."""


def score_stats(
    scalar: nn.Linear, gate: nn.Module | None, states: Tensor, forest: Forest, want: Set[str], mask: Tensor | None
) -> dict[str, Tensor]:
    """The statistics of ``want`` that a head gives.

    ``score`` ``[B]`` and ``scores`` ``[B, k]`` at each branch's last token, ``value`` ``[M]`` at the state before each
    target, ``marks`` ``[M]`` at each target's own state (0 outside ``mask``), ``gate`` ``[B, k]`` at the prompt's last token.
    """
    wide = torch.promote_types(states.dtype, torch.float32)

    def at(index: Tensor) -> Tensor:
        return states.index_select(0, index).to(wide)

    out: dict[str, Tensor] = {}
    if want & {"score", "scores"}:
        scores = scalar(at(forest.end))
        out |= {"score": scores[:, 0]} if "score" in want else {}
        out |= {"scores": scores} if "scores" in want else {}
    if "value" in want:
        out["value"] = scalar(at(forest.source))[:, 0]
    if "marks" in want:
        keep = torch.arange(len(forest.target)) if mask is None else mask.nonzero()[:, 0]
        found = scalar(at(own_states(forest)[keep]))[:, 0]
        out["marks"] = found.new_zeros(len(forest.target)).index_put((keep,), found)
    if "gate" in want:
        assert gate is not None
        out["gate"] = gate(at(prompt_states(forest)))
    return out


def own_states(forest: Forest) -> Tensor:
    """``[M]`` index in N of each target itself."""
    return torch.cat([torch.arange(*span) for tree in forest.trees for span in tree.branches])


def prompt_states(forest: Forest) -> Tensor:
    """``[B]`` index in N of the last token of each branch's prompt."""
    return torch.tensor([tree.prompt[1] - 1 for tree in forest.trees for _ in tree.branches])


class Gate(nn.Module):
    """``softmax(MLP(state) / temperature)``, the weights of k attributes for a prompt, ``[B, d] -> [B, k]``.

    Source: Wang et al. 2024, ArmoRM, arXiv 2406.12845 (three layers of 1024, temperature 10).
    """

    def __init__(
        self, width: int, outputs: int, *, hidden: int = 128, temperature: float = 10.0, seed: int = 0
    ) -> None:
        super().__init__()
        self.temperature = temperature
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            sizes = [width, hidden, hidden, outputs]
            layers: list[Any] = []
            for i in range(3):
                layers += [nn.Linear(sizes[i], sizes[i + 1]), *([nn.ReLU()] if i < 2 else [])]
            self.layers = nn.Sequential(*layers)

    def forward(self, states: Tensor) -> Tensor:
        """The weights, each row adding up to 1."""
        return torch.softmax(self.layers(states) / self.temperature, dim=-1)
