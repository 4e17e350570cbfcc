"""Command-line arguments as text: split them, read each as the type it is annotated with, name types."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import types
import typing
from collections.abc import Callable
from typing import Any

from posttrain.errors import ConfigError


def keyword_options(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return a command's keyword-only parameters: its options."""
    parameters = inspect.signature(function, eval_str=True).parameters
    return {key: item for key, item in parameters.items() if item.kind is item.KEYWORD_ONLY}


def flags(function: Callable[..., Any]) -> set[str]:
    """Return the options of a command that take no value."""
    return {key for key, item in keyword_options(function).items() if item.annotation is bool}


def split(args: list[str], flags: set[str]) -> tuple[list[str], dict[str, str | None]]:
    """Separate positional arguments from options; an option given no value has None, a flag "true"."""
    positional: list[str] = []
    options: dict[str, str | None] = {}
    rest = list(args)
    while rest:
        item = rest.pop(0)
        if not item.startswith("-") or item == "-":
            positional.append(item)
            continue
        key, equals, value = item.removeprefix("--").partition("=")
        stage, dot, field = key.rpartition(".")
        key = stage + dot + field.replace("-", "_")
        if not item.startswith("--") or not key:
            raise ConfigError(f"unknown option '{item}'; options start with --")
        if key in options:
            raise ConfigError(f"{flag(key)} is given twice; give it once")
        if key in flags:
            if equals:
                raise ConfigError(f"{flag(key)} takes no value; got '{value}'")
            options[key] = "true"
        elif equals:
            options[key] = value
        else:
            options[key] = rest.pop(0) if rest and not rest[0].startswith("--") else None
    return positional, options


def flag(key: str) -> str:
    """Write a parameter as the option one types."""
    return "--" + (key if "." in key else key.replace("_", "-"))


def convert(text: str | None, kind: Any, key: str) -> Any:
    """Read an option's text as its annotated type; of a union, the first that fits, str last.

    Raises:
        ConfigError: no value, or one of another type; the message names the type expected.
    """
    if text is None:
        raise ConfigError(f"{flag(key)} needs a value: {type_name(kind)}")
    parts = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    for part in sorted(parts, key=lambda part: part is str):
        with contextlib.suppress(ValueError):
            return convert_one(text, part)
    raise ConfigError(f"{flag(key)}: got '{text}', expected {type_name(kind)}")


def convert_one(text: str, kind: Any) -> Any:
    """Read text as one type that is no union; raises ValueError where it is not of that type."""
    if kind in (str, inspect.Parameter.empty):
        return text
    words = {bool: {"true": True, "false": False}, types.NoneType: {"none": None}}
    if kind in words:
        if text.lower() not in words[kind]:
            raise ValueError(text)
        return words[kind][text.lower()]
    if kind in (int, float):
        number = kind(text)
        if number != number:
            raise ValueError("nan")  # not a setting anyone means
        return number
    if dataclasses.is_dataclass(kind):
        raise ValueError("a stage is given in Python")
    import tyro  # for what is left: paths, choices, tuples (written a,b,c); takes 0.7 s to import

    many = typing.get_origin(kind) in (tuple, list, set, frozenset, dict)
    annotation: Any = tyro.conf.Positional[kind]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return tyro.cli(annotation, args=text.split(",") if many else [text], console_outputs=False)
    except SystemExit as error:
        raise ValueError(text) from error


def type_name(kind: Any) -> str:
    """Write a type for a message: ``int``, ``float or none``, ``'a' or 'b'``."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(type_name(part) for part in typing.get_args(kind))
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(repr(value) for value in typing.get_args(kind))
    if kind is inspect.Parameter.empty:
        return "str"
    simple = {bool: "true or false", types.NoneType: "none"}
    return simple.get(kind) or (kind.__name__ if type(kind) is type else str(kind).replace("typing.", ""))
