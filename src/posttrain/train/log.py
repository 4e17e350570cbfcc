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


class Metrics(dict[str, Metric]):
    """Metrics by name; `PART` followed by any name is one of a family."""

    def __missing__(self, name: str) -> Metric:
        if name.startswith(PART):
            return Metric("reward", "mean over sampled responses of a part of their reward")
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (isinstance(name, str) and name.startswith(PART))


PART = "reward/part/"

METRICS = Metrics(
    {
        "loss/total": Metric("nats", "sum over terms of coefficient * sum / count of the step"),
        "loss/nll": Metric("nats a token", "-mean log pi(y_t) over trained tokens of the step"),
        "loss/ranking": Metric("nats a prompt", "mean over prompts of the mean pair loss"),
        "loss/preference": Metric("nats a pair", "mean over prompts of the mean loss of their pairs"),
        "loss/unpaired": Metric("a response", "mean over rows, by weight, of the loss of a labelled response"),
        "loss/listwise": Metric("a prompt", "mean over prompts, by weight, of the loss of their scored responses"),
        "loss/valued": Metric("a response", "mean over rows, by weight, of the loss of a response with a reward"),
        "loss/policy": Metric(
            "1", "mean of the algorithm's loss over sampled tokens or responses of the step, as it aggregates"
        ),
        "loss/quark": Metric(
            "nats a token", "mean over tokens of -log pi + beta KL - eta entropy, after reward tokens"
        ),
        "loss/kl": Metric("nats a token", "mean of the estimated KL to the reference, aggregated as loss/policy is"),
        "loss/value": Metric("reward^2", "mean over sampled tokens of the clipped value loss"),
        "loss/cost_value": Metric("cost^2", "the same as loss/value of the cost's critic"),
        "loss/ptx": Metric(
            "nats a token", "-mean log pi(y_t), by weight, over tokens of the text that the policy keeps"
        ),
        "loss/attributes": Metric(
            "rating^2", "mean over prompts of their responses' mean squared error over rated attributes"
        ),
        "loss/steps": Metric(
            "nats a step", "mean over prompts, their responses and those's labelled steps of the cross-entropy"
        ),
        "loss/verdict": Metric(
            "nats a response", "mean over responses of the cross-entropy of verdicts and those wanted"
        ),
        "loss/centring": Metric("reward^2", "mean over prompts of their pairs' mean (s_chosen + s_rejected)^2"),
        "loss/length": Metric("1", "1 - correlation/length + |correlation/quality|"),
        "correlation/length": Metric(
            "1", "correlation of the length head's scores with tokens, each less its prompt's mean"
        ),
        "correlation/quality": Metric("1", "the same of the quality head's scores"),
        "accuracy/steps": Metric("share", "labelled steps judged as labelled, averaged as loss/steps is"),
        "accuracy/verdicts": Metric("share", "responses whose likeliest verdict is the one most wanted"),
        "accuracy/pairs": Metric("share", "pairs of the step ordered right, ties one half; prompts count equally"),
        "score/mean": Metric("reward", "mean score of the step's responses"),
        "reward/chosen": Metric(
            "reward",
            "beta * (logp/chosen - the reference's), averaged as the loss is; without a reference beta * logp/chosen, and over "
            "its length where the loss compares means",
        ),
        "reward/rejected": Metric("reward", "the same of rejected responses"),
        "reward/margin": Metric("reward", "reward/chosen - reward/rejected"),
        "logp/chosen": Metric("nats a response", "sum_t log pi(y_t) of chosen responses, averaged as the loss is"),
        "logp/rejected": Metric("nats a response", "the same of rejected responses"),
        "logratio/good": Metric("nats a response", "mean of log pi(y) - log ref(y) over responses labelled good"),
        "logratio/bad": Metric("nats a response", "the same over responses labelled bad"),
        "logratio/mismatched": Metric("nats a response", "the same over responses to other prompts"),
        "reward/mean": Metric("reward", "mean over sampled responses of the reward before the KL penalty"),
        "gold/reward": Metric("reward", "mean over sampled responses of a reward that nothing is trained on"),
        "gold/known": Metric("share", "sampled responses that this reward gave a finite score"),
        "cost/mean": Metric("cost", "mean over sampled responses of the cost"),
        "cost/recent": Metric("cost", "the same over the newest responses, which move the multiplier"),
        "cost/over": Metric("share", "sampled responses whose cost is over the limit"),
        "cost/multiplier": Metric("1", "weight of the cost's advantage beside the reward's"),
        "reward/std": Metric("reward", "standard deviation of the same"),
        "kl/mean": Metric("nats a sequence", "mean over responses of sum_t (old_logp - ref_logp)"),
        "kl/update": Metric(
            "nats a token",
            "mean over sampled tokens of k3(old_logp, logp): how far updates moved from the sampler",
        ),
        "kl/coefficient": Metric("1", "coefficient of the KL penalty in the reward, where it follows a target"),
        "mismatch/weight": Metric("1", "mean weight of sampled tokens for the distance between sampler and trainer"),
        "mismatch/zero": Metric("share", "sampled tokens whose such weight is 0"),
        "mismatch/kl": Metric(
            "nats a token", "mean of k3(sampled_logp, old_logp): how far the trainer is from the sampler"
        ),
        "kl/full": Metric(
            "nats a token", "mean over trained tokens of the KL between policy and start over the vocabulary"
        ),
        "pool/size": Metric("responses", "scored responses in the pool"),
        "pool/best": Metric("reward", "mean score of the pool's best bin"),
        "pool/worst": Metric("reward", "mean score of the pool's worst bin"),
        "kl/data": Metric(
            "nats a token",
            "mean over response tokens of exp(d) - 1 - d, d = logp - ref_logp: the policy's distance from the reference on the "
            "data, an estimate of KL(reference || policy) as far as the reference could have written them",
        ),
        "policy/entropy": Metric("nats a token", "mean over sampled tokens of -log pi(y_t) under the sampler"),
        "policy/clipped": Metric(
            "share", "sampled tokens whose advantage has no gradient because their ratio is clipped"
        ),
        "policy/ratio_error": Metric("ratio", "mean over sampled tokens of |ratio - 1|"),
        "value/error": Metric("reward^2", "mean over rows, by weight, of (reward - value)^2"),
        "value/explained": Metric("share", "1 - var(return - value) / var(return) over sampled tokens, before updates"),
        "length/mean": Metric("tokens", "mean length of sampled responses, stop token included"),
        "truncated/share": Metric("share", "sampled responses that ended by length"),
        "abstained/share": Metric("share", "sampled responses that the reward gave no score"),
        "length/p95": Metric("tokens", "length that 95 % of sampled responses do not exceed"),
        "kl/stop": Metric("nats a sequence", "the part of kl/mean that stands on stop tokens"),
        "kl/after_stop": Metric(
            "nats a sequence",
            "the part of kl/mean that stands on tokens after a stop token; 0 where sampling ends there",
        ),
        "groups/flat": Metric("share", "prompts whose sampled responses all have one reward"),
        "groups/dropped": Metric("share", "prompts left out because too few of their responses have a score"),
        "groups/kept": Metric("share", "prompts sampled that have responses of differing reward and were used"),
        "groups/identical": Metric("share", "prompts whose sampled responses are all the same"),
        "rollout/staleness": Metric(
            "updates", "updates between the weights that sampled the step's batch and those that it trains"
        ),
        "rollout/tied": Metric("share", "prompts sampled of which no pair was made: scores tied or missing"),
        "step/skipped": Metric("steps", "1 where the step was skipped because something was not finite"),
        "optim/lr": Metric("1", "learning rate of the step"),
        "optim/grad_norm": Metric("1", "norm of the gradient before clipping, over all roles"),
        "data/epoch": Metric("epochs", "passes over the rows or prompts"),
        "speed/tokens": Metric("tokens a second", "packed tokens trained / seconds of the step", True),
        "time/step": Metric("seconds", "whole step", True),
        "time/save": Metric(
            "seconds", "waiting for a checkpoint: to begin it after the step before, and for its copy", True
        ),
        "time/generate": Metric("seconds", "sampling", True),
        "time/score": Metric("seconds", "reward, reference and value passes", True),
        "memory/peak": Metric("bytes", "peak resident memory of the process", True),
    }
)


