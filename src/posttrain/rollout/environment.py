"""Conversations with an environment: what the policy says is answered, and it goes on, until there is nothing to answer.

Ids are only ever appended: a turn's prompt is the prompt, what was sampled and what was answered, as those ids are; nothing is
decoded to be encoded again. What was sampled and what was not stands in ``Rollout.sampled``, token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from posttrain.data.chat import render
from posttrain.errors import ConfigError, DataError
from posttrain.registry import Registry
from posttrain.rollout.engine import Engine, Request, Rollout, Sampling
from posttrain.types import Example, Message

ENVIRONMENTS = Registry(
    "environment",
    {
        "lookup": "posttrain.rollout.notes:Lookup",
        "retrieval": "posttrain.rollout.notes:Retrieval",
    },
)
"""Name to a function that makes the environment."""


class Environment(Protocol):
    """What answers a policy; it keeps nothing itself, so that one serves all conversations.

    Attributes:
        tools: JSON schemas that prompts offer in the chat template's own way; none where a prompt says itself what there is.
        role: of the turns that answer, one that the chat template knows, such as "tool" or "user".
        turns: most turns of the policy; the last is not answered.
    """

    tools: tuple[Mapping[str, Any], ...]
    role: str
    turns: int

    def reset(self, example: Example) -> Any:
        """The state in which a conversation about a prompt begins."""
        ...

    def step(self, state: Any, said: str) -> tuple[Any, str | None]:
        """The state after a turn of the policy, and the answer to it; None ends the conversation."""
        ...


def find_environment(name: str) -> Environment:
    """The environment of a name in `ENVIRONMENTS`, or of ``module:object``: an environment, or what makes one without arguments.

    Raises:
        ConfigError: no such name, or the object has no ``reset``, ``step``, ``tools``, ``role`` and ``turns``.
    """
    found: Any = ENVIRONMENTS[name]
    made = found() if isinstance(found, type) or not hasattr(found, "step") else found
    missing = [part for part in ("reset", "step", "tools", "role", "turns") if not hasattr(made, part)]
    if missing:
        raise ConfigError(
            f"environment '{name}' has no {', '.join(missing)}; see posttrain.rollout.environment.Environment"
        )
    if made.turns < 1:
        raise ConfigError(f"environment '{name}' has turns={made.turns}; expected at least 1")
    return made


def answer_ids(tokenizer: Any, role: str) -> Callable[[str], tuple[int, ...]]:
    """A function from an answer's text to all ids between the policy's stop token and the first token of its next turn.

    The chat template writes them: what ends the policy's turn, the answer in its turn, the next generation prompt. Text can't
    forge control tokens (`posttrain.data.chat`).

    Raises (when called):
        ModelError: the template has no turns of this role.
    """

    def ids(answer: str) -> tuple[int, ...]:
        talk = [
            Message(role="user", content="."),
            Message(role="assistant", content="."),
            Message(role=role, content=answer),
        ]
        made = render(tokenizer, talk, generation_prompt=True)
        end = next(span.end for span in made.spans if span.message == 1)
        return tuple(made.ids[end:])

    ids(".")
    return ids


@dataclass
class _Talk:
    """One conversation as far as it got."""

    request: Request
    state: Any
    ids: list[int] = field(default_factory=list[int])
    logp: list[float] = field(default_factory=list[float])
    sampled: list[bool] = field(default_factory=list[bool])
    turns: list[Message] = field(default_factory=list[Message])
    stopped: bool = False

    def asks(self, turn: int) -> Request:
        """The request of the next turn; the first is the conversation's own, with its draws."""
        key = (*self.request.key, "turn", turn) if turn else self.request.key
        return Request((*self.request.ids, *self.ids), key)

    def add(self, ids: Sequence[int], logp: Sequence[float], *, sampled: bool) -> None:
        """Append tokens."""
        self.ids += ids
        self.logp += logp
        self.sampled += [sampled] * len(ids)


@dataclass(frozen=True)
class Conversing:
    """An engine whose rollouts are whole conversations; a turn of all that go on is sampled at once.

    A conversation that ends because a turn, the number of turns or the whole was too long counts as cut.

    Attributes:
        engine: samples each turn, of ``max_new_tokens`` at most.
        environment: answers.
        examples: by the ids of their prompts.
        answer: `answer_ids`.
        decode: a turn's ids, without the stop token, as text for the environment.
        longest: tokens that a conversation may have before a turn, prompt included.
    """

    engine: Engine
    environment: Environment
    examples: Mapping[tuple[int, ...], Example]
    answer: Callable[[str], tuple[int, ...]]
    decode: Callable[[Sequence[int]], str]
    longest: int

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_done: Callable[[int], None] | None = None
    ) -> list[Rollout]:
        """One conversation a request, in order; tokens that were not sampled have log-probability 0."""
        talks = [_Talk(r, self.environment.reset(self.examples[r.ids])) for r in requests]
        going = talks
        for turn in range(self.environment.turns):
            found = self.engine.generate([t.asks(turn) for t in going], sampling)
            going = [t for t, r in zip(going, found, strict=True) if self._goes_on(t, r, turn)]
            if on_done is not None:
                on_done(len(talks) - len(going))
            if not going:
                break
        return [
            Rollout(t.request, tuple(t.ids), tuple(t.logp), t.stopped, tuple(t.sampled), tuple(t.turns)) for t in talks
        ]

    def _goes_on(self, talk: _Talk, made: Rollout, turn: int) -> bool:
        """Add a turn and the answer to it; whether another turn follows."""
        talk.add(made.ids, made.logp, sampled=True)
        said = self.decode(made.ids[:-1] if made.stopped else made.ids)
        talk.turns.append(Message(role="assistant", content=said))
        if made.truncated:
            return False
        talk.state, answer = self.environment.step(talk.state, said)
        if answer is None:
            talk.stopped = True
            return False
        ids = self.answer(answer)
        if turn + 1 == self.environment.turns or len(talk.request.ids) + len(talk.ids) + len(ids) > self.longest:
            return False
        talk.add(ids, [0.0] * len(ids), sampled=False)
        talk.turns.append(Message(role=self.environment.role, content=answer))
        return True


def by_ids(examples: Sequence[Example], ids: Sequence[Sequence[int]]) -> dict[tuple[int, ...], Example]:
    """Examples by the ids of their prompts.

    Raises:
        DataError: two examples read alike and say different things about the right answer, or what there is to find.
    """
    out: dict[tuple[int, ...], Example] = {}
    for example, key in zip(examples, map(tuple, ids), strict=True):
        first = out.setdefault(key, example)
        if (first.target, first.meta) != (example.target, example.meta):
            raise DataError.at(
                example.file,
                example.row,
                "prompt",
                f"reads as that of row {first.row}, with another target or meta",
                "an environment is told which is meant by the prompt alone: make them differ",
            )
    return out
