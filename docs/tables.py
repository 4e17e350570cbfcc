"""Write the README's tables of methods and systems from the registries: ``python docs/tables.py``."""

from __future__ import annotations

import inspect
from pathlib import Path

from posttrain.losses.policy import policy_losses
from posttrain.registry import RECIPES

START, END = "<!-- tables: made by docs/tables.py -->\n", "<!-- end of tables -->"
README = Path(__file__).parents[1] / "README.md"


def first_line(item: object) -> str:
    """The one line of what it is."""
    return (inspect.getdoc(item) or "").partition("\n")[0]


def tables() -> str:
    """Markdown of both tables."""
    methods = [
        f"| `{name}` | {policy_losses.kind} | {first_line(policy_losses[name])} |" for name in sorted(policy_losses)
    ]
    systems = [f"| `{name}` | {first_line(RECIPES[name])} |" for name in sorted(RECIPES)]
    head = ["| method | kind | what it is |", "|---|---|---|"]
    return "\n".join([*head, *methods, "", "| system | what it is |", "|---|---|", *systems]) + "\n"


def written(text: str) -> str:
    """The README with fresh tables."""
    before, rest = text.split(START)
    return before + START + tables() + END + rest.split(END)[1]


if __name__ == "__main__":
    README.write_text(written(README.read_text()))
