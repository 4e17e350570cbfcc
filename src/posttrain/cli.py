"""The ``posttrain`` command: each command is a function over public ones; a fault of usage is one line.

Exit status: 0 done, 1 disk full, out of memory, runs that differ or a failed run of a sweep, 2 bad name or value,
130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import shlex
import shutil
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import posttrain
from posttrain.arguments import convert, flag, flags, keyword_options, split, type_name
from posttrain.cli_compare import compare, gather_losses
from posttrain.cli_data import dispatch as dispatch_data
from posttrain.cli_help import overview, usage
from posttrain.cli_list import list_names
from posttrain.cli_making import generate, label, select
from posttrain.cli_merge import dispatch as dispatch_merge
from posttrain.cli_reward import evaluate_models, gather_models, score, serve
from posttrain.cli_runs import diff, gather, replay, rerun, show_finished, sweep
from posttrain.errors import ConfigError, PosttrainError, printable, suggest
from posttrain.machine import keep_freed_memory, yield_between_kernels
from posttrain.registry import METHODS, RECIPES

if TYPE_CHECKING:
    from posttrain.stages import Recipe

RUNS = Path("runs")


# ---------------------------------------------------------------------------- commands


def run(
    recipe: str,
    /,
    *,
    name: str | None = None,
    seed: int = 0,
    until: str | None = None,
    dry_run: bool = False,
    tiny: bool = False,
    resume: bool = False,
    allow_changed: bool = False,
    restart_changed: bool = False,
    **more: str | None,
) -> None:
    """Run a recipe, or go on with a run that was cut off; finished stages are skipped.

    --name NAME         name of the run, a directory under runs/ (default: the recipe's)
    --seed N            seed of every random draw (default: 0)
    --until STAGE       stop after this stage
    --dry-run           print the stages with forecasts of time and memory; compute nothing
    --tiny              run every stage at the size of the small world; values typed beside it stay
    --resume            only go on with a run: an error if there is none, or if all of it is finished
    --allow-changed     go on although settings, data or library versions changed; run.json records the difference
    --restart-changed   clear the stages whose settings changed, and what reads them, and run them again
    --STAGE.FIELD V     change a field of a stage, e.g. --sft.epochs 2; `run RECIPE --help` lists them
    """
    from rich.console import Console

    from posttrain import forecast, runner

    chosen, console = build_recipe(recipe, more), Console()
    if dry_run:
        forecast.dry_run(chosen, until=until, console=console, tiny=tiny)
        return
    from posttrain.evals.report import show_run, write_report

    again = command_line()
    directory = runner.run_recipe(
        chosen,
        root=RUNS,
        name=name,
        until=until,
        console=console,
        seed=seed,
        tiny=tiny,
        command=again,
        resume=resume,
        allow_changed=allow_changed,
        restart_changed=restart_changed,
    )
    write_report(directory)
    show_run(directory, console)


def train(
    method: str,
    /,
    *,
    name: str | None = None,
    seed: int = 0,
    lora: bool = False,
    dry_run: bool = False,
    tiny: bool = False,
    resume: bool = False,
    allow_changed: bool = False,
    restart_changed: bool = False,
    **more: str | None,
) -> None:
    """Train with one method: sft, reward, a policy-gradient algorithm or a preference loss (`posttrain list`).

    --name NAME         name of the run, a directory under runs/ (default: train-METHOD)
    --seed N            seed of every random draw (default: 0)
    --lora              train an adapter of rank 16, with --tiny too (without --tiny the default; --lora-rank N: of rank N)
    --dry-run           print a forecast of time and memory; compute nothing
    --tiny              train at the size of the small world; values typed beside it stay
    --resume, --allow-changed, --restart-changed   as for `posttrain run`
    --FIELD V           change a field of the stage, e.g. --data pairs.jsonl; `train METHOD --help` lists them
    --loss.OPTION V     set an option of the loss, e.g. --loss.beta 0.05; `train METHOD --help` lists those too
    """
    recipe = method_recipe(method)
    options = recipe_options(recipe)
    given = loss_fields(more) | ({"lora_rank": "16"} if lora and "lora_rank" not in more else {})
    fields = {key if key in options or "." in key else f"{method}.{key}": value for key, value in given.items()}
    going_on = {"resume": resume, "allow_changed": allow_changed, "restart_changed": restart_changed}
    everything: dict[str, Any] = {**going_on, **fields}
    run(recipe, name=name, seed=seed, dry_run=dry_run, tiny=tiny, **everything)


def show(run: str, /) -> None:
    """Print what a run or a sweep measured; RUN is its name or its directory."""
    directory = find_run(run, ("run.json", "sweep.json"))  # before the imports, which take seconds
    if (directory / "sweep.json").exists():
        return show_finished(directory)
    from rich.console import Console

    from posttrain.evals.report import show_run

    show_run(directory, Console())


def chat(run: str, /) -> None:
    """Talk to the model a run trained; RUN is its name or its directory."""
    directory = find_run(run)
    from rich.console import Console

    from posttrain.feedback.chat import chat as talk

    talk(directory, Console())


def doctor(*, json: bool = False) -> None:
    """Print versions, processor, measured speed, memory, disk, accelerators, and what is missing.

    --json              print it as JSON
    """
    from rich.console import Console

    from posttrain.doctor import examine, print_report

    found = examine()
    if json:
        print(dumps(found, indent=2))
    else:
        print_report(found, Console())


COMMANDS: dict[str, Callable[..., int | None]] = {
    "run": run,
    "train": train,
    "generate": generate,
    "label": label,
    "select": select,
    "show": show,
    "diff": diff,
    "replay": replay,
    "rerun": rerun,
    "sweep": sweep,
    "compare": compare,
    "chat": chat,
    "score": score,
    "serve": serve,
    "eval": evaluate_models,
    "data": dispatch_data,
    "merge": dispatch_merge,
    "doctor": doctor,
    "list": list_names,
}

Gather = Callable[[list[str]], list[str]]
GATHERED: dict[str, Gather] = {"sweep": gather, "compare": gather_losses, "eval": gather_models}
"""What joins the arguments of commands that take several values for one parameter."""


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit status (a run that was stopped raises its own, `Stopped`)."""
    yield_between_kernels()
    keep_freed_memory()
    try:
        return dispatch(sys.argv[1:] if argv is None else argv)
    except PosttrainError as error:
        print(f"posttrain: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("posttrain: stopped by Ctrl-C", file=sys.stderr)
        return 130


def dispatch(args: list[str]) -> int:
    """Find the command in the arguments, call it and return the exit status."""
    if not args or args[0] in ("-h", "--help", "help"):
        print(overview())
    elif args[0] == "--version":
        print(f"posttrain {posttrain.__version__}")
    elif args[0] in ("data", "merge"):
        return (dispatch_data if args[0] == "data" else dispatch_merge)(args[1:])
    elif args[0] not in COMMANDS:
        kind = "option" if args[0].startswith("-") else "command"
        raise ConfigError(f"unknown {kind} '{args[0]}'; {suggest(args[0], [*COMMANDS, '--help', '--version'])}")
    elif "-h" in args or "--help" in args:
        print(usage(args[0], [arg for arg in args[1:] if arg not in ("-h", "--help")]))
    else:
        return call(args[0], GATHERED.get(args[0], list)(args[1:]))
    return 0


# ---------------------------------------------------------------------------- recipes


def build_recipe(name: str, more: Mapping[str, str | None]) -> Recipe:
    """Call a recipe with its options and apply ``STAGE.FIELD`` overrides, both given as text."""
    from posttrain.graph import override, typed_fields
    from posttrain.stages import Recipe

    options = recipe_options(name)
    given = {key: value for key, value in more.items() if key in options}
    for key, option in options.items():
        if option.default is option.empty and key not in given:
            raise ConfigError(f"recipe '{name}' needs {flag(key)} {type_name(option.annotation).upper()}")
    values = {key: convert(value, options[key].annotation, key) for key, value in given.items()}
    recipe = RECIPES[name](**values)
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"'{name}' returned a {type(recipe).__name__}; a recipe is a function that returns a Recipe")
    changes: dict[str, dict[str, Any]] = {}
    for key, value in more.items():
        stage, dot, field = key.partition(".")
        if dot:
            changes.setdefault(stage, {})[field] = convert(value, field_type(recipe, stage, field), key)
        elif key not in options:
            owners = [
                other for other, item in recipe.stages.items() if key in {f.name for f in dataclasses.fields(item)}
            ]
            known = [flag(other) for other in (*options, *keyword_options(run))]
            hint = f"did you mean '--{owners[0]}.{key}'?" if owners else suggest(flag(key), known)
            raise ConfigError(f"unknown option '{flag(key)}' of recipe '{name}'; {hint}")
    recipe = dataclasses.replace(recipe, typed=typed_fields(RECIPES[name], values, recipe))
    return override(recipe, changes)


def loss_fields(more: Mapping[str, str | None]) -> dict[str, str | None]:
    """Options of ``train`` with those of the loss, ``loss.NAME``, as fields of its stage: ``beta``, and ``options``."""
    fields = {key: value for key, value in more.items() if not key.startswith("loss.")}
    loss = {key.removeprefix("loss."): value for key, value in more.items() if key.startswith("loss.")}
    if "beta" in loss:  # a field by itself
        if "beta" in fields:
            raise ConfigError("--beta and --loss.beta are the same; give one of them")
        fields["beta"] = loss.pop("beta")
    if loss:
        if "options" in fields:
            raise ConfigError("--options and --loss.OPTION set the same; give one of them")
        fields["options"] = ",".join(f"{key},{convert(value, float, f'loss.{key}')}" for key, value in loss.items())
    return fields


def method_recipe(method: str) -> str:
    """Return the import string of a method's recipe, or a preference loss's; an unknown name is an error with a suggestion."""
    if method not in METHODS and ":" not in method:
        from posttrain.losses import LOSSES

        METHODS.refuse_ambiguous(method)
        losses = [name for kind in LOSSES for name in kind]
        if method in losses:
            return f"posttrain.recipes.losses:{method}"
        near = suggest(method, [*METHODS, *losses])
        known = f"{suggest('', METHODS)}, or a preference loss (`posttrain list losses`)"
        raise ConfigError(f"unknown method '{method}'; {near if near.startswith('did') else known}")
    function = METHODS[method]
    return f"{function.__module__}:{function.__qualname__}"


def recipe_options(name: str) -> dict[str, inspect.Parameter]:
    """Return the parameters of a recipe function; each is an option."""
    if ":" in name and "" not in sys.path:
        sys.path.insert(0, "")  # module:function is looked for where the command is typed, as `python -m` does
    options = inspect.signature(RECIPES[name], eval_str=True).parameters
    for key in keyword_options(run):
        if key in options:
            raise ConfigError(f"recipe '{name}' has a parameter '{key}', an option of `posttrain run`; rename it")
    return dict(options)


def field_type(recipe: Recipe, stage: str, field: str) -> Any:
    """Return the annotation of a stage's field."""
    if stage not in recipe.stages:
        raise ConfigError(f"unknown stage '{stage}' in '--{stage}.{field}'; {suggest(stage, recipe.stages)}")
    names = [item.name for item in dataclasses.fields(recipe.stages[stage])]
    if field not in names:
        raise ConfigError(f"stage '{stage}' has no field '{field}'; {suggest(field, names)}")
    return typing.get_type_hints(type(recipe.stages[stage]))[field]


def find_run(run: str, records: Sequence[str] = ("run.json",)) -> Path:
    """Return the directory of a run, told by one of ``records``, given by its path or its name under ``runs/``."""
    for path in (Path(run), RUNS / run):
        if any((path / record).exists() for record in records):
            return path
    known = [path.parent.name for record in records for path in RUNS.glob(f"*/{record}")]
    place = f"a name under {RUNS}/ or a directory with {' or '.join(records)}"
    raise ConfigError(f"no run '{run}' ({place}); {suggest(run, known)}")


def command_line() -> str:
    """Return the command as it was typed, so that repeating it continues the run."""
    program = sys.argv[0]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return shlex.join(["torchrun", "--nproc-per-node", os.environ["WORLD_SIZE"], "-m", "posttrain", *sys.argv[1:]])
    if Path(program).name != "posttrain":
        return shlex.join(["python", "-m", "posttrain.cli", *sys.argv[1:]])
    found = shutil.which("posttrain")
    same = found is not None and Path(found).resolve() == Path(program).resolve()
    return shlex.join(["posttrain" if same else program, *sys.argv[1:]])


# ---------------------------------------------------------------------------- arguments


def call(command: str, args: list[str]) -> int:
    """Call a command: its positional arguments, its options, and others if it takes any; return the exit status."""
    function = COMMANDS[command]
    parameters = inspect.signature(function, eval_str=True).parameters
    wanted = [key for key, item in parameters.items() if item.kind is item.POSITIONAL_ONLY]
    options = keyword_options(function)
    positional, given = split(args, flags(function))
    needed = [key for key in wanted if parameters[key].default is inspect.Parameter.empty]
    open_ended = any(item.kind is item.VAR_KEYWORD for item in parameters.values())
    unknown = [key for key in given if key not in options]
    if unknown and (len(positional) < len(needed) or not open_ended):
        hint = suggest(flag(unknown[0]), map(flag, options))
        raise ConfigError(f"unknown option '{flag(unknown[0])}' of `posttrain {command}`; {hint}")
    if len(positional) < len(needed):
        missing = needed[len(positional)]
        named = {"recipe": RECIPES, "method": METHODS}.get(missing)
        known = f"; {suggest('', named)}" if named else ""
        line = " ".join(["posttrain", command, *(key.upper().replace("_", "-") for key in needed)])
        raise ConfigError(f"`posttrain {command}` needs a {missing.replace('_', ' ')}: {line}{known}")
    if len(positional) > len(wanted):
        raise ConfigError(
            f"unexpected '{positional[len(wanted)]}'; options start with --, see posttrain {command} --help"
        )
    typed = {key: convert(given[key], options[key].annotation, key) for key in given if key in options}
    return function(*positional, **typed, **{key: given[key] for key in unknown}) or 0


if __name__ == "__main__":
    sys.exit(main())
