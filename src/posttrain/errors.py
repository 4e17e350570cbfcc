"""Errors: each says what was got, what was expected and what to do, and is also its standard-library kind."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable


class PosttrainError(Exception):
    """Root of every error the library raises on purpose; the command line prints it as one line and exits with 2."""


class ConfigError(PosttrainError, ValueError):
    """An option, recipe, model or name that can't be used as given."""


class DataError(PosttrainError, ValueError):
    """A fault in a data file; the message names file, row and field."""

    @classmethod
    def at(cls, file: object, row: int, field: str, problem: str, remedy: str) -> DataError:
        """Build the standard message ``FILE row R, field F: PROBLEM; REMEDY`` (rows count from 1, blank lines included).

        Names come from files: control characters are escaped, and what is too long to be read is shown in part.
        """
        message = f"{file} row {row}, field '{_part(field, 120)}': {_part(problem, 1000)}; {_part(remedy, 1000)}"
        return cls(printable(message).replace("\n", "\\n"))


class UselessRow(DataError):
    """A well-formed row that teaches nothing; readers leave it out and count it by ``reason``, a short phrase."""

    def __init__(self, message: str, reason: str = "teaches nothing") -> None:
        super().__init__(message)
        self.reason = reason


class ModelError(PosttrainError, RuntimeError):
    """A model, tokenizer or checkpoint that can't be used as asked."""


class CheckError(PosttrainError, RuntimeError):
    """A self-check that failed before or during training."""


class RewardError(PosttrainError, RuntimeError):
    """A reward that answered with something that can't be a score."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the closest known name, else the list of known names."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(options) or 'none'}"


def printable(text: str) -> str:
    """Return the text with characters that a terminal would obey, or show nothing for, as escapes.

    Line breaks and spaces stay, and the joiners that emoji and some scripts are written with.
    """
    if text.isprintable():
        return text
    kept = "\n\u200c\u200d"
    return "".join(
        c if c.isprintable() or c in kept or unicodedata.category(c) == "Zs" else c.encode("unicode_escape").decode()
        for c in text
    )


def _part(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]} ..."
