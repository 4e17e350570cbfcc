"""``metrics.jsonl`` and ``samples.jsonl``: one JSON object a line, keys out of a registry with unit and formula."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import CheckError, suggest


@dataclass(frozen=True)
class Metric:
    """A logged quantity: its unit, how it is computed, and whether it measures time (so differs between equal runs)."""

    unit: str
    formula: str
    wall_clock: bool = False


METRICS: dict[str, Metric] = {
    "loss/total": Metric("nats", "sum over terms of coefficient * sum / count of the step"),
    "loss/nll": Metric("nats a token", "-mean log pi(y_t) over trained tokens of the step"),
    "loss/ranking": Metric("nats a prompt", "mean over prompts of the mean pair loss"),
    "loss/policy": Metric("a token", "mean over sampled tokens of the clipped surrogate"),
    "loss/value": Metric("reward^2", "mean over sampled tokens of the clipped value loss"),
    "accuracy/pairs": Metric("share", "pairs of the step ordered right, ties one half; prompts count equally"),
    "score/mean": Metric("reward", "mean score of the step's responses"),
    "reward/mean": Metric("reward", "mean over sampled responses of the reward before the KL penalty"),
    "reward/std": Metric("reward", "standard deviation of the same"),
    "kl/mean": Metric("nats a sequence", "mean over responses of sum_t (old_logp - ref_logp)"),
    "kl/update": Metric(
        "nats a token",
        "mean over sampled tokens of k3(old_logp, logp): how far updates moved from the sampler",
    ),
    "policy/entropy": Metric("nats a token", "mean over sampled tokens of -log pi(y_t) under the sampler"),
    "policy/clipped": Metric("share", "sampled tokens whose clipped branch is the larger"),
    "policy/ratio_error": Metric("ratio", "mean over sampled tokens of |ratio - 1|"),
    "value/explained": Metric("share", "1 - var(return - value) / var(return) over sampled tokens, before updates"),
    "length/mean": Metric("tokens", "mean length of sampled responses, stop token included"),
    "truncated/share": Metric("share", "sampled responses that ended by length"),
    "abstained/share": Metric("share", "sampled responses that the reward gave no score"),
    "optim/lr": Metric("1", "learning rate of the step"),
    "optim/grad_norm": Metric("1", "norm of the gradient before clipping, over all roles"),
    "data/epoch": Metric("epochs", "passes over the rows or prompts"),
    "speed/tokens": Metric("tokens a second", "packed tokens trained / seconds of the step", True),
    "time/step": Metric("seconds", "whole step", True),
    "time/generate": Metric("seconds", "sampling", True),
    "time/score": Metric("seconds", "reward, reference and value passes", True),
    "memory/peak": Metric("bytes", "peak resident memory of the process", True),
}


class JsonLines:
    """Append-only JSON lines that can be cut back to a step, so that a resumed run repeats nothing.

    Every line has an integer ``step``; ``flush`` also forces the file to disk.
    """

    def __init__(self, path: Path, keep_below: int) -> None:
        """Open ``path``, dropping lines whose step is ``keep_below`` or later (they are about to be made again)."""
        self.path = path
        kept = []
        if path.exists():
            for line in path.read_text().split("\n"):  # not splitlines: JSON leaves U+2028 as it is
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:  # the last line of a killed process
                    break
                if record["step"] < keep_below:
                    kept.append(line)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".tmp")
        partial.write_text("".join(f"{line}\n" for line in kept))
        os.replace(partial, path)
        self._file = path.open("a")

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """Append one record."""
        self._file.write(json.dumps({"step": step, **record}, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Force to disk and close."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


class MetricsLog:
    """``metrics.jsonl`` with registered keys only, mirrored to TensorBoard where that is installed."""

    def __init__(self, directory: Path, keep_below: int) -> None:
        """Open the log of a stage, cut back to ``keep_below``."""
        self._lines = JsonLines(directory / "metrics.jsonl", keep_below)
        self._board = _tensorboard(directory / "tensorboard", keep_below)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one step.

        Raises:
            CheckError: a key that is not registered, or a value that is not finite.
        """
        for key, value in metrics.items():
            if key not in METRICS:
                raise CheckError(f"metric '{key}' is not registered; {suggest(key, METRICS)}")
            if not math.isfinite(value):
                raise CheckError(f"metric '{key}' is {value} at step {step}; expected a finite number")
            if self._board is not None:
                self._board.add_scalar(key, value, step)
        self._lines.write(step, dict(metrics))

    def close(self) -> None:
        """Close both logs."""
        self._lines.close()
        if self._board is not None:
            self._board.close()


def _tensorboard(directory: Path, keep_below: int) -> Any:
    """A TensorBoard writer, or None where the extra ``tensorboard`` is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(directory), purge_step=keep_below)
