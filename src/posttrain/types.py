"""One record for everything people or judges say about text: a prompt, its responses, and their feedback."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn of a conversation.

    ``train`` says whether a language-model loss reads this turn: None means the usual rule (assistant turns only).
    """

    role: str
    content: str
    train: bool | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Response:
    """One answer to a prompt (usually a single assistant turn) and the feedback it received; None = not given.

    ``rank`` counts from 0 = best; equal ranks are ties. ``failure`` names how a poor answer fails.
    """

    messages: tuple[Message, ...]
    rank: int | None = None
    failure: str | None = None

    @property
    def text(self) -> str:
        """The assistant text of the response, turns joined by blank lines."""
        return "\n\n".join(m.content for m in self.messages if m.role == "assistant")


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A prompt with any number of responses; demonstrations, pairs and rankings are views of it.

    ``file`` and ``row`` (from 1) say where it came from, for error messages; they are not part of its identity.
    """

    prompt: tuple[Message, ...]
    responses: tuple[Response, ...] = ()
    kind: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict[str, Any])
    file: str = ""
    row: int = 0

    @property
    def prompt_key(self) -> str:
        """A short hash of the prompt's text, equal for equal prompts wherever they stand."""
        return stable_hash([(m.role, m.content) for m in self.prompt])


def stable_hash(value: Any) -> str:
    """Return 16 hex digits of SHA-256 over the value's JSON with sorted keys; equal on every machine."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
