"""Print what a check found, and rows as training reads them, on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from posttrain.data.checking import CheckReport, Overlap, rendered
from posttrain.data.quality import FileReport, shape
from posttrain.data.tally import Lengths
from posttrain.errors import DataError, ModelError, printable
from posttrain.types import Example, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from posttrain.data.chat import Rendered

STYLES = {(0, 0): "", (0, 1): "cyan", (1, 0): "bold green", (1, 1): "bold green underline"}
"""Style of a token by whether it is trained and whether it is a control token."""

_KEPT = 400  # characters shown of each end of a long stretch of text
_FINDINGS = 20  # shown of a source


# ---------------------------------------------------------------------------- a report


def print_together(report: CheckReport, console: Console) -> None:
    """Print the prompts that sources share, and how many sources are clean."""
    for overlap in report.overlaps:
        console.print(_overlap(overlap))
    clean = sum(file.clean for file in report.files)
    leaks = sum(overlap.leak for overlap in report.overlaps)
    text = f"clean: {clean} of {len(report.files)} sources" + (f"; leaks between them: {leaks}" if leaks else "")
    console.print(Text(text, style="bold green" if report.clean else "bold red"))


def print_file(file: FileReport, console: Console) -> None:
    """Print one source: verdict, findings, lengths with bars, and better against worse answers."""
    verdict = Text("clean", "bold green") if file.clean else Text("faults", "bold red")
    shapes = ", ".join(f"{name} {n:,}" for name, n in file.shapes.items()) or "no examples"
    console.print(Text.assemble((printable(file.source), "bold"), ": ", verdict, f"; rows {file.rows:,}: {shapes}"))
    if file.kinds:
        shown = [f"{printable(name)} {n:,}" for name, n in list(file.kinds.items())[:8]]
        more = [f"{len(file.kinds) - 8} more"] if len(file.kinds) > 8 else []
        console.print(Text(f"kinds: {', '.join(shown + more)}"))
    if file.findings:
        console.print(_findings(file))
    console.print(Text(_duplicates(file)))
    if file.compared:
        found = file.compared
        tau = "none" if found.tau is None else f"{found.tau:+.2f}"
        text = f"better against worse answer: {found.words_better:.1f} against {found.words_worse:.1f} words, "
        text += f"longer in {found.longer_better:.1%} of {found.pairs:,} pairs, tau {tau}"
        console.print(Text(text))
    if file.labels:
        found = file.labels
        parts = [(found.good, "good", found.words_good), (found.bad, "bad", found.words_bad)]
        said = [f"{n:,} {name}" + (f" ({words:.1f} words)" if words is not None else "") for n, name, words in parts]
        console.print(Text(f"labels: {', '.join(said)}"))
    if file.examples:
        words = {f"{name} words": found for name, found in file.words.items()}
        rest = {name: found for name, found in (("turns", file.turns), ("tokens", file.tokens)) if found}
        console.print(_lengths(words | rest))
        console.print(_bars(words | rest, console))
    console.print()


def _findings(file: FileReport) -> Table:
    table = Table(show_edge=False, pad_edge=False, box=None, padding=(0, 2, 0, 0), expand=True)
    table.add_column("", no_wrap=True)
    table.add_column("count", justify="right", no_wrap=True)
    table.add_column("what", ratio=3, overflow="fold")
    table.add_column("first", ratio=2, overflow="fold")
    for finding in file.findings[:_FINDINGS]:
        level = Text(finding.level, "red" if finding.level == "fault" else "yellow")
        first = finding.first.replace(f"{file.source} row ", "row ")
        table.add_row(level, f"{finding.count:,}", Text(printable(finding.text)), Text(printable(first)))
    if len(file.findings) > _FINDINGS:
        table.add_row("", "", f"and {len(file.findings) - _FINDINGS} more kinds, in the report")
    return table


def _duplicates(file: FileReport) -> str:
    counts = {name: tally.count for name, tally in file.duplicates.items()}
    if not any(counts.values()):
        return "no prompt stands twice"
    return "duplicates: " + ", ".join(
        f"{counts[f'{what}, but for case and white space']:,} {what}s ({counts[f'{what}, exactly']:,} exactly)"
        for what in ("row", "prompt")
    )


def _lengths(found: Mapping[str, Lengths]) -> Table:
    table = Table(show_edge=False, pad_edge=False, box=None, padding=(0, 3, 0, 0))
    table.add_column("")
    for name in ("mean", "half", "95 %", "99 %", "longest"):
        table.add_column(name, justify="right")
    for name, one in found.items():
        row = (f"{one.mean:,.1f}", *(f"{n:,}" for n in (one.half, one.p95, one.p99, one.longest)))
        table.add_row(name, *row)
    return table


def _bars(found: Mapping[str, Lengths], console: Console) -> Table:
    """Histograms side by side: a row for each doubling of length."""
    block = "█" if "utf" in console.encoding.lower() else "#"
    widest = max(len(f"{max(n for *_, n in one.bars):,}") for one in found.values())
    room = max(4, (min(console.width, 120) - 14) // len(found) - widest - 4)
    table = Table(show_edge=False, pad_edge=False, box=None, padding=(0, 2, 0, 0))
    table.add_column("length", justify="right", no_wrap=True)
    for name in found:
        table.add_column(name, no_wrap=True)
    ranges = sorted({(low, high) for one in found.values() for low, high, n in one.bars if n})
    for low, high in ranges:
        cells = []
        for one in found.values():
            n = next((n for first, _, n in one.bars if first == low), 0)
            top = max(n for *_, n in one.bars)
            bar = block * max(round(n / top * room), 1) if n else ""
            cells.append(Text(f"{bar} {n:,}" if n else ""))
        table.add_row(str(low) if high <= low else f"{low}-{high}", *cells)
    return table


def _overlap(found: Overlap) -> Text:
    level = ("leak", "red") if found.leak else ("note", "yellow")
    text = (
        f": prompts of {found.a} ({found.rows_a:,} of its rows) that {found.b} has too ({found.rows_b:,} of its rows): "
    )
    return Text.assemble(level, printable(f"{text}{found.prompts:,}; first {found.first_a}, {found.first_b}"))


# ---------------------------------------------------------------------------- rows


def print_rows(tokenizer: PreTrainedTokenizerBase, examples: Iterable[Example], label: str, console: Console) -> None:
    """Print examples as they are trained, trained tokens highlighted (in ``[[ ]]`` where there is no colour).

    Of several answers, the first and the last are shown. An example that can't be rendered is a line that says why.
    """
    for example in examples:
        try:
            _print_row(tokenizer, example, label, console)
        except (DataError, ModelError) as error:
            text = f"{_place(example)} can't be rendered with {label}: {error}"
            console.print(Text(printable(text), "red"))


def _print_row(tokenizer: PreTrainedTokenizerBase, example: Example, label: str, console: Console) -> None:
    rows = rendered(tokenizer, example)
    for i in sorted({0, len(rows) - 1}):
        answer = f"answer {i + 1} of {len(rows)}: " if len(rows) > 1 else ""
        head = f"{_place(example)}, {answer}{len(rows[i].ids)} tokens, {sum(rows[i].mask)} trained ({label})"
        _heading(head, console)
        console.print(highlighted(tokenizer, rows[i], marks=console.color_system is None))


def print_example(example: Example, console: Console) -> None:
    """Print an example as it was understood: its turns, its answers and what is said of them."""
    _heading(f"{_place(example)}: {shape(example)}", console)
    for message in example.prompt:
        _said(message, "cyan", "", console)
    for i, response in enumerate(example.responses):
        given = {"rank": response.rank, "score": response.score, "label": response.label}
        given |= {"failure": response.failure, **response.attributes}
        facts = [f"{name} {value}" for name, value in given.items() if value is not None]
        many = f" {i + 1} of {len(example.responses)}" if len(example.responses) > 1 else ""
        for message in response.messages:
            _said(message, "green", f"{many} ({', '.join(facts)})" if facts else many, console)
        for step in response.steps:
            console.print(Text(f"  step labelled {step.label}: {_shortened(printable(step.text))}"))
    for p in example.preferences:
        verdict = f"answer {p.a + 1} against {p.b + 1}: {p.better:g}"
        more = "".join(f", {what}" for what in (p.axis, p.by) if what)
        console.print(Text(printable(verdict + more)))
    target = example.target
    wanted = target and f"{target.kind} {target.answer or target.choices or target.tests or target.constraints}"
    rest = {"target": wanted, "weight": None if example.weight == 1 else example.weight}
    rest |= {"kind": example.kind, "tools": len(example.tools) or None, "other columns": ", ".join(example.meta)}
    for name, value in rest.items():
        if value:
            console.print(Text.assemble((f"{name}: ", "bold"), _shortened(printable(str(value)))))


def _place(example: Example) -> str:
    return f"{example.file} row {example.row}" if example.file else "an example"


def _heading(text: str, console: Console) -> None:
    console.print(Text(printable(text), "bold"))


def _said(message: Message, style: str, about: str, console: Console) -> None:
    """Print one turn."""
    calls = "".join(f"[calls {c.name}({dict(c.arguments)})]" for c in message.tool_calls)
    who = message.role + (f" {message.name}" if message.name else "") + about
    console.print(Text.assemble((printable(f"{who}: "), style), _shortened(printable(message.content + calls))))


def highlighted(tokenizer: PreTrainedTokenizerBase, row: Rendered, *, marks: bool) -> Text:
    """Return a rendered row as text: trained tokens and control tokens in their styles.

    Args:
        tokenizer: decodes the ids.
        row: from `checking.rendered`.
        marks: put trained stretches in ``[[ ]]``.
    """
    special = set(tokenizer.all_special_ids)
    text = Text()
    for trained, tokens in groupby(zip(row.ids, row.mask, strict=True), key=lambda pair: pair[1]):
        text.append("[[" if marks and trained else "")
        for control, group in groupby(tokens, key=lambda pair: pair[0] in special):
            said = tokenizer.decode([i for i, _ in group], skip_special_tokens=False)
            text.append(_shortened(printable(str(said))), STYLES[trained, control])
        text.append("]]" if marks and trained else "")
    return text


def _shortened(text: str) -> str:
    left_out = len(text) - 2 * _KEPT
    if left_out < 100:
        return text
    return f"{text[:_KEPT]} ... {left_out:,} characters ... {text[-_KEPT:]}"
