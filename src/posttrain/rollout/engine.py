"""What every sampling engine takes and gives."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from posttrain.errors import ConfigError
from posttrain.types import Message


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
    """What was sampled: ids (stop token included) and the log-probability in nats of each under the sampled distribution.

    Of a conversation with an environment, ``sampled`` says which of the tokens the policy sampled (empty = all of them) and
    ``turns`` what was said, the policy's last turn last.
    """

    request: Request
    ids: tuple[int, ...]
    logp: tuple[float, ...]
    stopped: bool
    sampled: tuple[bool, ...] = ()
    turns: tuple[Message, ...] = ()

    @property
    def truncated(self) -> bool:
        """Ended by length and not by a stop token."""
        return not self.stopped

    @property
    def own(self) -> tuple[bool, ...]:
        """Whether the policy sampled each token."""
        return self.sampled or (True,) * len(self.ids)


def kept_rollout(rollout: Rollout) -> list[Any]:
    """A rollout as JSON has it, without its request."""
    turns = [(m.role, m.content) for m in rollout.turns]
    return [rollout.ids, rollout.logp, rollout.stopped, *([rollout.sampled, turns] if turns else [])]


def read_rollout(request: Request, kept: Sequence[Any]) -> Rollout:
    """What `kept_rollout` made."""
    ids, logp, stopped, *more = kept
    sampled, turns = more or ((), ())
    said = tuple(Message(role=role, content=content) for role, content in turns)
    return Rollout(request, tuple(ids), tuple(logp), stopped, tuple(sampled), said)


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
