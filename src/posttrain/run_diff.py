"""What differs between two runs: what was asked, the data, the circumstances, the first step that diverged, the results."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.text import Text

from posttrain.evals.grids import Grid
from posttrain.evals.run_view import RunView, read_run
from posttrain.evals.tables import rich_grid
from posttrain.graph import content_hash
from posttrain.run_numbers import headlines, numbers, wall_clock, without_times

ABSENT = "–"


class Difference(NamedTuple):
    """One thing that is not the same in both runs, and what it is in each."""

    what: str
    first: str
    second: str


class Divergence(NamedTuple):
    """The first step whose metrics differ: the first such metric with both values, and how many more differ there."""

    step: int
    metric: str
    first: str
    second: str
    more: int = 0


@dataclass(frozen=True, kw_only=True)
class StageDiff:
    """How one stage went in both runs.

    ``steps`` that both logged; ``diverged`` None = equal to the bit over them; ``files`` that differ, of all
    ``compared`` (weights and samples); ``finished`` in each run; ``results`` whether its results agree, None without any.
    """

    stage: str
    steps: int
    diverged: Divergence | None
    files: tuple[str, ...]
    compared: int
    finished: tuple[bool, bool]
    results: bool | None = None

    @property
    def equal(self) -> bool:
        """Whether everything measured agrees, as far as both runs went."""
        whole = self.finished[0] == self.finished[1]
        return whole and self.diverged is None and not self.files and self.results is not False


@dataclass(frozen=True, kw_only=True)
class RunDiff:
    """Two runs compared; ``circumstances`` are what should change nothing but may: versions, code, machine."""

    names: tuple[str, str]
    asked: list[Difference] = field(default_factory=list)
    data: list[Difference] = field(default_factory=list)
    circumstances: list[Difference] = field(default_factory=list)
    stages: list[StageDiff] = field(default_factory=list)
    results: list[tuple[str, float | None, float | None]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Whether the same was asked of the same data, with the same outcome to the bit."""
        return not self.asked and not self.data and all(stage.equal for stage in self.stages)


def compare_runs(first: Path, second: Path) -> RunDiff:
    """Compare two run directories, finished or not.

    Raises:
        ConfigError: a directory is not a run.
        DataError: a file in one is not what it should be.
    """
    a, b = read_run(Path(first)), read_run(Path(second))
    stages = list(dict.fromkeys([*a.stages, *b.stages]))
    both = [name for name in stages if name in a.stages and name in b.stages]
    found = [headlines(numbers(view)) for view in (a, b)]
    if any(view.results for view in (a, b)):  # where training ended is in the stages' rows
        found = [{name: value for name, value in side.items() if ":" not in name} for side in found]
    return RunDiff(
        names=_names(a, b),
        asked=asked_differences(a.run, b.run),
        data=data_differences(a.run, b.run),
        circumstances=circumstance_differences(a.run, b.run),
        stages=[compare_stage(a, b, name) for name in both],
        results=[(name, found[0].get(name), found[1].get(name)) for name in dict.fromkeys([*found[0], *found[1]])],
        notes=[*_attempt_notes(a), *_attempt_notes(b)],
    )


# ---------------------------------------------------------------------------- what was asked, of what, where


def asked_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Difference]:
    """Compare two ``run.json``: recipe, seed, size, stages, and each stage's configuration as it ran."""
    left, right = _asked(a), _asked(b)
    for side, other in ((left, right), (right, left)):
        for name in set(other) - set(side):  # one line for a stage that only one run has, not one a field
            other[name] = other[name]["class"] if isinstance(other[name], Mapping) else other[name]
    return _differing(_flat(left), _flat(right))


def data_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Difference]:
    """Compare the data files and weights that stages read: name and contents, wherever they lie."""
    return _differing(_files(a), _files(b))


def circumstance_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Difference]:
    """Compare versions, code (file by file), hardware, environment variables and commits of two ``run.json``."""
    return _differing(_flat(_circumstances(a)), _flat(_circumstances(b)))


def _circumstances(run: Mapping[str, Any]) -> dict[str, Any]:
    hardware = dict(run.get("hardware") or {})
    if hardware.get("memory"):  # a restart changes it by a few bytes
        hardware["memory"] = f"{hardware['memory']:.1f} GiB"
    files = (run.get("code") or {}).get("files")
    rest = {key: run.get(key) for key in ("environment", "git")}
    return {"versions": run.get("versions"), "code": files, "hardware": hardware, **rest}


