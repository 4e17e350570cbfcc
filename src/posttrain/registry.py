"""Names to functions, only where a string arrives (command line, JSON); Python callers pass functions."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from posttrain.errors import ConfigError, suggest

T = TypeVar("T", bound=Callable[..., Any])


class Registry(Mapping[str, Any]):
    """A read-only mapping from name to object; values may be import strings ``pkg.mod:name`` that load on first use.

    Args:
        kind: what it holds, for error messages ("recipe", "preference loss").
        lazy: names to import strings, so that listing imports nothing.
    """

    def __init__(self, kind: str, lazy: dict[str, str] | None = None) -> None:
        self.kind = kind
        self._items: dict[str, Any] = dict(lazy or {})

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that adds a function under ``name``; a second registration of a name is an error."""

        def add(item: T) -> T:
            if name in self._items:
                raise ConfigError(f"{self.kind} '{name}' is registered twice; give the second one another name")
            self._items[name] = item
            return item

        return add

    def __getitem__(self, name: str) -> Any:
        if name in self._items:
            item = self._items[name]
            return load_object(item) if isinstance(item, str) else item
        if ":" in name:
            return load_object(name)
        raise ConfigError(f"unknown {self.kind} '{name}'; {suggest(name, self._items)}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, name: object) -> bool:
        return name in self._items


def load_object(path: str) -> Any:
    """Import ``pkg.mod:name``; raises `ConfigError` that says which half was not found."""
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"can't import '{path}': {error}; expected package.module:name on the Python path") from error
    if not hasattr(module, attribute):
        names = [n for n in vars(module) if not n.startswith("_")]
        raise ConfigError(f"'{module_name}' has no '{attribute}'; {suggest(attribute, names)}")
    return getattr(module, attribute)


RECIPES = Registry(
    "recipe",
    {
        "instructgpt": "posttrain.recipes.instructgpt:instructgpt",
        "reward_model": "posttrain.recipes.reward_model:reward_model",
        "small": "posttrain.recipes.small:small",
    },
)
