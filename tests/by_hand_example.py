"""The examples that need no library, loaded as modules to be compared with it."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parents[1] / "examples"


@contextmanager
def loaded(name: str) -> Iterator[ModuleType]:
    """``examples/NAME.py`` as a module, forgotten afterwards."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


def packages(name: str) -> set[str]:
    """What ``examples/NAME.py`` imports beside the standard library."""
    found = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.walk(ast.parse((EXAMPLES / f"{name}.py").read_text()))
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    return found - set(sys.stdlib_module_names)