def _asked(run: Mapping[str, Any]) -> dict[str, Any]:
    stages = {
        name: {**stage.get("resolved", stage.get("config", {})), "class": stage.get("class"), **stage.get("inputs", {})}
        for name, stage in run.get("stages", {}).items()
    }
    return {key: run.get(key) for key in ("recipe", "seed", "tiny")} | stages


def _files(run: Mapping[str, Any]) -> dict[str, str]:
    """Map stage and file to contents; two files of one name in a stage are told apart by their number."""
    found: dict[str, str] = {}
    for stage, record in run.get("stages", {}).items():
        for entry in record.get("files", []):
            name = f"{stage} {Path(entry['path']).name}"
            while name in found:
                name += "'"
            found[name] = f"{entry['hash']}, {entry['bytes']:,} bytes"
    return found


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Difference]:
    """List the keys whose values differ, in order; a key that one side lacks has a dash there."""
    keys = [key for key in dict.fromkeys([*a, *b]) if repr(a.get(key)) != repr(b.get(key)) or (key in a) != (key in b)]
    return [Difference(key, *(_shown(side[key]) if key in side else ABSENT for side in (a, b))) for key in keys]


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Flatten nested mappings to ``a.b.c``: value; lists stay whole."""
    if not isinstance(value, Mapping):
        return {} if path and value is None and "." not in path else {path: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= _flat(item, f"{path}.{key}".removeprefix("."))
    return found


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _names(a: RunView, b: RunView) -> tuple[str, str]:
    """Return the runs' names, or their directories where the names are the same."""
    names = (a.directory.name, b.directory.name)
    return names if names[0] != names[1] else (str(a.directory), str(b.directory))


def _attempt_notes(view: RunView) -> list[str]:
    """Say where attempts that computed something ran under different circumstances."""
    attempts = [one for one in view.run.get("attempts", []) if set(one["stages"].values()) - {"skip"}]
    notes = []
    for number, (before, after) in enumerate(pairwise(attempts), 2):
        keys = ("versions", "code", "hardware", "environment")
        changed = _differing(*(_flat({key: one.get(key) for key in keys}) for one in (before, after)))
        changes = ", ".join(f"{name} {first} then {second}" for name, first, second in changed)
        if changes:
            notes.append(
                f"{view.directory.name}: attempt {number} of {len(attempts)} ran under other circumstances: {changes}"
            )
    return notes


# ---------------------------------------------------------------------------- how it went


def compare_stage(a: RunView, b: RunView, name: str) -> StageDiff:
    """Compare a stage's metrics step by step, then weights, samples and results by their bytes."""
    left, right = a.stages[name], b.stages[name]
    steps, diverged = first_divergence(left.metrics, right.metrics)
    paths = [dict(_compared(view.directory / name)) for view in (a, b)]
    shared = [file for file in paths[0] if file in paths[1]]
    differing = [file for file in shared if content_hash(paths[0][file]) != content_hash(paths[1][file])]
    differing += sorted(set(paths[0]) ^ set(paths[1]))
    results = [_results(view.directory / name / "results.json") for view in (a, b)]
    return StageDiff(
        stage=name,
        steps=steps,
        diverged=diverged,
        files=tuple(differing),
        compared=len(set(paths[0]) | set(paths[1])),
        finished=(left.seconds is not None, right.seconds is not None),
        results=None if results == [None, None] else results[0] == results[1],
    )


