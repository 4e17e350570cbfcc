"""Notes about who owns what in the small world: questions that only a look into a prompt's own notes can answer.

Each prompt has eight notes in ``meta["notes"]``, drawn anew, so nothing about them can be learnt by heart. Demonstrations show
a conversation: "look up kite farmer", a note in answer, "<answer>red</answer>"; half of them guess instead, as a careless
annotator would.
"""

from __future__ import annotations

from pathlib import Path

from posttrain.data.smallworld_language import OBJECTS, VALUES, WORDS, Draw
from posttrain.data.write import write_jsonl
from posttrain.types import Example, Message, Response, Target

OWNERS = ("doctor", "teacher", "farmer", "sailor", "painter")
CALL = "look up"
"""How a turn begins that wants something looked up."""

_NOTES = 8
_ASKS = (
    "by the notes of {book}, what colour is the {thing} of the {owner}?",
    "look into the notes of {book} and tell me the colour of the {thing} of the {owner}",
)


def note(thing: str, owner: str, colour: str) -> str:
    """What a note says."""
    return f"the {thing} of the {owner} is {colour}"


def prompts(n: int, seed: int = 0, split: str = "train") -> list[Example]:
    """``n`` questions, each with its notes and its target; each names notes of its own, so that no two read alike."""
    return [_drawn(Draw("notes", split, seed, i), i)[0] for i in range(n)]


def demonstrations(n: int, seed: int = 0) -> list[Example]:
    """``n`` questions with a conversation each: one in two looks the answer up, the others guess at once."""
    out: list[Example] = []
    for i in range(n):
        d = Draw("noted answers", seed, i)
        example, (thing, owner, colour) = _drawn(d, i)
        if i % 2:
            turns = [_said(f"<answer>{d.pick(VALUES['colour'])}</answer>")]
        else:
            found = Message(role="user", content=note(thing, owner, colour))
            turns = [_said(f"{CALL} {thing} {owner}"), found, _said(f"<answer>{colour}</answer>")]
        out.append(Example(prompt=example.prompt, responses=(Response(messages=tuple(turns)),), kind="note"))
    return out


def write(directory: Path, count: int) -> None:
    """Write ``count`` demonstrations and prompts, and a quarter as many held-out prompts."""
    held = prompts(max(1, count // 4), split="heldout")
    for name, rows in (
        ("demonstrations", demonstrations(count)),
        ("prompts", prompts(count)),
        ("heldout_prompts", held),
    ):
        write_jsonl(directory / f"{name}.jsonl", rows)


def _said(text: str) -> Message:
    return Message(role="assistant", content=text)


def _drawn(d: Draw, index: int) -> tuple[Example, tuple[str, str, str]]:
    """A question with its notes, which the index names; the first drawn is asked about."""
    owners = [d.pick(OWNERS) for _ in range(_NOTES)]
    facts = [(t, o, d.pick(VALUES["colour"])) for t, o in zip(d.sample(OBJECTS, _NOTES), owners, strict=True)]
    thing, owner, colour = facts[0]
    book = f"{WORDS[index % len(WORDS)]} and {WORDS[index // len(WORDS) % len(WORDS)]}"
    asked = d.pick(_ASKS).format(book=book, thing=thing, owner=owner)
    notes = [note(*fact) for fact in d.sample(facts, _NOTES)]
    target = Target(kind="text", answer=colour)
    example = Example(prompt=(Message(role="user", content=asked),), target=target, kind="note", meta={"notes": notes})
    return example, facts[0]
