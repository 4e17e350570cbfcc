"""The examples that need no library, loaded as modules to be compared with it."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

from posttrain.forest import Batch
from posttrain.train.rollouts import RolloutSource

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


class Recorded:
    """A source that also keeps every batch it hands out."""

    def __init__(self, source: RolloutSource) -> None:
        self.source, self.batches = source, []

    def __call__(self, step: int) -> Batch:
        self.batches.append(self.source(step))
        return self.batches[-1]

    def __getattr__(self, name: str):
        return getattr(self.source, name)


def rows_of(module: ModuleType, batches: list[Batch]):
    """Prompts, responses and scores of batches as an example's padded rows; nothing the library computed from them."""
    pairs = []
    for batch in batches:
        ids = batch.forest.ids.tolist()
        for tree in batch.forest.trees:
            pairs += [(ids[slice(*tree.prompt)], ids[slice(*branch)]) for branch in tree.branches]
    wide, long = max(len(p) for p, _ in pairs), max(len(r) for _, r in pairs)
    return module.Rows(
        prompt=torch.tensor([[0] * (wide - len(p)) + p for p, _ in pairs]),
        prompt_mask=torch.tensor([[False] * (wide - len(p)) + [True] * len(p) for p, _ in pairs]),
        response=torch.tensor([r + [0] * (long - len(r)) for _, r in pairs]),
        mask=torch.tensor([[True] * len(r) + [False] * (long - len(r)) for _, r in pairs]),
        score=torch.cat([b.branches["reward"] for b in batches]).double(),
    )
