"""One process for many short runs: a model loaded once, rows and the start's numbers kept, training by the library's own loop."""

from __future__ import annotations

import copy
import io
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from posttrain.data import read, stop_ids
from posttrain.data.collate import demonstration_rows, ranking_rows
from posttrain.data.smallworld import gold
from posttrain.forest import Row
from posttrain.losses import find_loss, listwise_losses, unpaired_losses, valued_losses
from posttrain.models.load import find_model, load_generation_config, load_policy, load_tokenizer, new_reward, role
from posttrain.models.lora import Lora
from posttrain.models.policy import Model
from posttrain.train.loop import Run, fit
from posttrain.train.objectives import objective_of
from posttrain.train.optim import Optim
from posttrain.train.reference import row_logp
from posttrain.train.sources import ranking_source, response_source, with_mismatched
from posttrain.types import Example
from posttrain.work.inputs import Start, choose_dtype
from posttrain.work.labelled import label_columns, standardised, unjudged
from posttrain.work.measure import Ranked, answers, divergence, on_rankings, ranked, row_sums
from posttrain.work.prefer import MARGIN, reference_role, score_columns, token_columns

TOKENS = 2048  # the memory knob: most packed tokens of one forward pass


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How one run is trained; the same for every loss of a table."""

    lr: float
    epochs: float
    per_step: int = 8
    warmup_steps: int = 4
    schedule: str = "constant"
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass
class Lab:
    """A model that is loaded once; every run begins with a copy of it. ``lora`` None trains the whole network."""

    model: str
    lora: Lora | None = None
    max_new_tokens: int = 40
    kept: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        found = find_model(self.model)
        self.start = Start(found.path, found.label, load_tokenizer(found.path))
        self.dtype = choose_dtype("auto", found.path)
        self.reference = load_policy(found.path, dtype=self.dtype)
        self.stop_ids = stop_ids(self.start.tokenizer, load_generation_config(found.path))

    def policy(self, seed: int) -> Model:
        """A trained role on a copy of the network."""
        return role(Model(copy.deepcopy(self.reference.net)), "policy", lora=self.lora, seed=seed)

    def logp(self, rows: Sequence[Row]) -> list[torch.Tensor]:
        """The start's log-probabilities of all tokens of the rows, computed once for the same tokens."""
        key = ("logp", hash(tuple((tuple(r.prompt), *(tuple(b.ids) for b in r.branches)) for r in rows)))
        if key not in self.kept:
            self.kept[key] = row_logp(self.reference, rows, max_tokens=TOKENS)
        return self.kept[key]

    def held(self, examples: Sequence[Example]) -> Ranked:
        """Held-out rankings with the start's numbers."""
        rows, report = ranking_rows(self.start.tokenizer, examples, max_length=1024, overlong="drop")
        ranks = [[r.rank or 0 for r in examples[i].responses] for i in report.index]
        return ranked(self.reference, rows, ranks, TOKENS)


def from_rows(rows: Sequence[Mapping[str, Any]]) -> list[Example]:
    """Rows of a data file as examples."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [replace(e, file="") for e in read(file)]


def scored(examples: Sequence[Example], scale: float) -> list[Example]:
    """Every response with its gold score times ``scale`` as the score: the reward that is declared here."""
    return [
        replace(
            e,
            responses=tuple(replace(r, score=scale * gold(e.prompt[-1].content, r.text).total) for r in e.responses),
        )
        for e in examples
    ]


def single(examples: Sequence[Example]) -> list[Example]:
    """The best and the worst answer of every row apart, as good and bad."""
    out = []
    for e in examples:
        order = sorted(e.responses, key=lambda r: r.rank or 0)
        for r, good in ((order[0], True), (order[-1], False)):
            out.append(replace(e, responses=(replace(r, rank=None, label=good, failure=None),)))
    return out


def each(examples: Sequence[Example]) -> list[Example]:
    """Every response apart."""
    return [replace(e, responses=(replace(r, rank=None, failure=None),)) for e in examples for r in e.responses]


def source_for(lab: Lab, loss: Any, examples: Sequence[Example], objective: Any, seed: int, setting: Setting) -> Any:
    """Batches as the stages make them: rankings, or single answers with labels or ratings."""
    tokenizer, kind = lab.start.tokenizer, find_loss(loss)
    if kind in (unpaired_losses, valued_losses):
        labelled = list(examples)
        rows, report = demonstration_rows(tokenizer, unjudged(labelled), max_length=1024, overlong="drop")
        labelled = [labelled[i] for i in report.index]
        if objective.facts.get("mismatched"):
            rows = with_mismatched(rows, max_length=1024, seed=seed)
        columns = (
            {"reward": [[r] for r in standardised(labelled)]}
            if kind is valued_losses
            else label_columns(rows, labelled)
        )
        return response_source(rows, columns, {"ref_logp": lab.logp(rows)}, per_step=2 * setting.per_step, seed=seed)
    rows, report = ranking_rows(tokenizer, examples, max_length=1024, overlong="drop")
    examples = [examples[i] for i in report.index]
    against = "reference" in objective.facts.get("needs", ("reference",))
    return ranking_source(
        rows,
        [[r.rank or 0 for r in e.responses] for e in examples],
        per_step=setting.per_step,
        seed=seed,
        ref_logp=lab.logp(rows) if against or kind is listwise_losses else None,
        columns=score_columns(objective, examples),
        tokens=token_columns(objective, lab.reference, rows, lab.start, TOKENS),
    )


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A policy, the metrics of every step, and the seconds of training (processor's and the clock's)."""

    policy: Model
    metrics: list[dict[str, float]]
    cpu: float
    clock: float


