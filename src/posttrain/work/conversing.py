"""What a stage with an environment changes: its prompts offer tools, and its engine samples conversations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from posttrain.rollout.engine import Engine
from posttrain.rollout.environment import Conversing, Environment, answer_ids, by_ids
from posttrain.types import Example
from posttrain.work.inputs import Start


def offered(examples: Sequence[Example], environment: Environment | None) -> list[Example]:
    """Examples whose prompts offer the environment's tools beside their own."""
    tools = () if environment is None else tuple(environment.tools)
    return [replace(e, tools=(*e.tools, *tools)) for e in examples] if tools else list(examples)


def conversing(
    engine: Engine,
    environment: Environment | None,
    start: Start,
    examples: Sequence[Example],
    ids: Sequence[Sequence[int]],
    longest: int,
) -> Engine:
    """The engine itself, or with an environment one that samples conversations of at most ``longest`` tokens before a turn."""
    if environment is None:
        return engine
    return Conversing(
        engine=engine,
        environment=environment,
        examples=by_ids(examples, ids),
        answer=answer_ids(start.tokenizer, environment.role),
        decode=start.tokenizer.decode,
        longest=longest,
    )