class JsonLines:
    """Append-only JSON lines that are cut back to a step, so that a resumed run repeats nothing.

    Every line has an integer ``step``, and steps never fall.
    """

    def __init__(self, path: Path, keep_below: int) -> None:
        """Open ``path``, dropping lines whose step is ``keep_below`` or later (they are about to be made again)."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        self._file.truncate(_length_below(path, keep_below))
        self._file.seek(0, os.SEEK_END)

    def write(self, step: int, *records: Mapping[str, Any]) -> None:
        """Append records of a step."""
        lines = [json.dumps({"step": step, **record}, ensure_ascii=False) + "\n" for record in records]
        self._file.write("".join(lines).encode())
        self._file.flush()

    def length(self) -> int:
        """Bytes written."""
        return self._file.tell()

    def sync(self) -> None:
        """Force to disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Force to disk and close."""
        with self._file:
            self._file.flush()
            self.sync()


def _length_below(path: Path, step: int) -> int:
    """Bytes of the whole lines before the first of ``step`` or later; a line that was cut off ends them."""
    length = 0
    with path.open("rb") as file:
        for line in file:
            try:
                if not line.endswith(b"\n") or json.loads(line)["step"] >= step:
                    break
            except ValueError:
                break
            length += len(line)
    return length


class MetricsLog:
    """``metrics.jsonl`` with registered keys only, mirrored to TensorBoard where that is installed."""

    def __init__(self, directory: Path, keep_below: int, expected: int | None = None) -> None:
        """Open the log of a stage, cut back to ``keep_below``, where it should be ``expected`` bytes long.

        Raises:
            CheckError: it is not: lines from before the checkpoint are gone.
        """
        self._lines = JsonLines(directory / "metrics.jsonl", keep_below)
        if expected is not None and self._lines.length() != expected:
            raise CheckError(
                f"{self._lines.path} has {self._lines.length()} bytes before step {keep_below}, expected {expected}; it was "
                "changed after the checkpoint: put it back, or start again in another directory"
            )
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
        self._lines.write(step, metrics)

    def length(self) -> int:
        """Bytes of ``metrics.jsonl``."""
        return self._lines.length()

    def sync(self) -> None:
        """Force ``metrics.jsonl`` to disk."""
        self._lines.sync()

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
