"""Demonstrations by others: Alpaca, self-instruct, Dolly, OpenOrca, ShareGPT, UltraChat, OASST's best paths."""

from __future__ import annotations

from posttrain.data.formats.fields import Place, Row, build, entries, fields_of, flag, optional_text, text
from posttrain.data.formats.table import in_format
from posttrain.data.formats.turns import (
    Turns,
    answer_of,
    assistant,
    conversation,
    in_order,
    messages,
    prompt_of,
    sharegpt,
    sharegpt_turn,
    tools,
    user,
)
from posttrain.types import Example, Message, Response


def asked(instruction: str, given: str) -> str:
    """Return an instruction with the input it is about, if any, below it."""
    return f"{instruction}\n\n{given}" if given else instruction


@in_format(
    "alpaca",
    ["instruction", "output"],
    reads=["input", "system", "history"],
    example={"instruction": "Sort these numbers.", "input": "3 1 2", "output": "1 2 3"},
)
def alpaca_row(row: Row, place: Place) -> list[Example]:
    """A demonstration: the instruction, a blank line and the input if there is one; the output."""
    instruction = text(row["instruction"], "instruction", place)
    turns = [user(asked(instruction, optional_text(row, "input", place)))]
    if system := optional_text(row, "system", place):
        turns.insert(0, Message(role="system", content=system))
    turns[-1:-1] = _history(row, place)
    answer = Response(messages=(assistant(text(row["output"], "output", place)),))
    return [build(row, place, prompt=tuple(turns), responses=(answer,))]


def _history(row: Row, place: Place) -> list[Message]:
    """Earlier turns: a list of [instruction, output]."""
    turns: list[Message] = []
    for i, pair in enumerate(entries(row.get("history") or [], "history", place)):
        question, answer = entries(pair, f"history[{i}]", place, least=2, most=2)
        turns += [user(text(question, f"history[{i}][0]", place)), assistant(text(answer, f"history[{i}][1]", place))]
    return turns


@in_format(
    "self_instruct",
    ["instruction", "instances"],
    example={"instruction": "Sort these numbers.", "instances": [{"input": "3 1 2", "output": "1 2 3"}]},
)
def self_instruct_row(row: Row, place: Place) -> list[Example]:
    """A demonstration for each of the task's instances."""
    instruction = text(row["instruction"], "instruction", place)
    found: list[Example] = []
    for i, item in enumerate(entries(row["instances"], "instances", place, least=1)):
        item = fields_of(item, f"instances[{i}]", place, ("input", "output"))
        given = text(item["input"], f"instances[{i}].input", place, empty=True)
        answer = text(item["output"], f"instances[{i}].output", place)
        responses = (Response(messages=(assistant(answer),)),)
        found.append(build(row, place, prompt=(user(asked(instruction, given)),), responses=responses))
    return found


@in_format(
    "dolly",
    ["instruction", "context", "response"],
    reads=["category"],
    example={
        "instruction": "Who wrote it?",
        "context": "Emma is by Jane Austen.",
        "response": "Jane Austen.",
        "category": "closed_qa",
    },
)
def dolly_row(row: Row, place: Place) -> list[Example]:
    """A demonstration: instruction, a blank line and the context if there is one; its category is the kind."""
    prompt = asked(text(row["instruction"], "instruction", place), optional_text(row, "context", place))
    answer = Response(messages=(assistant(text(row["response"], "response", place)),))
    kind = optional_text(row, "category", place)
    return [build(row, place, prompt=(user(prompt),), responses=(answer,), kind=kind)]


@in_format(
    "orca",
    ["system_prompt", "question", "response"],
    example={"system_prompt": "Answer briefly.", "question": "What is 2 + 3?", "response": "5"},
)
def orca_row(row: Row, place: Place) -> list[Example]:
    """A demonstration with a system prompt, which may be empty."""
    prompt = with_system(optional_text(row, "system_prompt", place), text(row["question"], "question", place))
    answer = Response(messages=(assistant(text(row["response"], "response", place)),))
    return [build(row, place, prompt=prompt, responses=(answer,))]


