"""Write the tables of methods, systems and data formats from the registries into their pages: ``python docs/tables.py``."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

from posttrain import losses
from posttrain.data.formats import FORMATS
from posttrain.losses.policy import policy_losses
from posttrain.registry import RECIPES, Registry
from posttrain.train.algorithms import ALGORITHMS

START, END = "<!-- tables: made by docs/tables.py -->\n", "<!-- end of tables -->"
README = Path(__file__).parents[1] / "README.md"
DATA = Path(__file__).parent / "data.md"


def first_line(item: object) -> str:
    """The one line of what it is."""
    return (inspect.getdoc(item) or "").partition("\n")[0].replace("|", "\\|")


def tables() -> str:
    """Markdown of both tables."""
    methods = [
        f"| `{name}` | {kind.kind} | {first_line(kind[name])} |"
        for kind in (policy_losses, *(item for item in vars(losses).values() if isinstance(item, Registry)))
        for name in sorted(kind)
    ]
    methods += [f"| `{name}` | algorithm | {row.summary} |" for name, row in sorted(ALGORITHMS.items())]
    systems = [f"| `{name}` | {first_line(RECIPES[name])} |" for name in sorted(RECIPES)]
    head = ["| method | kind | what it is |", "|---|---|---|"]
    return "\n".join([*head, *methods, "", "| system | what it is |", "|---|---|", *systems]) + "\n"


def formats() -> str:
    """Markdown of the table of formats and of an example row of each."""
    head = ["| format | columns | what a row becomes |", "|---|---|---|"]
    rows: list[str] = []
    for name, form in FORMATS.items():
        optional = sorted(form.used - form.needs - {"weight", "kind"})
        columns = ", ".join([*(f"`{c}`" for c in form.example if c in form.needs), *(f"[`{c}`]" for c in optional)])
        asked = " Only by name." if form.asked else ""
        rows.append(f"| `{name}` | {columns} | {form.summary.replace('|', '/')}{asked} |")
    lines = [f"{name}: {json.dumps(form.example, ensure_ascii=False)}" for name, form in FORMATS.items()]
    return "\n".join([*head, *rows, "", "A row of each:", "", "```", *lines, "```"]) + "\n"


PAGES = {README: tables, DATA: formats}


def written(page: Path) -> str:
    """A page with fresh tables."""
    before, rest = page.read_text().split(START)
    return before + START + PAGES[page]() + END + rest.split(END)[1]


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(written(page))
