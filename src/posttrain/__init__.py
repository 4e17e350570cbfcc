"""Align a language model with feedback: reward models, reinforcement learning and preference optimisation.

Public names load on first use, so ``import posttrain`` imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "CheckError": "posttrain.errors",
    "ConfigError": "posttrain.errors",
    "DataError": "posttrain.errors",
    "ModelError": "posttrain.errors",
    "PosttrainError": "posttrain.errors",
    "RewardError": "posttrain.errors",
    "Batch": "posttrain.forest",
    "Forest": "posttrain.forest",
    "RECIPES": "posttrain.registry",
    "Stopped": "posttrain.runner",
    "dry_run": "posttrain.forecast",
    "override": "posttrain.graph",
    "run_recipe": "posttrain.runner",
    "Context": "posttrain.stages",
    "Plan": "posttrain.stages",
    "Recipe": "posttrain.stages",
    "Stage": "posttrain.stages",
    "Example": "posttrain.types",
    "Message": "posttrain.types",
    "Response": "posttrain.types",
}

__all__ = sorted([*_PUBLIC, "__version__"])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import a public name's module when the name is first used."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'posttrain' has no attribute '{name}'")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return list(__all__)
