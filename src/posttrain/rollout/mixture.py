"""Opponents: engines that sample what a policy is compared with, the reference itself or a mixture of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from posttrain.errors import ConfigError
from posttrain.losses.games import geometric_mixture
from posttrain.models import lora as adapters
from posttrain.models.policy import Model
from posttrain.ops.token_stats import logits_of
from posttrain.rollout.engine import Engine, Request, Rollout, Sampling, uniforms
from posttrain.rollout.local import invert


@dataclass(frozen=True)
class ByDraw:
    """The first sample of each prompt from one engine, every further one from another; the last item of a key counts samples."""

    first: Engine
    others: Engine
    stop_ids: frozenset[int]

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_done: Callable[[int], None] | None = None
    ) -> list[Rollout]:
        """Sample one rollout a request, in order."""
        own = [i for i, r in enumerate(requests) if r.key[-1] == 0]
        rest = [i for i, r in enumerate(requests) if r.key[-1] != 0]
        found: dict[int, Rollout] = {}
        for engine, places in ((self.first, own), (self.others, rest)):
            found |= zip(places, engine.generate([requests[i] for i in places], sampling), strict=True)
            if on_done is not None:
                on_done(len(found))
        return [found[i] for i in range(len(requests))]


@dataclass(frozen=True)
class MixtureEngine:
    """Samples token by token from ``policy^(1 - share) reference^share`` up to its normaliser, nats of that distribution.

    Prompts of one length are decoded together, ``slots`` at once. The policy's weights are read as they are now.

    Source: Munos et al. 2023, Nash learning from human feedback, arXiv 2312.00886, section 5.
    """

    policy: Model
    reference: Model
    share: float
    stop_ids: frozenset[int]
    slots: int = 32

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_done: Callable[[int], None] | None = None
    ) -> list[Rollout]:
        """Sample one rollout a request, in order.

        Raises:
            ConfigError: temperature 0, or a cut to likely tokens.
        """
        if sampling.temperature == 0 or sampling.top_k is not None or sampling.top_p < 1:
            raise ConfigError(f"got {sampling}; a mixture is sampled whole, at a temperature above 0")
        found: dict[int, Rollout] = {}
        for length in sorted({len(r.ids) for r in requests}):
            alike = [i for i, r in enumerate(requests) if len(r.ids) == length]
            for first in range(0, len(alike), self.slots):
                places = alike[first : first + self.slots]
                found |= zip(places, self._decode([requests[i] for i in places], sampling), strict=True)
                if on_done is not None:
                    on_done(len(found))
        return [found[i] for i in range(len(requests))]

    @torch.no_grad()
    def _decode(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        """Samples to prompts of one length, each row with its own draws."""
        device = self.policy.head.weight.device
        feed = torch.tensor([r.ids for r in requests], device=device)
        draws = torch.from_numpy(np.stack([uniforms(r.key, sampling.max_new_tokens) for r in requests])).to(device)
        caches = [DynamicCache(), DynamicCache()]
        ids: list[list[int]] = [[] for _ in requests]
        logp: list[list[float]] = [[] for _ in requests]
        going = set(range(len(requests)))
        for step in range(sampling.max_new_tokens):
            both = [
                self._logits(m, feed, c, sampling) for m, c in zip((self.policy, self.reference), caches, strict=True)
            ]
            tokens, values = invert(geometric_mixture(both[0], both[1], share=self.share), draws[:, step])
            for i in sorted(going):
                ids[i].append(int(tokens[i]))
                logp[i].append(float(values[i]))
            going -= {i for i in going if ids[i][-1] in self.stop_ids}
            if not going:
                break
            feed = tokens[:, None]
        return [
            Rollout(r, tuple(i), tuple(p), i[-1] in self.stop_ids) for r, i, p in zip(requests, ids, logp, strict=True)
        ]

    def _logits(self, model: Model, feed: Tensor, cache: DynamicCache, sampling: Sampling) -> Tensor:
        """A role's logits ``[S, V]`` of the next token after ``feed`` ``[S, t]``, which its cache then holds."""
        seen = cache.get_seq_length()
        positions = torch.arange(seen, seen + feed.shape[1], device=feed.device).expand(len(feed), -1)
        with adapters.active(model.net, model.adapter):
            out = model.trunk(input_ids=feed, position_ids=positions, past_key_values=cache, use_cache=True)
        return logits_of(out.last_hidden_state[:, -1], model.head, sampling.temperature)