def train(
    lab: Lab,
    loss: str | Callable[..., Any],
    examples: Sequence[Example],
    *,
    seed: int,
    setting: Setting,
    options: Mapping[str, float] | None = None,
    on_step: Callable[[int, Model], None] | None = None,
) -> Trained:
    """One run by the library's own loop; ``on_step`` sees the policy after every step (count from 1)."""
    began, clock = time.process_time(), time.perf_counter()
    policy = lab.policy(seed)
    objective = objective_of(loss, options or {}, MARGIN[lab.dtype])
    source = source_for(lab, loss, examples, objective, seed, setting)
    models = {"policy": policy} | reference_role(objective, policy, lab.start, lab.dtype)
    if find_loss(loss) is valued_losses:
        models["value"] = new_reward(lab.start.path, dtype=lab.dtype, seed=seed + 1, lora=lab.lora)
    optim = Optim(
        lr=setting.lr,
        role_lr={"value": 10 * setting.lr} if "value" in models else {},
        schedule=setting.schedule,
        warmup_steps=setting.warmup_steps,
        betas=setting.betas,
    )
    metrics: list[dict[str, float]] = []

    def hook(step: int, found: Mapping[str, float]) -> None:
        metrics.append(dict(found))
        if on_step is not None:
            on_step(step + 1, policy)

    with tempfile.TemporaryDirectory() as folder:
        run = Run(
            directory=Path(folder),
            steps=round(setting.epochs * source.steps_per_epoch),
            max_tokens=TOKENS,
            save_every=10**9,
            console=Console(file=io.StringIO()),
        )
        fit(models, objective, source, optim=optim, run=run, hooks=[hook])
    return Trained(policy=policy, metrics=metrics, cpu=time.process_time() - began, clock=time.perf_counter() - clock)


def measured(lab: Lab, policy: Model, held: Ranked, *, seed: int, world: bool = True) -> dict[str, float]:
    """A policy's numbers: means over held-out rankings, and of one answer of its own to each of their prompts.

    ``world``: prompts are the small world's, whose gold scores of the answers are added.
    """
    sums = held.start if policy is lab.reference else row_sums(policy, held.rows, TOKENS)
    out = {name: sum(values) / len(values) for name, values in on_rankings(sums, held).items()}
    prompts = [row.prompt for row in held.rows]
    written = answers(policy, prompts, lab.stop_ids, seed=seed, max_new_tokens=lab.max_new_tokens)
    flat = [row[0] for row in written]
    out["kl"] = float(divergence(policy, lab.reference, written, TOKENS).mean())
    out["length"] = sum(len(r.ids) for r in flat) / len(flat)
    out["stopped"] = sum(r.stopped for r in flat) / len(flat)
    if world:
        texts = [lab.start.decode(r.ids) for r in flat]
        scores = [
            gold(lab.start.tokenizer.decode(p, skip_special_tokens=True).strip(), t)
            for p, t in zip(prompts, texts, strict=True)
        ]
        for name in ("total", "helpfulness", "harm", "format"):
            out[f"gold_{name}"] = sum(getattr(s, name) for s in scores) / len(scores)
    return out


# ---------------------------------------------------------------------------- results


def append(file: Path, row: Mapping[str, Any]) -> None:
    """Add a finished run as one line, forced to disk: what is there when the process is killed is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as out:
        out.write(json.dumps(row) + "\n")
        out.flush()
        os.fsync(out.fileno())


def finished(file: Path) -> list[dict[str, Any]]:
    """The runs there are; a last line cut off is left out."""
    if not file.exists():
        return []
    rows = []
    for line in file.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def peak_memory() -> float:
    """The largest resident size of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
