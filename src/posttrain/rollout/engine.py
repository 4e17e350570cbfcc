"""What every sampling engine takes and gives."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from posttrain.errors import ConfigError


@dataclass(frozen=True)
class Request:
    """A prompt as ids and the key of its random draws: equal keys give equal draws, whatever else is in the batch."""

    ids: tuple[int, ...]
    key: tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn: ``softmax(logits / temperature)``, cut to the ``top_k`` likeliest and to ``top_p`` of mass.

    ``temperature`` 0 takes the likeliest token; ``max_new_tokens`` counts the stop token.

    Raises:
        ConfigError: a value outside its range.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Refuse values that no distribution has."""
        if self.max_new_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(f"got {self}; expected max_new_tokens >= 1, temperature >= 0, 0 < top_p <= 1")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"got top_k={self.top_k}; expected None or at least 1")


@dataclass(frozen=True)
class Rollout:
    """What was sampled: ids (stop token included) and the log-probability in nats of each under the sampled distribution."""

    request: Request
    ids: tuple[int, ...]
    logp: tuple[float, ...]
    stopped: bool

    @property
    def truncated(self) -> bool:
        """Ended by length and not by a stop token."""
        return not self.stopped


class Engine(Protocol):
    """Anything that samples rollouts, one for each request, in their order."""

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_done: Callable[[int], None] | None = None
    ) -> list[Rollout]:
        """Sample; ``on_done`` hears how many rollouts have ended."""
        ...


def uniforms(key: tuple[int | str, ...], count: int) -> np.ndarray:
    """``count`` uniform draws in [0, 1) that depend on the key alone (Philox, keyed by SHA-256 of the key)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little"))).random(count)
