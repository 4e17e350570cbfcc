"""Tasks of reasoning-gym: prompts that a program makes, the same on every machine, and the task's own checker of answers.

A task is named ``TASK,FIELD=VALUE,...``: ``size`` (prompts, 200 unless given), ``seed`` (0) and the fields of the task's
configuration, which set its difficulty: ``chain_sum,size=500,max_terms=3``. The entry that a prompt stands for is never
stored: it is made again from task, fields and index where an answer is checked, and has to read as it did.
"""

from __future__ import annotations

import dataclasses
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from posttrain.data.write import write_jsonl
from posttrain.errors import ConfigError, DataError, suggest
from posttrain.types import Example, Message

KEY = "reasoning_gym"
"""Where an example's ``meta`` says which entry it is."""

_APART = 10**9  # between the seeds of prompts to train on and of held-out ones; entry i has seed + i
_TRIES = 20  # draws for each held-out prompt, since small tasks repeat themselves

_EXPRESSION = re.compile(
    r"""(?:\d+(?:\.\d*)?|\.\d+|[-+*/^=()\s]|(?<![A-Za-z_])(?:[A-Za-z]|sin|cos|tan|exp|log|sqrt|pi)(?![A-Za-z_]))*""",
)
_LIST = re.compile(r"""[\w\s,'"\[\]-]*""")  # no brackets that call, no dots
_EVALUATED = {
    **dict.fromkeys(("countdown", "puzzle24", "polynomial_multiplication"), _EXPRESSION),
    **dict.fromkeys(("simple_integration", "intermediate_integration"), _EXPRESSION),
    **dict.fromkeys(("binary_matrix", "n_queens", "spiral_matrix", "string_insertion"), _LIST),
}
"""Tasks whose checkers evaluate answers as Python, and the answers that may reach them."""

_UNREADABLE = (ArithmeticError, AttributeError, LookupError, SyntaxError, TypeError, ValueError)


class Task(NamedTuple):
    """A task of reasoning-gym with its fields as JSON, so that it can be a key."""

    name: str
    fields: str


def parse_task(text: str) -> Task:
    """Read ``TASK,FIELD=VALUE,...``; values are JSON, and what isn't is text.

    Raises:
        ConfigError: no such task, a field that it doesn't have, or one given without a value.
    """
    name, *given = text.split(",")
    fields: dict[str, Any] = {"size": 200, "seed": 0}
    for item in given:
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"got '{item}' in reasoning_gym:{text}; expected FIELD=VALUE, such as size=500")
        try:
            fields[key] = json.loads(value)
        except ValueError:
            fields[key] = value
    tasks = _gym().factory.DATASETS
    if name not in tasks:
        raise ConfigError(f"reasoning-gym has no task '{name}'; {suggest(name, tasks)}")
    known = [field.name for field in dataclasses.fields(tasks[name][1])]
    for key in fields:
        if key not in known:
            raise ConfigError(f"the task '{name}' has no field '{key}'; {suggest(key, known)}")
    task = Task(name, json.dumps(fields, sort_keys=True))
    _entries(task)
    return task


def write_task(task: Task, directory: Path) -> None:
    """Write ``prompts.jsonl`` and ``heldout_prompts.jsonl``, a quarter as many, none of them among the first."""
    fields = json.loads(task.fields)
    prompts = [_example(task, index) for index in range(fields["size"])]
    _entries.cache_clear()
    if prompts[0] != _example(task, 0):
        raise ConfigError(
            f"reasoning-gym makes other entries of '{task.name}' each time, so answers can't be checked; take another task"
        )
    seen = {example.prompt_key for example in prompts}
    wanted = max(1, fields["size"] // 4)
    far = Task(
        task.name, json.dumps(fields | {"seed": fields["seed"] + _APART, "size": _TRIES * wanted}, sort_keys=True)
    )
    held: list[Example] = []
    for index in range(_TRIES * wanted):
        example = _example(far, index)
        if example.prompt_key not in seen:
            seen.add(example.prompt_key)
            held.append(example)
        if len(held) == wanted:
            break
    else:
        raise ConfigError(
            f"task '{task.name}' has {len(held)} prompts that are not among its first {fields['size']}, expected {wanted}; "
            "give a smaller size or wider fields"
        )
    write_jsonl(directory / "prompts.jsonl", prompts)
    write_jsonl(directory / "heldout_prompts.jsonl", held)


def score(prompt: str, answer: str, which: dict[str, Any]) -> float:
    """The task's own score of an answer to an entry, 0 to 1; many tasks give a small part for a near miss.

    An answer that makes the checker raise as it reads it scores 0. Where a checker evaluates answers as Python, one that could
    do more than compute (it has names longer than a letter, attributes, or calls in a list) scores 0 unread.

    Args:
        prompt: the entry's question, as it was asked.
        answer: what was answered, without reasoning.
        which: ``meta["reasoning_gym"]`` of its example.

    Raises:
        DataError: the entry that is made now is not the one that was asked.
    """
    task = Task(which["task"], json.dumps(which["fields"], sort_keys=True))
    data = _entries(task)
    entry = data[which["index"]]
    if entry["question"].strip() != prompt.strip():
        raise DataError(
            f"reasoning-gym makes another entry {which['index']} of '{task.name}' than was asked; make the data again with "
            "the version that is installed"
        )
    if task.name in _EVALUATED and not _EVALUATED[task.name].fullmatch(answer):
        return 0.0
    try:
        return float(data.score_answer(answer, entry))
    except _UNREADABLE:
        return 0.0


def expected(which: dict[str, Any]) -> str:
    """The task's own answer to an entry; '' where it has none of its own."""
    entry = _entries(Task(which["task"], json.dumps(which["fields"], sort_keys=True)))[which["index"]]
    return str(entry["answer"] or "")


def task_key(task: Task) -> str:
    """What decides the rows beside this file: task, fields, version of the package."""
    from importlib.metadata import version

    return f"{task.name}-{task.fields}-{version('reasoning-gym')}"


def _example(task: Task, index: int) -> Example:
    question = _entries(task)[index]["question"].strip()
    meta = {KEY: {"task": task.name, "fields": json.loads(task.fields), "index": index}}
    return Example(prompt=(Message(role="user", content=question),), kind=task.name, meta=meta)


@lru_cache(maxsize=32)
def _entries(task: Task) -> Any:
    """The task's generator of entries."""
    try:
        return _gym().create_dataset(task.name, **json.loads(task.fields))
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(
            f"reasoning-gym refuses {task.fields} for '{task.name}': {error}; correct the fields"
        ) from error


def _gym() -> Any:
    try:
        import reasoning_gym  # pyright: ignore[reportMissingTypeStubs]
    except ImportError as error:
        raise ConfigError("tasks of reasoning-gym need the extra gym: pip install 'posttrain[gym]'") from error
    return reasoning_gym
