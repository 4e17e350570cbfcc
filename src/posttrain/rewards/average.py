"""One reward model of several models' averaged weights (WARM)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from posttrain.data.answers import answer_rows
from posttrain.errors import ConfigError
from posttrain.models.load import load_tokenizer
from posttrain.models.merge_files import PROMPTS, merge_models
from posttrain.models.stored import open_model
from posttrain.rewards.panel import load_panel
from posttrain.rewards.trained import RECORD
from posttrain.types import Example


def average_rewards(paths: Sequence[str], out: Path, *, reference: Sequence[Example]) -> dict[str, Any]:
    """Write the average of reward models that were trained from one start with other seeds, rates or data orders.

    Costs as much as one model to score with, and disagrees less with itself under wrong labels than its members do.

    Args:
        paths: directories of whole reward models of one kind.
        out: a new directory; ``reward.json`` is that of the first with the mean score of the reference answers.
        reference: at least 16 examples, on whose answers the merge is checked and whose first answers will average 0.

    Returns:
        what `posttrain.models.merge_files.merge_models` recorded.

    Raises:
        ConfigError: fewer than two models, fewer than 16 examples, models of several kinds.
        ModelError: models that don't fit together, or a check that failed.

    Source: Ramé et al. 2024 (WARM), arXiv 2401.12187.
    """
    if len(paths) < 2:
        raise ConfigError(f"got {len(paths)} models; expected at least two to average")
    records = [json.loads((Path(p) / RECORD).read_text()) for p in paths]
    if len(kinds := {(r.get("kind", "bradley_terry"), tuple(r.get("outputs", ()))) for r in records}) > 1:
        raise ConfigError(
            f"the models are of several kinds ({', '.join(sorted(k for k, _ in kinds))}); average one kind"
        )
    rows = [a.row for a in answer_rows(load_tokenizer(paths[0]), reference, max_length=1 << 20) if a.row is not None]
    if len(rows) < PROMPTS:
        raise ConfigError(f"got {len(rows)} reference examples with answers; expected at least {PROMPTS}")
    prompts = [[*row.prompt, *row.branches[0].ids] for row in rows]
    found = merge_models("average", [open_model(p) for p in paths], out, prompts=prompts)
    record = records[0] | {"mean": 0.0, "averaged": len(paths)}
    (out / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    panel = load_panel(str(out), dtype=torch.float32, max_length=1 << 20)
    scores = [s.scores[0] for s in panel.score(reference) if s.scores]
    known = [s for s in scores if s is not None]
    record |= {"mean": sum(known) / len(known), "reference": f"{len(known)} reference answers"}
    (out / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    return found
