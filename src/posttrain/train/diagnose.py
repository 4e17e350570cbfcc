"""What the first step must show, and what a run's numbers say when it goes wrong: each line names a cause and an option."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from posttrain.errors import CheckError
from posttrain.forest import Batch, Branch, Row, build_forest, split
from posttrain.machine import free_memory
from posttrain.models.lora import deltas
from posttrain.models.policy import Model, forward_stats
from posttrain.train.checkpoint import remove
from posttrain.train.distributed import world
from posttrain.train.guard import StatsOf, bad_number, read_rows
from posttrain.train.progress import check_table
from posttrain.train.terms import Check, Objective, total, unmoved

REPEAT = 1e-5  # nats by which the same tokens may differ when computed twice
MISMATCH = 0.01  # mean |ratio - 1| before an update that is more than rounding
Row_ = Mapping[str, float]


# ---------------------------------------------------------------------------- before the first update


def first_step(
    models: Mapping[str, Model], objective: Objective, source: Any, batch: Batch, stats_of: StatsOf, run: Any, step: int
) -> None:
    """Print the table of self-checks on the first micro-batch that has something to learn from.

    Raises:
        CheckError: one failed; nothing was changed.
    """
    parts = split(batch, run.max_tokens, objective.whole_groups)
    part = next((p for p in parts if objective.mask is None or bool(p.forest.masks[objective.mask].any())), parts[0])
    with torch.no_grad(), unmoved(objective):
        stats = stats_of(part)
        finding = bad_number(models, objective, part, stats)
        if finding is not None and step > 0:
            return  # the guard skips this step, as it would have without an interruption
        if finding is not None:  # nothing else would say what is wrong
            checks = [Check("numbers finite", finding.text, "all finite", False)]
        else:
            checks = objective.check(stats, part, step)
            checks += start_checks(models, objective, source, part, stats_of, step, run.max_tokens)
    run.console.print(check_table(run.title, checks))
    if failed := [c for c in checks if c.ok is False]:
        lines = "; ".join(f"{c.name}: got {c.value}, expected {c.expected}" for c in failed)
        raise CheckError(f"{run.title}: a check of the first step failed, nothing was trained: {lines}")


def start_checks(
    models: Mapping[str, Model],
    objective: Objective,
    source: Any,
    part: Batch,
    stats_of: StatsOf,
    step: int,
    max_tokens: int,
) -> list[Check]:
    """Lines of the step-0 table that hold for every objective; called without gradient, before anything is changed."""
    stats = stats_of(part)
    found: list[Check] = []
    if objective.mask is not None:
        mask = part.forest.masks[objective.mask]
        text = f"{int(mask.sum())} of {len(mask)} tokens under '{objective.mask}'"
        found.append(Check("tokens that count", text, "some", bool(mask.any())))
    again = stats_of(part)
    apart = max(float((stats[r][k] - again[r][k]).abs().max()) for r in stats for k in stats[r])
    found.append(
        Check("same tokens twice", f"differ by {apart:.1e}", f"at most {REPEAT:g} (no dropout)", apart <= REPEAT)
    )
    if "ref_logp" in part.tokens and "old_logp" in part.tokens:
        found.append(_reference_check(models["policy"], getattr(source, "reference", None), part, objective.mask, step))
    if "old_logp" in part.tokens:
        found.append(_value_check(objective, stats, part))
    found.append(memory_check(models, min(max_tokens, len(part.forest.ids))))
    return found


def _reference_check(policy: Model, reference: Model | None, part: Batch, mask: str | None, step: int) -> Check:
    """KL to the reference on fresh samples: 0 where both are the same function."""
    on = part.forest.masks[mask] if mask else slice(None)
    gap = (part.tokens["old_logp"] - part.tokens["ref_logp"])[on].double()
    text = f"mean |log-ratio| {gap.abs().mean():.1e} nats a token"
    if step > 0 or reference is None or not same_function(policy, reference):
        return Check("KL to the reference", text, "", None)
    limit = 1e-3 if policy.net.dtype in (torch.float32, torch.float64) else 0.1
    return Check(
        "KL to the reference",
        text,
        f"0 within {limit:g}: its weights are the policy's",
        float(gap.abs().mean()) <= limit,
    )


def _value_check(objective: Objective, stats: Mapping[str, Any], part: Batch) -> Check:
    """The objective where the policy is the one that sampled: its value there is computed with ``old_logp`` itself."""
    now, old = stats["policy"]["logp"], part.tokens["old_logp"]
    sampled = part.forest.masks.get("sampled", torch.ones_like(old, dtype=torch.bool))
    known = {**stats, "policy": {**stats["policy"], "logp": torch.where(sampled, old.to(now.dtype), now)}}
    value, expected = (float(total(objective(s, part), part.counts)) for s in (stats, known))
    limit = 1e-3 + 2 * getattr(objective, "ratio_tolerance", 0.0) + 0.05 * abs(expected)
    return Check(
        "objective at the sampler",
        f"{value:+.4f}",
        f"{expected:+.4f} within {limit:.4f}",
        abs(value - expected) <= limit,
    )


def same_function(one: Model, two: Model) -> bool:
    """Whether two roles have equal weights, bit for bit; adapters that add nothing count as absent."""
    for model in (one, two):
        if model.adapter and any(bool(d.any()) for d in deltas(model.net, model.adapter).values()):
            return False
    if one.net is two.net:
        return True
    first, second = (
        {k.replace(".base_layer.", "."): p for k, p in m.net.state_dict().items() if "lora_" not in k}
        for m in (one, two)
    )
    return first.keys() == second.keys() and all(torch.equal(p, second[k]) for k, p in first.items())


def memory_check(models: Mapping[str, Model], tokens: int) -> Check:
    """What the first update will allocate beyond the weights, against what is free: gradients, moments, activations, logits."""
    need, free = memory_forecast(models, tokens), free_memory()
    text = f"{need / 2**30:.2f} GiB more"
    if free is None:
        return Check("memory", text, "", None)
    return Check("memory", text, f"less than the {free / 2**30:.1f} GiB that are free", need <= free)


def memory_forecast(models: Mapping[str, Model], tokens: int) -> float:
    """Bytes of the first steps beyond the weights.

    Gradients, both AdamW moments, masters' gradients, a checkpoint's copy of masters and moments, activations of one
    micro-batch (layers that are computed again keep their input, and one of them at a time the rest), and a chunk of logits.
    """
    state = activations = 0.0
    for model in models.values():
        for p in model.parameters().values():
            wide = max(4, p.element_size())
            state += p.numel() * (p.element_size() + 5 * wide + (wide if p.element_size() < 4 else 0))
        config: Any = model.net.config
        width = 8 * config.hidden_size + 4 * getattr(config, "intermediate_size", 4 * config.hidden_size)
        size = next(model.net.parameters()).element_size()
        layers = config.num_hidden_layers
        kept = layers * config.hidden_size + width if model.checkpointing else layers * width
        activations = max(activations, float(tokens * kept * size))
    return state + activations + 2 * 64 * 2**20


# ---------------------------------------------------------------------------- while it runs


@dataclass(frozen=True)
class Notice:
    """One line about a run: ``kind`` is said once; ``stop`` ends the run."""

    kind: str
    text: str
    stop: bool = False


Evidence = Mapping[str, float]


def notices(
    history: Sequence[Row_], *, max_kl: float | None = None, evidence: Callable[[], Evidence] = dict
) -> list[Notice]:
    """What the newest row says in the light of those before it; ``evidence`` is asked only when the KL is too large."""
    rows = [row for row in history if "kl/mean" in row]
    if not rows or rows[-1] is not history[-1]:
        return []
    found = [_flat_groups(rows[-1]), _truncated(rows[-1]), _short(rows), _certain(rows)]
    if max_kl is not None and rows[-1]["kl/mean"] > max_kl:
        text = f"KL to the reference is {rows[-1]['kl/mean']:.2f} nats a sequence, above max_kl={max_kl:g}"
        found.append(Notice("kl", f"{text}: {kl_cause(history, max_kl, evidence())}", stop=True))
    return [notice for notice in found if notice is not None]


def _flat_groups(row: Row_) -> Notice | None:
    """Most prompts have responses of one score."""
    share = row.get("groups/flat", 0.0)
    if share <= 0.5:
        return None
    same = row["groups/identical"]
    why = (
        f"{same:.0%} have identical responses: the policy has nearly one answer; raise temperature"
        if same > share / 2
        else f"the responses differ but the reward does not tell them apart (mean {row['reward/mean']:.2f}): use prompts of "
        "middling difficulty or a graded reward"
    )
    return Notice(
        "groups",
        f"{share:.0%} of prompts have one reward for all their responses, so comparing these teaches nothing; {why}",
    )


def _truncated(row: Row_) -> Notice | None:
    """Most responses were cut."""
    share = row["truncated/share"]
    if share <= 0.5:
        return None
    return Notice(
        "truncation",
        f"{share:.0%} of responses were cut before a stop token (95 % have at most {row['length/p95']:.0f} tokens, cut ones "
        "included); raise max_new_tokens, or check that the stop token is trained",
    )


def _short(rows: Sequence[Row_]) -> Notice | None:
    """Responses have become a quarter as long as they were."""
    before, now = _start_mean(rows, "length/mean"), rows[-1]["length/mean"]
    if len(rows) < 3 or now >= before / 4:
        return None
    return Notice(
        "length",
        f"responses fell from {before:.1f} to {now:.1f} tokens on average: the reward pays for stopping early; look at "
        "samples.jsonl, raise kl, or reward length",
    )


def _certain(rows: Sequence[Row_]) -> Notice | None:
    """The policy has become a tenth as uncertain as it was."""
    before, now = _start_mean(rows, "policy/entropy"), rows[-1]["policy/entropy"]
    if len(rows) < 3 or now >= before / 10:
        return None
    return Notice(
        "entropy",
        f"entropy fell from {before:.2f} to {now:.2f} nats a token: the policy hardly explores any more; lower lr, raise "
        "kl, or go back to an earlier checkpoint",
    )


def _start_mean(rows: Sequence[Row_], name: str) -> float:
    """The mean over the first two rollouts."""
    return sum(row[name] for row in rows[:2]) / len(rows[:2])


def kl_cause(history: Sequence[Row_], max_kl: float, evidence: Evidence) -> str:
    """Why the KL grew, as far as it can be measured; causes that make other signs appear are looked for first."""
    rows = [row for row in history if "kl/mean" in row]
    now, kl = rows[-1], rows[-1]["kl/mean"]
    if evidence.get("repeat", 0.0) > REPEAT:
        return f"dropout is on (the same tokens computed twice differ by up to {evidence['repeat']:.2f} nats); train with dropout 0"
    if abs(now.get("kl/after_stop", 0.0)) > 0.25 * kl:
        return (
            f"{now['kl/after_stop'] / kl:.0%} of it stands on padding, tokens after a stop token; the sampling engine must end "
            "responses at the first stop token"
        )
    if evidence.get("reference_moved", 0.0):
        return "the reference's weights have changed since the run began; it must not share trained tensors with the policy"
    worst = max(row.get("policy/ratio_error", 0.0) for row in rows)
    if worst > MISMATCH:
        return (
            f"sampler and trainer disagree (mean |ratio - 1| was {worst:.2f} before an update, 0 is right); give both the same weights, "
            "dtype and temperature"
        )
    # kl/update does not see what the last update of a rollout did
    jumps = [(b["kl/mean"] - a["kl/mean"]) / b["length/mean"] for a, b in pairwise(rows)]
    moved = max([*jumps, *(row.get("kl/update", 0.0) for row in history)])
    if moved > 0.05:
        return (
            f"the learning rate is too high (one rollout's updates moved the policy by {moved:.2f} nats a token); lower lr or "
            "updates_per_rollout"
        )
    if now.get("kl/stop", 0.0) > 0.5 * kl:
        return (
            f"{now['kl/stop'] / kl:.0%} of it stands on stop tokens, which the reference hardly ever gives; train the start model to stop "
            "(supervised, with the stop token in the mask)"
        )
    if rows[0]["kl/mean"] > 0.5 * max_kl and rows[0].get("step", 0) == 0:
        return (
            f"the reference is stale: it was {rows[0]['kl/mean']:.2f} already at step 0; use the weights that training starts from as the "
            "reference"
        )
    steps = int(now.get("step", 0)) - int(rows[0].get("step", 0))
    return (
        f"none of the known faults shows: it grew steadily over {steps} steps, as a policy does that follows its reward; raise "
        "kl, or stop here"
    )


class KLLimit(CheckError):
    """The KL to the reference crossed its limit."""


@dataclass
class Watch:
    """A hook of `posttrain.train.loop.fit`: prints each kind of notice once, and ends the run where one says so.

    Use as a context around ``fit``: checkpoints newer than the last step that was measured below the limit are then set
    aside (``over-limit-step-N``), so that the newest that is left is good.
    """

    directory: Path
    console: Console
    max_kl: float | None = None
    evidence: Callable[[], Evidence] = dict
    _history: list[dict[str, float]] | None = None
    _said: set[str] = field(default_factory=set[str])

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take in a step.

        Raises:
            KLLimit: its KL is above the limit.
        """
        if self._history is None:
            self._history = [row for row in read_rows(self.directory) if row["step"] < step]
        self._history.append({"step": step, **metrics})
        for notice in notices(self._history, max_kl=self.max_kl, evidence=self.evidence):
            if notice.stop:
                good = self._good()
                kept = f"checkpoints up to step {good} are kept" if good else "no checkpoint was measured below it"
                raise KLLimit(f"step {step}: {notice.text}. Stopped; {kept}")
            if notice.kind not in self._said:
                self._said.add(notice.kind)
                self.console.print(
                    f"step {step}: {notice.text}", style="yellow", highlight=False, markup=False, soft_wrap=True
                )

    def __enter__(self) -> Watch:
        """Nothing is held."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Set aside checkpoints whose KL is above the limit, or was not measured."""
        if kind is None or not issubclass(kind, KLLimit) or not world().writes:
            return
        good = self._good()
        for path in (self.directory / "checkpoints").glob("step-*"):
            if good is None or int(path.name.removeprefix("step-")) > good:
                target = path.with_name(f"over-limit-{path.name}")
                remove(target)  # of an earlier attempt
                path.rename(target)

    def _good(self) -> int | None:
        """The last step whose weights were measured below the limit, before it was made."""
        limit = float("inf") if self.max_kl is None else self.max_kl
        below = [int(row["step"]) for row in self._history or [] if "kl/mean" in row and row["kl/mean"] <= limit]
        return max(below, default=None)


def evidence_of(policy: Model, reference: Model, ids: Sequence[int]) -> Callable[[], Evidence]:
    """Return what measures, when called, whether the policy is random and whether the reference has moved since now.

    ``ids`` are any tokens the models know.
    """
    forest = build_forest([Row(list(ids), [Branch(list(ids), {})])])
    sums = _sums(reference)

    def measure() -> Evidence:
        with torch.no_grad():
            one, two = (forward_stats(policy, forest, frozenset({"logp"}))["logp"] for _ in range(2))
        return {"repeat": float((one - two).abs().max()), "reference_moved": float(_sums(reference) != sums)}

    return measure


def _sums(model: Model) -> list[float]:
    """A number a tensor of a frozen role; those of adapters that are off do not matter."""
    keep = f".{model.adapter}." if model.adapter else "\0"
    return [float(p.detach().double().sum()) for k, p in model.net.named_parameters() if "lora_" not in k or keep in k]
