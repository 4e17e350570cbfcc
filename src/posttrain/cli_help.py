"""Help of ``posttrain``: of the command, of each of its commands, of recipes, methods and losses."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING

import posttrain
from posttrain.arguments import flag, flags, split, type_name

if TYPE_CHECKING:
    from posttrain.stages import Stage


def overview() -> str:
    """Return the help of the whole command."""
    from posttrain.cli import COMMANDS

    lines = [f"  {name:<8} {(inspect.getdoc(item) or '').partition(chr(10))[0]}" for name, item in COMMANDS.items()]
    about = (posttrain.__doc__ or "").partition("\n")[0]
    return "\n".join(["usage: posttrain COMMAND [ARGUMENTS] [--help] [--version]", "", about, "", *lines])


def usage(command: str, args: list[str]) -> str:
    """Return the help of one command; of ``run RECIPE`` and ``train METHOD`` also the options and the stages' fields."""
    from posttrain.cli import COMMANDS, build_recipe, method_recipe, recipe_options

    function = COMMANDS[command]
    positional, _ = split(args, flags(function))
    parameters = inspect.signature(function).parameters
    wanted = {key.upper().replace("_", "-"): p for key, p in parameters.items() if p.kind is p.POSITIONAL_ONLY}
    names = [name if p.default is p.empty else f"[{name}]" for name, p in wanted.items()]
    lines = [" ".join(["usage: posttrain", command, *names, "[OPTIONS]"]), "", inspect.getdoc(function) or ""]
    if command in ("run", "train", "sweep") and positional:
        recipe = method_recipe(positional[0]) if command == "train" else positional[0]
        options = recipe_options(recipe)
        lines += ["", f"options of {positional[0]}:"] if options else []
        lines += [f"  {flag(key)} {type_name(item.annotation)} ({_default(item)})" for key, item in options.items()]
        needed = {key: "..." for key, item in options.items() if item.default is item.empty}
        stages = build_recipe(recipe, needed).stages
        lines += [line for name in stages for line in stage_usage(name, stages, short=command == "train")]
        if command == "train":
            lines += [line for stage in stages.values() for line in loss_usage(stage)]
    return "\n".join(lines)


def _default(option: inspect.Parameter) -> str:
    return "needed" if option.default is option.empty else f"now {option.default!r}"


def stage_usage(name: str, stages: Mapping[str, Stage], *, short: bool = False) -> list[str]:
    """Return the lines of help on one stage: its inputs, and an option for each other field, ``short`` without the stage's name."""
    from posttrain.graph import stage_inputs

    stage = stages[name]
    names = {id(other): key for key, other in stages.items()}
    inputs = {field: names[id(other)] for field, other in stage_inputs(stage).items()}
    reads = ", ".join(f"{field}={other}" for field, other in inputs.items())
    hints, taken = typing.get_type_hints(type(stage)), {field.partition(".")[0] for field in inputs}
    lines = ["", f"stage {name} ({type(stage).__name__}{', reads ' + reads if reads else ''}):"]
    for field in dataclasses.fields(stage):
        if field.name not in taken:
            now = getattr(stage, field.name)
            option = flag(field.name) if short else f"--{name}.{field.name}"
            lines.append(f"  {option} {type_name(hints[field.name])} (now {now!r})")
    return lines


def loss_usage(stage: Stage) -> list[str]:
    """Return the lines of help on a stage's preference loss: formula, data, paper, and an option for each of its numbers."""
    loss = getattr(stage, "loss", None)
    if not isinstance(loss, str) or not hasattr(stage, "loss_options"):
        return []
    from posttrain.cli_list import learns_from, source, summary
    from posttrain.losses import find_loss
    from posttrain.registry import keyword_defaults

    registry = find_loss(loss)
    function, facts = registry[loss], registry.facts(loss)
    given: dict[str, float] = getattr(stage, "loss_options")()  # noqa: B009  (a stage with a loss has it)
    about = [summary(function), f"learns from {learns_from(registry, loss)}", facts.get("paper") or source(function)]
    lines = ["", f"loss {loss}:", *(f"  {line}" for line in about if line)]
    lines += [f"  --loss.{key} float (now {given.get(key, at)!r})" for key, at in keyword_defaults(function).items()]
    return lines
