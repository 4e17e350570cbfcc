"""From files of feedback to token ids: reading, chat templates, views, rows for training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from posttrain.data.chat import (
    Rendered,
    Span,
    render,
    render_branch,
    render_prompt,
    render_response,
    stop_ids,
)
from posttrain.data.formats import parse_row
from posttrain.data.load import ReadReport, file_hash, read, resolve_data, stream
from posttrain.data.views import (
    LabelCorrelation,
    demonstrations,
    label_correlation,
    prompts,
    rankings,
)
from posttrain.data.write import write_jsonl

if TYPE_CHECKING:
    from posttrain.data.collate import Report, demonstration_rows, prompt_ids, ranking_rows

__all__ = [
    "LabelCorrelation",
    "ReadReport",
    "Rendered",
    "Report",
    "Span",
    "demonstration_rows",
    "demonstrations",
    "file_hash",
    "label_correlation",
    "parse_row",
    "prompt_ids",
    "prompts",
    "ranking_rows",
    "rankings",
    "read",
    "render",
    "render_branch",
    "render_prompt",
    "render_response",
    "resolve_data",
    "stop_ids",
    "stream",
    "write_jsonl",
]


def __getattr__(name: str) -> Any:
    # Rows are for tensors: their module imports torch, which reading a file doesn't need.
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from posttrain.data import collate

    return getattr(collate, name)
