"""From files of feedback to token ids: reading, chat templates, views, mixtures, checks, rows for training.

Public names load on first use, so that reading a file imports neither torch nor a tokenizer.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.data import views
    from posttrain.data.batch import Ask, render_many
    from posttrain.data.chat import Rendered, Span, render, render_branch, render_prompt, render_response, stop_ids
    from posttrain.data.checking import CheckReport, check
    from posttrain.data.collate import Report, demonstration_rows, prompt_ids, ranking_rows
    from posttrain.data.exporting import export
    from posttrain.data.formats import FORMATS, parse_row, parse_rows
    from posttrain.data.load import ReadReport, file_hash, read, resolve_data, stream
    from posttrain.data.mixing import MixReport, Part, Shuffle, SplitReport, mix, sides, size_weights, split
    from posttrain.data.views import LabelCorrelation, demonstrations, label_correlation, prompts, rankings
    from posttrain.data.write import write_jsonl

_HOMES = {
    "batch": ("Ask", "render_many"),
    "chat": ("Rendered", "Span", "render", "render_branch", "render_prompt", "render_response", "stop_ids"),
    "checking": ("CheckReport", "check"),
    "collate": ("Report", "demonstration_rows", "prompt_ids", "ranking_rows"),
    "exporting": ("export",),
    "formats": ("FORMATS", "parse_row", "parse_rows"),
    "load": ("ReadReport", "file_hash", "read", "resolve_data", "stream"),
    "mixing": ("MixReport", "Part", "Shuffle", "SplitReport", "mix", "sides", "size_weights", "split"),
    "views": ("LabelCorrelation", "demonstrations", "label_correlation", "prompts", "rankings"),
    "write": ("write_jsonl",),
}
_MODULES = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "FORMATS",
    "Ask",
    "CheckReport",
    "LabelCorrelation",
    "MixReport",
    "Part",
    "ReadReport",
    "Rendered",
    "Report",
    "Shuffle",
    "Span",
    "SplitReport",
    "check",
    "demonstration_rows",
    "demonstrations",
    "export",
    "file_hash",
    "label_correlation",
    "mix",
    "parse_row",
    "parse_rows",
    "prompt_ids",
    "prompts",
    "ranking_rows",
    "rankings",
    "read",
    "render",
    "render_branch",
    "render_many",
    "render_prompt",
    "render_response",
    "resolve_data",
    "sides",
    "size_weights",
    "split",
    "stop_ids",
    "stream",
    "views",
    "write_jsonl",
]


def __getattr__(name: str) -> Any:
    """Import a public name's module when the name is first used."""
    if name == "views":
        return importlib.import_module(f"{__name__}.views")
    if name not in _MODULES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return list(__all__)
