"""``posttrain data``: check, convert, split, mix, show and export files of feedback; each calls public functions."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from posttrain.arguments import convert as read_text
from posttrain.arguments import flag, flags, keyword_options
from posttrain.arguments import split as split_arguments
from posttrain.errors import ConfigError, printable, suggest

if TYPE_CHECKING:
    from posttrain.data.load import ReadReport
    from posttrain.types import Example

SHOWN = 3  # up to so many sources, a check shows two rows of each


# ---------------------------------------------------------------------------- commands


def check(
    *files: str, format: str | None = None, map: str = "", skip_bad: int = 0, model: str = "", out: str = ""
) -> int:
    """Say what is wrong in files: faulty rows, duplicates, contradictions, lengths, shared prompts.

    Exit status: 0 clean, 1 faults found, 2 a file that isn't there or can't be recognised.

    FILE...             files, directories of shards, names of data sets; "default" is the shipped data
    --format NAME       how to read the rows, if their columns don't tell
    --map THEIRS=OURS   columns under other names, e.g. question=prompt,reply=completion
    --skip-bad N        let up to N faulty rows in a file pass, as training would with that setting (default: 0)
    --model NAME        whose tokens and chat template to show; given, lengths are counted in its tokens too
    --out REPORT        where the report goes, as JSON (default: FILE.check.json beside each file)
    """
    from rich.console import Console

    from posttrain.data.checking import check as check_sources
    from posttrain.data.load import ReadReport
    from posttrain.data.show import print_file, print_rows, print_together
    from posttrain.models.load import find_model, load_tokenizer

    console, options = Console(), {"format": format, "columns": column_map(map)}
    found = find_model(model or "small")
    tokenizer = load_tokenizer(found.path)
    named = {file: sources_of(file) for file in files}
    sources = [source for several in named.values() for source in several]
    with console.status("reading"):
        counted = tokenizer if model else None
        report = check_sources(sources, **options, skip_bad=skip_bad, tokenizer=counted)
    for source, file in zip(sources, report.files, strict=True):
        print_file(file, console)
        if len(sources) <= SHOWN and file.examples:
            print_rows(tokenizer, first_rows(source, 2, ReadReport(), **options), found.label, console)
    if len(sources) > 1:
        print_together(report, console)
    reports = {out: report} if out else {report_path(file): report.about(several) for file, several in named.items()}
    for place, part in reports.items():
        write_whole(Path(place), part.json())
        console.print(f"report: {printable(str(place))}", markup=False, highlight=False, soft_wrap=True)
    return 0 if report.clean else 1


def head(file: str, /, *, n: int = 5, format: str | None = None, map: str = "", model: str = "") -> None:
    """Print the first examples of a file, as they were understood.

    -n N                how many (default: 5)
    --format NAME       how to read the rows, if their columns don't tell
    --map THEIRS=OURS   columns under other names
    --model NAME        print them as this model would be trained on them, trained tokens highlighted
    """
    from rich.console import Console

    from posttrain.data.load import ReadReport
    from posttrain.data.show import print_example, print_rows

    console, read = Console(), ReadReport()
    examples = first_rows(file, n, read, format=format, columns=column_map(map))
    if model:
        from posttrain.models.load import find_model, load_tokenizer

        found = find_model(model)
        print_rows(load_tokenizer(found.path), examples, found.label, console)
    for example in () if model else examples:
        print_example(example, console)
    say("", read)


def convert(file: str, output: str, /, *, format: str | None = None, map: str = "", skip_bad: int = 0) -> None:
    """Write a file's examples in the one form that keeps everything: OUTPUT.jsonl.

    --format NAME       how to read the rows, if their columns don't tell
    --map THEIRS=OURS   columns under other names
    --skip-bad N        leave out up to N faulty rows, counted (default: 0)
    """
    from posttrain.data.load import ReadReport, stream
    from posttrain.data.write import write_jsonl

    read, columns = ReadReport(), column_map(map)
    write_jsonl(fresh(output, file), stream(file, format=format, columns=columns, skip_bad=skip_bad, report=read))
    say(f"{output}: {read.examples:,} examples", read)


def split(
    file: str,
    /,
    *,
    shares: str = "train=0.9,test=0.1",
    out: str = ".",
    by: Literal["prompt", "opening"] = "prompt",
    seed: int = 0,
    format: str | None = None,
    map: str = "",
    skip_bad: int = 0,
) -> None:
    """Split a file so that a prompt and its duplicates (case, white space, Unicode form) stay on one side.

    --shares NAME=P,... name and share of each side; they add up to 1 (default: train=0.9,test=0.1)
    --out DIR           where NAME.jsonl go (default: here)
    --by opening        keep together all conversations with the same first user turn (default: prompt)
    --seed N            another seed is another split (default: 0)
    --format NAME       how to read the rows, if their columns don't tell
    --map THEIRS=OURS   columns under other names
    --skip-bad N        leave out up to N faulty rows, counted (default: 0)
    """
    from posttrain.data.load import ReadReport, stream
    from posttrain.data.mixing import SplitReport, normal_opening, normal_prompt, sides
    from posttrain.data.write import write_jsonl

    wanted, columns = numbers(shares, "shares"), column_map(map)
    key = normal_opening if by == "opening" else normal_prompt
    places = {name: fresh(Path(out) / f"{name}.jsonl", file) for name in wanted}
    read, parted = ReadReport(), SplitReport()
    for name, place in places.items():  # a pass a side, so that no side is held in memory
        read, parted = ReadReport(), SplitReport()
        rows = stream(file, format=format, columns=columns, skip_bad=skip_bad, report=read)
        named = sides(rows, wanted, seed=seed, key=key, report=parted)
        place.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(place, (example for side, example in named if side == name))
    total = max(parted.rows.total(), 1)
    for name, place in places.items():
        count = parted.rows[name]
        say(f"{place}: {count:,} examples, {count / total:.2%} of them ({wanted[name]:.2%} asked for)")
    say("", read)


def mix(
    *parts: str,
    out: str = "",
    total: int | None = None,
    temperature: float | None = None,
    when_out: Literal["stop", "repeat"] = "stop",
    seed: int = 0,
    skip_bad: int = 0,
) -> None:
    """Mix files by weight: posttrain data mix A.jsonl=2 B.jsonl=1 --out MIXED.jsonl.

    After every 64 examples each file has given its exact share; `origin` in each row says where it came from.

    FILE[=WEIGHT]...    files with their weights (default: 1)
    --out OUTPUT        the .jsonl file to write
    --total N           examples at most
    --temperature T     weights from the files' sizes instead: size^(1/T); 1 = by size, larger = more even
    --when-out repeat   start a file again that has run out, until each has been gone through (default: stop)
    --seed N            order within blocks of 64 (default: 0)
    --skip-bad N        leave out up to N faulty rows of each file (default: 0)
    """
    from posttrain.data.load import ReadReport, stream
    from posttrain.data.mixing import MixReport, Part, size_weights
    from posttrain.data.mixing import mix as mixed
    from posttrain.data.write import write_jsonl

    if not out:
        raise ConfigError("`posttrain data mix` needs --out OUTPUT.jsonl")
    weights = weighted(parts)
    if temperature is not None:
        if any(part not in weights for part in parts):
            raise ConfigError("--temperature takes the weights from the files' sizes; give the files without =WEIGHT")
        sizes = {file: sum(1 for _ in stream(file, skip_bad=skip_bad, report=ReadReport())) for file in weights}
        weights = size_weights(sizes, temperature)

    reads: dict[str, ReadReport] = {}  # of the first pass over each file

    def reader(file: str) -> Callable[[], Any]:
        def start() -> Any:
            read = ReadReport()
            reads.setdefault(file, read)
            return stream(file, skip_bad=skip_bad, report=read)

        return start

    report = MixReport()
    chosen = [Part(name=file, open=reader(file), weight=weight) for file, weight in weights.items()]
    rows = mixed(chosen, seed=seed, when_out=when_out, total=total, report=report)
    write_jsonl(fresh(out, *weights), rows)
    say(f"{out}: {report.rows.total():,} examples; {report.ended_by}")
    for file, rate in report.rates.items():
        passes = report.passes[file]
        again = f", gone through {passes} times" if passes > 1 else ", gone through once" if passes else ""
        say(f"  {file}: {report.rows[file]:,} examples at rate {rate:.3f}{again}")
        say("", reads[file])


def export(
    file: str,
    output: str,
    /,
    *,
    columns: Literal["prompt", "prompt-completion", "messages", "preference", "unpaired"] | None = None,
    format: str | None = None,
    map: str = "",
    skip_bad: int = 0,
) -> None:
    """Write the columns that TRL reads to OUTPUT.jsonl or OUTPUT.parquet; what they can't say is refused.

    --columns NAME      prompt, prompt-completion, messages, preference or unpaired (default: what fits the rows)
    --format NAME       how to read the rows, if their columns don't tell
    --map THEIRS=OURS   columns under other names
    --skip-bad N        leave out up to N faulty rows, counted (default: 0)
    """
    from posttrain.data.exporting import export as export_examples
    from posttrain.data.load import ReadReport, stream

    read = ReadReport()
    rows = stream(file, format=format, columns=column_map(map), skip_bad=skip_bad, report=read)
    count = export_examples(rows, fresh(output, file), columns)
    say(f"{output}: {count:,} rows", read)


COMMANDS: dict[str, Callable[..., int | None]] = {
    "check": check,
    "head": head,
    "convert": convert,
    "split": split,
    "mix": mix,
    "export": export,
}


# ---------------------------------------------------------------------------- rows


def first_rows(file: str, count: int, read: ReadReport, **options: Any) -> list[Example]:
    """Return the first examples of a file; faulty rows are left out and counted in ``read``."""
    from posttrain.data.load import stream

    if count < 1:
        raise ConfigError(f"-n {count}: expected at least 1")
    return list(islice(stream(file, **options, skip_bad=sys.maxsize, report=read), count))


def say(text: str, read: ReadReport | None = None) -> None:
    """Print a line of outcome, and how many rows were left out."""
    if text:
        print(printable(text))
    if read is None:
        return
    if read.faulty:
        print(f"faulty rows left out: {read.faulty:,}; `posttrain data check` says which")
    for reason, count in read.useless.most_common():
        print(f"rows that teach nothing left out: {count:,}, {printable(reason)}")


# ---------------------------------------------------------------------------- files and values


def sources_of(file: str) -> list[str]:
    """Return what an argument names: the parts of ``default`` or of a directory, or itself."""
    from posttrain.data.load import resolve_data

    return [str(p) for p in resolve_data(file).values()] if file == "default" or Path(file).is_dir() else [file]


def report_path(file: str) -> Path:
    """Return where the report on a source goes: beside it, or here if it is the name of a data set."""
    return Path((file.rstrip("/") if Path(file).exists() else re.sub(r"\W+", "_", file)) + ".check.json")


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears only when it is complete."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise ConfigError(f"can't write '{path}' ({error.strerror}); name another place with --out") from error


def fresh(output: str | Path, *inputs: str) -> Path:
    """Return the path to write, unless that is one of the files to read."""
    path = Path(output)
    if any(path.exists() and Path(file).exists() and path.samefile(file) for file in inputs):
        raise ConfigError(f"'{path}' is read and would be overwritten; name another file")
    return path


def column_map(text: str) -> dict[str, str] | None:
    """Read ``THEIRS=OURS,...`` as our names to theirs; None if empty."""
    found: dict[str, str] = {}
    for pair in text.split(",") if text else []:
        theirs, _, ours = pair.partition("=")
        if not (theirs and ours) or ours in found:
            raise ConfigError(f"--map: got '{text}', expected THEIRS=OURS,... such as question=prompt")
        found[ours] = theirs
    return found or None


def numbers(text: str, option: str) -> dict[str, float]:
    """Read ``NAME=NUMBER,...``."""
    found: dict[str, float] = {}
    for pair in text.split(","):
        name, equals, value = pair.partition("=")
        if not (equals and name.isidentifier()) or name in found:
            raise ConfigError(f"--{option}: got '{text}', expected NAME=NUMBER,... such as train=0.9,test=0.1")
        found[name] = read_text(value, float, option)
    return found


def weighted(parts: Sequence[str]) -> Mapping[str, float]:
    """Read ``FILE[=WEIGHT]`` arguments; what follows the last = is a weight only if the whole is no file."""
    found: dict[str, float] = {}
    for part in parts:
        file, weight = part, 1.0
        if "=" in part and not Path(part).exists():
            file, _, value = part.rpartition("=")
            try:
                weight = float(value)
            except ValueError as error:
                raise ConfigError(f"got '{part}', expected FILE or FILE=WEIGHT; '{value}' is no number") from error
        if file in found:
            raise ConfigError(f"'{file}' is given twice; give it once, with a larger weight")
        found[file] = weight
    return found


# ---------------------------------------------------------------------------- arguments


def dispatch(args: list[str]) -> int:
    """Check, convert, split, mix, show and export files of feedback; see `posttrain data --help`."""
    args = ["--n" if arg == "-n" else arg for arg in args]
    if not args or args[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if args[0] not in COMMANDS:
        raise ConfigError(f"unknown command 'data {args[0]}'; {suggest(args[0], COMMANDS)}")
    if "-h" in args or "--help" in args:
        print(usage(args[0]))
        return 0
    return call(args[0], args[1:])


def call(command: str, args: list[str]) -> int:
    """Call a command with its arguments as text and return the exit status."""
    function = COMMANDS[command]
    options, names = keyword_options(function), positional(function)
    given, typed = split_arguments(args, flags(function))
    if unknown := next((key for key in typed if key not in options), None):
        hint = suggest(flag(unknown), map(flag, options))
        raise ConfigError(f"unknown option '{flag(unknown)}' of `posttrain data {command}`; {hint}")
    if len(given) < len(names):
        typical = " ".join(["posttrain data", command, *names])
        raise ConfigError(f"`posttrain data {command}` needs {names[len(given)]}: {typical}")
    if len(given) > len(names) and not names[-1].endswith("..."):
        raise ConfigError(
            f"unexpected '{given[len(names)]}'; options start with --, see posttrain data {command} --help"
        )
    values = {key: read_text(value, options[key].annotation, key) for key, value in typed.items()}
    return function(*given, **values) or 0


def positional(function: Callable[..., Any]) -> list[str]:
    """Return the names of a command's arguments in capitals; one that may be repeated ends in dots."""
    kept = {inspect.Parameter.POSITIONAL_ONLY: "", inspect.Parameter.VAR_POSITIONAL: "..."}
    items = inspect.signature(function).parameters.values()
    return [item.name.upper() + kept[item.kind] for item in items if item.kind in kept]


def overview() -> str:
    """Return the help of ``posttrain data``."""
    lines = [f"  {name:<8} {(inspect.getdoc(item) or '').partition(chr(10))[0]}" for name, item in COMMANDS.items()]
    return "\n".join(
        ["usage: posttrain data COMMAND [ARGUMENTS] [--help]", "", "Look after files of feedback.", "", *lines]
    )


def usage(command: str) -> str:
    """Return the help of one command."""
    function = COMMANDS[command]
    first = " ".join(["usage: posttrain data", command, *positional(function), "[OPTIONS]"])
    return f"{first}\n\n{inspect.getdoc(function) or ''}"
