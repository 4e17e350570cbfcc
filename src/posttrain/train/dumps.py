"""What is kept of a step that was skipped, as safetensors and JSON, and reading it back.

A dump is a directory: ``fault.json`` says what was not finite, ``batch.safetensors`` holds the micro-batch and
``weights.safetensors`` the trained tensors it was computed with (after the first of several skipped steps in a row, the
name of the dump that has them). Scores of a reward are in ``fault.json`` with the responses they were given to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain.errors import ModelError
from posttrain.forest import Batch, Forest, Tree
from posttrain.models.policy import Model
from posttrain.rewards.base import BadScore

FORMAT = 1


@dataclass(frozen=True)
class Finding:
    """The first tensor that is not finite.

    ``kind`` is weight, batch, statistic, term, loss, gradient or score; ``value`` and ``place`` are those of its first such
    entry, ``bad`` of ``size`` entries are such.
    """

    kind: str
    name: str
    value: str
    place: int
    bad: int
    size: int

    @property
    def text(self) -> str:
        """One clause."""
        if self.size == 1:
            return f"{self.kind} {self.name} is {self.value}"
        return (
            f"{self.kind} {self.name} is {self.value} at entry {self.place} ({self.bad} of {self.size} are not finite)"
        )


def write(
    directory: Path,
    step: int,
    title: str,
    part: Batch,
    finding: Finding,
    models: Mapping[str, Model],
    *,
    weights_in: Path | None,
) -> None:
    """Keep a micro-batch, the trained tensors (unless ``weights_in`` has them), and what was found."""
    directory.mkdir(parents=True, exist_ok=True)
    forest = part.forest
    tensors = {f"forest/{k}": v for k, v in vars(forest).items() if isinstance(v, Tensor)}
    tensors |= {f"mask/{k}": v for k, v in forest.masks.items()}
    tensors |= {f"tokens/{k}": v for k, v in part.tokens.items()} | {
        f"branches/{k}": v for k, v in part.branches.items()
    }
    _save(tensors, directory / "batch.safetensors")
    if weights_in is None:
        trained = {f"{r}/{k}": p for r, m in models.items() for k, p in m.parameters().items()}
        _save(trained, directory / "weights.safetensors")
    fault = {
        "format": FORMAT,
        "title": title,
        "step": step,
        "finding": asdict(finding),
        "trees": [[list(t.prompt), [list(b) for b in t.branches]] for t in forest.trees],
        "counts": part.counts,
        "weights": weights_in.name if weights_in else directory.name,
    }
    (directory / "fault.json").write_text(json.dumps(fault, indent=1) + "\n")


def write_scores(directory: Path, step: int, title: str, fault: BadScore) -> None:
    """Keep the responses of a rollout and the scores they were given."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "prompt_key": c.example.prompt_key,
            "prompt_ids": list(c.prompt_ids),
            "ids": list(c.ids),
            "text": c.text,
            "truncated": c.truncated,
            "group": c.group,
            "score": s.value if s.value is None else str(s.value),
        }
        for c, s in zip(fault.completions, fault.scores, strict=True)
    ]
    kept = {"format": FORMAT, "title": title, "step": step, "message": str(fault), "completions": rows}
    (directory / "fault.json").write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


def read_fault(directory: Path) -> dict[str, Any]:
    """``fault.json`` of a dump.

    Raises:
        ModelError: there is none that this version can read.
    """
    try:
        fault = json.loads((directory / "fault.json").read_text())
        if fault["format"] != FORMAT:
            raise ValueError(f"format {fault['format']}, expected {FORMAT}")
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"'{directory}' is no dump of a skipped step ({error}); expected RUN/STAGE/faults/step-N with a fault.json"
        ) from error
    return fault


def read_batch(directory: Path) -> Batch:
    """The micro-batch of a dump, as it was."""
    fault, tensors = read_fault(directory), load_file(directory / "batch.safetensors")
    columns: dict[str, dict[str, Tensor]] = {"forest": {}, "mask": {}, "tokens": {}, "branches": {}}
    for key, x in tensors.items():
        kind, _, name = key.partition("/")
        columns[kind][name] = x
    trees = tuple(Tree((p[0], p[1]), tuple((b[0], b[1]) for b in spans)) for p, spans in fault["trees"])
    forest = Forest(trees=trees, masks=columns["mask"], **columns["forest"])
    return Batch(forest, columns["tokens"], columns["branches"], fault["counts"])


def load_weights(directory: Path, models: Mapping[str, Model]) -> None:
    """Give roles the trained tensors of a dump.

    Raises:
        ModelError: they are of other roles or shapes.
    """
    tensors = load_file(directory.with_name(read_fault(directory)["weights"]) / "weights.safetensors")
    trained = {f"{r}/{k}": p for r, m in models.items() for k, p in m.parameters().items()}
    if trained.keys() != tensors.keys() or any(p.shape != tensors[k].shape for k, p in trained.items()):
        odd = sorted(trained.keys() ^ tensors.keys())[:3]
        raise ModelError(
            f"the dump '{directory}' is of another model: {odd or 'shapes'} differ; replay it with the run's own settings"
        )
    for key, p in trained.items():
        p.data.copy_(tensors[key])


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, path)
