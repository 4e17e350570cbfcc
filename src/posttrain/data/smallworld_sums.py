"""Sums of two to four numbers in the small world's words, with worked thoughts: a task of several steps whose answer can be checked.

"what is two plus five plus three?" is answered ``<think>two plus five is seven, seven plus three is ten</think> <answer>ten</answer>``.
One sum in eight, by a hash of its numbers, is held out.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path

from posttrain.data.smallworld_language import NUMBERS, Draw
from posttrain.data.write import write_jsonl
from posttrain.types import Example, Message, Response, Target, stable_hash

ASKS = ("what is {}?", "add up {}", "give the sum {}")
_MOST = 9  # of a number; a sum has to be one of the small world's numbers, at most twenty


def prompts(n: int, seed: int = 0, split: str = "train") -> list[Example]:
    """``n`` sums to be answered, with the number's word as target; the two splits share no sum."""
    return [_example(_sum(Draw("sums", split, seed, i), split), Draw("ask", split, seed, i)) for i in range(n)]


def demonstrations(n: int, seed: int = 0) -> list[Example]:
    """``n`` sums of the training split, each with its worked answer."""
    out: list[Example] = []
    for i in range(n):
        numbers = _sum(Draw("worked sums", seed, i), "train")
        example = _example(numbers, Draw("worked ask", seed, i))
        out.append(_with(example, worked(numbers)))
    return out


def worked(numbers: tuple[int, ...]) -> str:
    """The answer with its thoughts."""
    sums = list(accumulate(numbers))
    steps = [
        f"{NUMBERS[before]} plus {NUMBERS[after - before]} is {NUMBERS[after]}" for before, after in pairwise(sums)
    ]
    return f"<think>{', '.join(steps)}</think> <answer>{NUMBERS[sums[-1]]}</answer>"


def write(directory: Path, count: int) -> None:
    """Write ``count`` demonstrations and prompts, and a quarter as many held-out prompts."""
    parts: dict[str, Callable[[], list[Example]]] = {
        "demonstrations": lambda: demonstrations(count),
        "prompts": lambda: prompts(count),
        "heldout_prompts": lambda: prompts(max(1, count // 4), split="heldout"),
    }
    for name, make in parts.items():
        write_jsonl(directory / f"{name}.jsonl", make())


def _sum(d: Draw, split: str) -> tuple[int, ...]:
    """Numbers of a split."""
    while True:
        numbers = tuple(d.below(_MOST + 1) for _ in range(2 + d.below(3)))
        held = int(stable_hash(["sums", sorted(numbers)]), 16) % 8 == 0
        if sum(numbers) < len(NUMBERS) and held == (split == "heldout"):
            return numbers


def _example(numbers: tuple[int, ...], d: Draw) -> Example:
    asked = d.pick(ASKS).format(" plus ".join(NUMBERS[k] for k in numbers))
    target = Target(kind="text", answer=NUMBERS[sum(numbers)])
    return Example(prompt=(Message(role="user", content=asked),), target=target, kind="sum")


def _with(example: Example, answer: str) -> Example:
    response = Response(messages=(Message(role="assistant", content=answer),), label=None)
    return Example(prompt=example.prompt, responses=(response,), target=example.target, kind=example.kind)
