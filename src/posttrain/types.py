"""One record for everything people or judges say about text: a prompt, its responses, and their feedback."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCall:
    """A call of a tool that an assistant turn makes: the tool's name and its arguments as JSON values."""

    name: str
    arguments: Mapping[str, Any]
    id: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn of a conversation.

    ``train`` says whether a language-model loss reads this turn: None means the usual rule (assistant turns only).
    ``tool_calls`` are an assistant's; on a turn of role ``tool``, ``name`` is the tool that answers and ``call_id`` the
    call that it answers, where the data numbers calls.
    """

    role: str
    content: str
    train: bool | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    name: str = ""
    call_id: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One step of a solution and its label: 1 right, 0 neutral, -1 wrong (PRM800K's scale); None = not labelled."""

    text: str
    label: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Response:
    """One answer to a prompt (usually a single assistant turn) and the feedback it received; None = not given.

    Attributes:
        messages: the turns.
        rank: counted from 0 = best; equal ranks are ties.
        score: an overall rating, higher is better, in the data's own units.
        label: whether the answer is good (or right): thumbs, correctness.
        attributes: named ratings (helpfulness, verbosity ...); a yes or no is 1 or 0.
        steps: labelled steps, whose texts together are the answer.
        failure: how a poor answer fails, by name.
        meta: what else the row says of this answer (who wrote it, a critique, marked errors).
    """

    messages: tuple[Message, ...]
    rank: int | None = None
    score: float | None = None
    label: bool | None = None
    attributes: Mapping[str, float] = field(default_factory=dict[str, float])
    steps: tuple[Step, ...] = ()
    failure: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def text(self) -> str:
        """The assistant text of the response, turns joined by blank lines."""
        return "\n\n".join(m.content for m in self.messages if m.role == "assistant")


@dataclass(frozen=True, kw_only=True, slots=True)
class Preference:
    """Somebody's comparison of responses ``a`` and ``b`` (positions in ``Example.responses``) along one axis.

    ``better`` is the probability, or the verdict, that ``a`` is the better one: 1, 0, or 0.5 for a tie.
    """

    a: int
    b: int
    better: float
    axis: str = ""
    by: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What a right answer is, where it can be checked: ``kind`` names the check.

    ``number`` and ``text`` compare with ``answer``; ``choice`` with ``choices`` and the positions that are ``correct``;
    ``code`` runs ``tests``; ``constraints`` are named requirements with their arguments.
    """

    kind: Literal["number", "text", "choice", "code", "constraints"]
    answer: str = ""
    choices: tuple[str, ...] = ()
    correct: tuple[int, ...] = ()
    tests: tuple[str, ...] = ()
    constraints: tuple[tuple[str, Mapping[str, Any]], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A prompt with any number of responses; demonstrations, pairs and rankings are views of it.

    ``preferences`` are comparisons that need not agree on one order; ``target`` says what a right answer is; ``tools``
    are JSON schemas the prompt offers; ``weight`` (finite, at least 0) scales the row's part in a loss. ``file`` and
    ``row`` (from 1) say where it came from, for error messages; they are not part of its identity.
    """

    prompt: tuple[Message, ...]
    responses: tuple[Response, ...] = ()
    preferences: tuple[Preference, ...] = ()
    target: Target | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    weight: float = 1.0
    kind: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict[str, Any])
    file: str = ""
    row: int = 0

    @property
    def prompt_key(self) -> str:
        """A short hash of the prompt's text, equal for equal prompts wherever they stand."""
        called = [[(c.name, dict(c.arguments)) for c in m.tool_calls] for m in self.prompt]
        turns = [(m.role, m.content) for m in self.prompt]
        return stable_hash([turns, called, list(self.tools)] if any(called) or self.tools else turns)


def stable_hash(value: Any) -> str:
    """Return 16 hex digits of SHA-256 over the value's JSON with sorted keys; equal on every machine."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
