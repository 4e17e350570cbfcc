"""From files of feedback to token ids: reading, chat templates, views, rows for training."""

from __future__ import annotations

import importlib
from typing import Any

# Loaded on first use, so that reading a file imports neither torch nor transformers.
_WHERE = {
    "read_jsonl": "load",
    "parse_row": "formats",
    "resolve_data": "load",
    "file_hash": "load",
    "Rendered": "chat",
    "Span": "chat",
    "render": "chat",
    "render_branch": "chat",
    "render_prompt": "chat",
    "render_response": "chat",
    "stop_ids": "chat",
    "LabelCorrelation": "views",
    "demonstrations": "views",
    "label_correlation": "views",
    "prompts": "views",
    "rankings": "views",
    "Report": "collate",
    "demonstration_rows": "collate",
    "prompt_ids": "collate",
    "ranking_rows": "collate",
}

__all__ = sorted(_WHERE)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
