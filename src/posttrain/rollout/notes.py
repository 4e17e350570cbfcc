"""Two environments over a prompt's own notes (``meta["notes"]``, texts): one looks up exactly what is named, one retrieves what fits best.

A turn that begins with "look up" is a call; any other turn ends the conversation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.data.smallworld_notes import CALL
from posttrain.errors import DataError
from posttrain.types import Example

NOTHING = "nothing found"


class Lookup:
    """A tool that is called with all words of an entry, such as "look up kite farmer", and answers with the one note that has them.

    No note, or several, that have them all are "nothing found".
    """

    tools: tuple[Mapping[str, Any], ...] = ()
    role = "user"
    turns = 3

    def reset(self, example: Example) -> list[str]:
        """The prompt's notes."""
        return notes_of(example)

    def step(self, state: list[str], said: str) -> tuple[list[str], str | None]:
        """A note, or that there is none; None where nothing is called."""
        if (words := called(said)) is None:
            return state, None
        found = [note for note in state if words and words <= set(note.split())]
        return state, found[0] if len(found) == 1 else NOTHING


class Retrieval(Lookup):
    """A search that answers with the two notes that share most words with a call, the earlier first where equally many."""

    def step(self, state: list[str], said: str) -> tuple[list[str], str | None]:
        """The best notes that share a word at all, or that there is none; None where nothing is called."""
        if (words := called(said)) is None:
            return state, None
        shared = [len(words & set(note.split())) for note in state]
        best = sorted(range(len(state)), key=lambda i: (-shared[i], i))[:2]
        return state, ". ".join(state[i] for i in best if shared[i]) or NOTHING


def called(said: str) -> set[str] | None:
    """The words that a turn wants looked up; None where it is no call."""
    text = said.strip().lower()
    return set(text.removeprefix(CALL).rstrip(".?").split()) if text.startswith(CALL) else None


def notes_of(example: Example) -> list[str]:
    """The notes of a prompt.

    Raises:
        DataError: it has none.
    """
    notes: Any = example.meta.get("notes")
    if not isinstance(notes, Sequence) or isinstance(notes, str) or not all(isinstance(n, str) for n in notes):
        raise DataError.at(
            example.file,
            example.row,
            "meta.notes",
            "no list of texts",
            "give the notes that can be found, or take data 'notes'",
        )
    return [str(n) for n in notes]
