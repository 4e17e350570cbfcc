"""``posttrain merge``: several models into one plain model directory."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.arguments import convert, flag, split
from posttrain.errors import ConfigError, suggest

if TYPE_CHECKING:
    from posttrain.evals.grids import Grid

LINE = "posttrain merge METHOD MODEL MODEL ... --out DIR"
OWN = {"weights": tuple[float, ...], "base": str, "out": str}


def dispatch(args: list[str]) -> int:
    """Merge models or adapters into one model directory that transformers loads.

    METHOD              average, ema, slerp, warp, ties or dare; what each does: docs/methods/merging.md
    MODEL ...           names or directories, of models or of adapters, which are added to their bases first
    --out DIR           where the model goes, with merge.json, which says what went in; must not hold a model
    --weights W,W,...   one a model, of sum 1 (default: equal ones)
    --base MODEL        what all models started from; slerp, warp, ties and dare need it
    --OPTION V          an option of the method: --rate (ema), --eta (warp), --density (ties), --drop and --seed (dare),
                        --scale (ties, dare)

    Before anything is kept, the merge is loaded by transformers and compared with the one in memory on 16 prompts, and
    each model as it was read with the model as transformers loads it.
    """
    if "-h" in args or "--help" in args:
        print("\n".join([f"usage: {LINE} [OPTIONS]", "", inspect.getdoc(dispatch) or ""]))
        return 0
    names, given = split(args, set())
    if len(names) < 2:
        raise ConfigError(f"`posttrain merge` needs a method and the models: {LINE}")
    if "out" not in given:
        raise ConfigError(f"`posttrain merge` needs --out DIR: {LINE}")
    typed: dict[str, Any] = {key: convert(given[key], kind, key) for key, kind in OWN.items() if key in given}

    from posttrain.models.merge import merges
    from posttrain.registry import keyword_defaults

    method = names[0]
    known = keyword_defaults(merges[method])
    for key in given:
        if key not in OWN and key not in known:
            hint = suggest(flag(key), map(flag, [*OWN, *known]))
            raise ConfigError(f"unknown option '{flag(key)}' of `posttrain merge {method}`; {hint}")
    options = {key: convert(given[key], type(known[key]), key) for key in given if key in known}
    print_merge(method, names[1:], typed, options)
    return 0


def print_merge(method: str, models: Sequence[str], typed: Mapping[str, Any], options: Mapping[str, float]) -> None:
    """Merge, and print the table of what went in."""
    from rich.console import Console

    from posttrain.evals.tables import rich_grid
    from posttrain.work.merge import merge_named

    console, out = Console(), Path(typed["out"])
    with console.status("merging"):
        record = merge_named(method, models, out, base=typed.get("base"), weights=typed.get("weights"), options=options)
    console.print(rich_grid(merge_grid(record, out)))


def merge_grid(record: Mapping[str, Any], out: Path) -> Grid:
    """The table of a ``merge.json``: what went in with which weight, and how closely the result was checked."""
    from posttrain.evals.grids import Grid

    def row(part: Mapping[str, Any], weight: str) -> tuple[str, ...]:
        what = "adapter" if "adapter_on" in part else "model"
        error = f"{part['parity']:.0e}" if "parity" in part else "–"
        return part["path"], what, weight, ", ".join(part["dtypes"]), error, part["sha256"][:12]

    rows = [
        row(part, f"{part['weight']:g}" if "weight" in part else f"{k}.") for k, part in enumerate(record["parts"], 1)
    ]
    rows += [row(record["base"], "base")] if record["base"] else []
    options = "".join(f", {key} {value:g}" for key, value in record["options"].items())
    parity = record["parity"]
    return Grid(
        title=f"Merged by {record['method']}{options} into {out}",
        header=("model", "what", "weight", "dtype", "read to\n(nats)", "sha256"),
        rows=tuple(rows),
        left=(0, 1),
        notes=(
            f"{record['tensors']} tensors, {', '.join(record['dtypes'])}; loaded by transformers, log-probabilities (or scores) of "
            f"{parity['prompts']} prompts are those of the merge in memory to {parity['largest']:.0e} (limit {parity['tolerance']:g})",
        ),
    )
