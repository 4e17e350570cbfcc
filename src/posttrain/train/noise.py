"""Noise on embeddings while a network trains (NEFTune); passes without gradient, such as a reference's, have none."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from posttrain.forest import Batch
from posttrain.models.policy import Model
from posttrain.train.sources import DataSource


@dataclass
class EmbeddingNoise:
    """``e + (alpha / sqrt(L d)) u`` with u uniform in [-1, 1], L the sequence's length and d the width.

    Draws depend on (seed, step, the row's tokens) only. The noise of a prompt is shared by its responses.

    Source: Jain et al. 2023, NEFTune: noisy embeddings improve instruction finetuning, arXiv 2310.05914, algorithm 1.
    """

    alpha: float
    seed: int
    step: int = 0

    def attach(self, model: Model) -> None:
        """From now on, add noise in every pass of the network that has a gradient."""
        embed = model.net.get_input_embeddings()

        def add(module: Any, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
            if not torch.is_grad_enabled():
                return None
            ids = given.pop("input_ids")
            states = embed(ids)
            noise = self.noise(ids[0], given["position_ids"][0], states.shape[-1])
            return args, {**given, "inputs_embeds": states + noise.to(states)[None]}

        model.trunk.register_forward_pre_hook(add, with_kwargs=True)

    def noise(self, ids: Tensor, positions: Tensor, width: int) -> Tensor:
        """``[N, width]`` for packed tokens ``[N]``: a sequence goes as far as positions count on, and its last one gives L."""
        cuts = [0, *((positions[1:] != positions[:-1] + 1).nonzero()[:, 0] + 1).tolist(), len(ids)]
        parts: list[Tensor] = []
        for start, end in pairwise(cuts):
            digest = hashlib.sha256(
                repr((self.seed, self.step, int(positions[start]), ids[start:end].tolist())).encode()
            )
            generator = torch.Generator().manual_seed(int.from_bytes(digest.digest()[:7], "little"))
            scale = self.alpha / math.sqrt((int(positions[end - 1]) + 1) * width)
            parts.append(scale * (2 * torch.rand(end - start, width, generator=generator) - 1))
        return torch.cat(parts)


@dataclass(frozen=True)
class _Stepping(DataSource):
    """A source that tells the noise which step it is."""

    noise: EmbeddingNoise

    def __call__(self, step: int) -> Batch:
        """The rows of a step."""
        self.noise.step = step
        return super().__call__(step)


def with_noise(source: DataSource, model: Model, alpha: float, seed: int) -> DataSource:
    """The source, with noise of ``alpha`` on the model's embeddings from now on; itself if ``alpha`` is 0."""
    if not alpha:
        return source
    noise = EmbeddingNoise(alpha, seed)
    noise.attach(model)
    return _Stepping(**{f.name: getattr(source, f.name) for f in fields(DataSource)}, noise=noise)
