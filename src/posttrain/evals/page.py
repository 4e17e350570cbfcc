"""The pieces of the report's page: every text is escaped here, and nothing in the page runs or loads."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.evals.grids import NOT_SHOWN, Grid, clean_text, row_heading, score_line

CSS = """
:root { color-scheme: light; --line: #d8dee4; --soft: #57606a; --shade: #f6f8fa; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 1.5rem; color: #1f2328; background: #fff;
  font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { margin: 0 0 .5rem; font-size: 1.7rem; }
h2 { margin: 2.2rem 0 .6rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line);
  font-size: 1.25rem; }
h3 { margin: 1.3rem 0 .4rem; font-size: 1rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
pre { font: 13px/1.45 ui-monospace, "DejaVu Sans Mono", monospace; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; background: var(--shade); }
th.left, td.left { text-align: left; }
td.quiet { color: var(--soft); font-style: italic; }
td.clear { font-weight: 600; }
.note { margin: .3rem 0 0; color: var(--soft); font-size: .87rem; }
.sample { margin: 1rem 0 1.6rem; }
.prompt { margin: 0 0 .5rem; padding: .5rem .8rem; border-left: 3px solid var(--soft);
  background: var(--shade); }
.answers { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); gap: .7rem; }
.answer { border: 1px solid var(--line); border-radius: 6px; padding: .5rem .8rem; min-width: 0; }
.answer h4 { margin: 0 0 .3rem; color: var(--soft); font-size: .85rem; }
.text { max-height: 26rem; overflow-y: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
img { max-width: 100%; }
details { margin: .4rem 0; }
details pre { margin: .3rem 0; padding: .6rem .8rem; background: var(--shade); overflow-x: auto; }
@media (max-width: 700px) { .answers { grid-auto-flow: row; } }
"""


def document(title: str, body: str) -> str:
    """Wrap a body in a page whose policy allows this style sheet and inline images, and nothing else."""
    digest = base64.b64encode(hashlib.sha256(CSS.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def escape(text: object) -> str:
    """Make any text safe inside an element or a quoted attribute, its control characters visible."""
    return html.escape(clean_text(str(text)), quote=True)


def section(title: str, *parts: str) -> str:
    """Return a section, or nothing if its parts are all empty."""
    inside = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(title)}</h2>\n{inside}\n</section>\n" if inside else ""


def facts(pairs: Mapping[str, object]) -> str:
    """Return a list of names and values."""
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in pairs.items()) + "</dl>"


def note(text: str) -> str:
    """Return a paragraph in small print."""
    return f'<p class="note">{escape(text)}</p>'


def table(grid: Grid) -> str:
    """Return a grid with its heading and notes."""
    head = "".join(f"<th{_side(grid, i)}>{_lines(name)}</th>" for i, name in enumerate(grid.header))
    rows = "".join(
        "<tr>" + "".join(f"<td{_side(grid, i, cell)}>{_lines(cell)}</td>" for i, cell in enumerate(row)) + "</tr>\n"
        for row in grid.rows
    )
    body = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>"
    title = f"<h3>{escape(grid.title)}</h3>" if grid.title else ""
    return f'{title}\n<div class="scroll"><table>\n{body}\n</table></div>\n' + "".join(
        note(text) for text in grid.notes
    )


def answers(row: Mapping[str, Any]) -> str:
    """Return one prompt with every policy's whole answer side by side."""
    heading = row_heading(row)
    cards = "".join(
        f'<div class="answer"><h4>{escape(policy)}</h4>'
        f'<div class="text" dir="auto">{escape(answer["text"])}</div>{note(score_line(answer))}</div>\n'
        for policy, answer in row["answers"].items()
    )
    return (
        f'<div class="sample"><div class="prompt text" dir="auto">{escape(row["prompt"])}</div>\n'
        f'<div class="answers">{cards}</div>{note(heading) if heading else ""}</div>\n'
    )


def blocks(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return several prompts with their answers."""
    return "".join(answers(row) for row in rows)


def image(png: bytes, description: str) -> str:
    """Return an image that lies inside the page."""
    return f'<img alt="{escape(description)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def folded(summary: str, text: str) -> str:
    """Return preformatted text behind a line that opens it."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>\n"


def _side(grid: Grid, column: int, cell: str = "") -> str:
    """Return the class attribute of a cell: its side, and how loud a verdict is."""
    names = ["left"] if column in grid.left else []
    if cell == NOT_SHOWN:
        names.append("quiet")
    elif grid.header[column] == "verdict" and cell:
        names.append("clear")
    return f' class="{" ".join(names)}"' if names else ""


def _lines(text: str) -> str:
    return "<br>".join(escape(line) for line in text.split("\n"))