def first_divergence(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> tuple[int, Divergence | None]:
    """Return how many steps both logged, and the first at which a metric that measures no time differs.

    A log that merely ends earlier does not diverge: its run was cut off, or asked for fewer steps.
    """
    left, right = ({row["step"]: row for row in rows} for rows in (a, b))
    steps = sorted(set(left) & set(right))
    for step in steps:
        keys = [key for key in dict.fromkeys([*left[step], *right[step]]) if key != "step" and not wall_clock(key)]
        found = _differing(
            {k: left[step][k] for k in keys if k in left[step]}, {k: right[step][k] for k in keys if k in right[step]}
        )
        if found:
            return len(steps), Divergence(step, *found[0], more=len(found) - 1)
    return len(steps), None


def _compared(stage: Path) -> Iterator[tuple[str, Path]]:
    """List the weights and samples a stage left, checkpoints aside."""
    for path in sorted(stage.rglob("*")):
        relative = path.relative_to(stage)
        kept = path.suffix == ".safetensors" or relative.name == "samples.jsonl"
        if kept and relative.parts[0] != "checkpoints" and path.is_file():
            yield str(relative), path


def _results(path: Path) -> str | None:
    return json.dumps(without_times(json.loads(path.read_text(encoding="utf-8")))) if path.is_file() else None


# ---------------------------------------------------------------------------- on the terminal


def print_diff(diff: RunDiff, console: Console) -> None:
    """Print the differences, part by part; the last line says whether the runs are equal."""
    parts = {"Asked": diff.asked, "Data and weights read": diff.data, "Circumstances": diff.circumstances}
    for title, differences in parts.items():
        if differences:
            console.print(rich_grid(difference_table(title, differences, diff.names)))
        else:
            console.print(Text(f"{title}: the same", style="dim"))
    for note in diff.notes:
        console.print(Text(note, style="dim"))
    if diff.notes or not diff.circumstances:  # a table ends with an empty line of its own
        console.print()
    if diff.stages:
        console.print(rich_grid(stage_table(diff)))
    if any(first != second for _, first, second in diff.results):
        console.print(rich_grid(result_table(diff)))
    elif diff.results:
        console.print(Text(f"Results: {_count(len(diff.results), 'number')}, all equal", style="dim"))
    console.print(Text(verdict(diff), style="bold"), soft_wrap=True)  # whole, for scripts


def verdict(diff: RunDiff) -> str:
    """Return the closing line."""
    if diff.equal:
        begun = [stage for stage in diff.stages if any(stage.finished) or stage.steps]
        steps = _count(sum(stage.steps for stage in begun), "step")
        line = f"equal to the bit: configuration, data and {steps} of {_count(len(begun), 'stage')}"
        if not all(all(stage.finished) for stage in begun):
            line += ", as far as both went"
        other = len(diff.circumstances)
        return f"{line}; {_count(other, 'circumstance')} differ{'s' * (other == 1)}" if other else line
    parts = []
    if diff.asked:
        parts.append(_count(len(diff.asked), "setting"))
    if diff.data:
        parts.append(_count(len(diff.data), "file") + " read")
    outcome = [stage.stage for stage in diff.stages if not stage.equal]
    if outcome:
        parts.append(f"the outcome of {', '.join(outcome)}")
    return f"the runs differ: {'; '.join(parts)}"


def difference_table(title: str, differences: Sequence[Difference], names: tuple[str, str]) -> Grid:
    """Lay differences out, the two runs side by side."""
    rows = tuple((item.what, item.first, item.second) for item in differences)
    return Grid(title=title, header=("", *names), rows=rows, left=(0, 1, 2))


def stage_table(diff: RunDiff) -> Grid:
    """Lay out, a row a stage, where metrics diverge and whether weights, samples and results agree."""
    rows = tuple((stage.stage, _metrics_cell(stage, diff.names), _files_cell(stage)) for stage in diff.stages)
    notes = ("metrics that measure time or memory are left out",)
    return Grid(title="Stages", header=("stage", "metrics", "outputs"), rows=rows, left=(0, 1, 2), notes=notes)


def result_table(diff: RunDiff) -> Grid:
    """Lay the closing numbers that differ side by side."""
    rows = []
    for name, first, second in diff.results:
        if first != second:
            change = ABSENT if first is None or second is None else f"{second - first:+.4g}"
            rows.append((name, *(ABSENT if value is None else f"{value:.6g}" for value in (first, second)), change))
    training = any(":" in name for name, _, _ in diff.results)
    title = "Values at the last step" if training else "Results"
    notes = (f"{len(diff.results) - len(rows)} others are equal",) if len(rows) < len(diff.results) else ()
    return Grid(title=title, header=("number", *diff.names, "change"), rows=tuple(rows), left=(0,), notes=notes)


def _metrics_cell(stage: StageDiff, names: tuple[str, str]) -> str:
    """Write where a stage's metrics part, or over how many steps they are one."""
    lines = []
    if stage.diverged is not None:
        at = stage.diverged
        more = f" (and {at.more} more)" if at.more else ""
        lines.append(f"differ first at step {at.step}: {at.metric}{more}")
        lines += [f"{value} in {name}" for value, name in zip((at.first, at.second), names, strict=True)]
    elif stage.steps:
        lines.append(f"equal to the bit over {_count(stage.steps, 'step')}")
    lines += [f"not finished in {name}" for name, done in zip(names, stage.finished, strict=True) if not done]
    return "\n".join(lines) or ABSENT


def _files_cell(stage: StageDiff) -> str:
    """Write which weights, samples or results differ."""
    lines = [f"{name} differs" for name in stage.files]
    if stage.results is False:
        lines.append("results differ")
    if not lines and (stage.compared or stage.results):
        lines.append("equal")
    return "\n".join(lines) or ABSENT


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