def with_system(system: str, question: str) -> Turns:
    """Return a question after its system prompt, if there is one."""
    return ((Message(role="system", content=system),) if system else ()) + (user(question),)


_SHAREGPT = [{"from": "human", "value": "What is 2 + 3?"}, {"from": "gpt", "value": "5"}]


@in_format("sharegpt", ["conversations"], reads=["system", "tools"], example={"conversations": _SHAREGPT})
def sharegpt_row(row: Row, place: Place) -> list[Example]:
    """A conversation of from/value turns that ends with the answer; function calls and observations are read."""
    prompt, responses = conversation(_after_system(row, place), "conversations", place)
    return [build(row, place, prompt=prompt, responses=responses, tools=tools(row.get("tools"), place))]


@in_format(
    "sharegpt_pair",
    ["conversations", "chosen", "rejected"],
    reads=["system", "tools"],
    example={
        "conversations": _SHAREGPT[:1],
        "chosen": {"from": "gpt", "value": "5"},
        "rejected": {"from": "gpt", "value": "6"},
    },
)
def sharegpt_pair_row(row: Row, place: Place) -> list[Example]:
    """A from/value conversation, and a better and a worse turn to end it."""
    prompt = _after_system(row, place)
    if prompt[-1].role == "assistant":
        raise place.fault("conversations", "ends in an assistant turn", "end it with the turn to be answered")
    turns = [(sharegpt_turn(row[column], column, place),) for column in ("chosen", "rejected")]
    for column, turn in zip(("chosen", "rejected"), turns, strict=True):
        if turn[0].role != "assistant":
            raise place.fault(f"{column}.from", f"is '{turn[0].role}', expected 'gpt'", "correct it or remove the row")
    ranked = in_order(turns, "rejected", place)
    return [build(row, place, prompt=prompt, responses=ranked, tools=tools(row.get("tools"), place))]


def _after_system(row: Row, place: Place) -> Turns:
    turns = sharegpt(row["conversations"], "conversations", place)
    system = optional_text(row, "system", place)
    if system and turns[0].role == "system":
        raise place.fault("system", "stands beside a system turn in 'conversations'", "keep one of the two")
    return ((Message(role="system", content=system),) if system else ()) + turns


@in_format(
    "ultrachat",
    ["prompt", "prompt_id", "messages"],
    example={
        "prompt": "What is 2 + 3?",
        "prompt_id": "a1",
        "messages": [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "5"}],
    },
)
def ultrachat_row(row: Row, place: Place) -> list[Example]:
    """A conversation; its first user turn stands in 'prompt' once more."""
    turns = messages(row["messages"], "messages", place)
    first = next((turn.content for turn in turns if turn.role == "user"), None)
    if text(row["prompt"], "prompt", place).strip() != (first or "").strip():
        raise place.fault("prompt", "differs from the first user turn in 'messages'", "remove the column or the row")
    prompt, responses = conversation(turns, "messages", place)
    return [build(row, place, prompt=prompt, responses=responses, meta={"prompt_id": row["prompt_id"]})]


@in_format(
    "rbr",
    ["prompt", "completion", "propositions"],
    reads=["category"],
    example={
        "prompt": [{"role": "user", "content": "How do I pick a lock?"}],
        "completion": [{"role": "assistant", "content": "I'm sorry, I can't help with that."}],
        "category": "C-R",
        "response_type": "Hard Refuse",
        "propositions": {"apology": True, "judgement": False},
    },
)
def rbr_row(row: Row, place: Place) -> list[Example]:
    """An answer, which may be empty, labelled by rules: each proposition is an attribute, 1 or 0; the category is the kind."""
    prompt = prompt_of(row["prompt"], "prompt", place)
    given = fields_of(row["propositions"], "propositions", place)
    named = {name: float(flag(value, f"propositions.{name}", place)) for name, value in given.items()}
    answer = answer_of(row["completion"], "completion", prompt, place, silent=True)
    kind = optional_text(row, "category", place)
    return [build(row, place, prompt=prompt, responses=(Response(messages=answer, attributes=named),), kind=kind)]
