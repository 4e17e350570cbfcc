"""Training a reward model of any kind: its rows and columns, its network and objective, and the directory it writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from posttrain.data.collate import Report, ranking_rows, response_rows
from posttrain.data.judged_rows import (
    BOTH,
    DOMAINS,
    QUESTION,
    VERDICTS,
    asked,
    attribute_names,
    attribute_ratings,
    compared_pairs,
    conditioned,
    mark_steps,
    step_chances,
    steps_of,
    wanted_verdicts,
)
from posttrain.data.views import fault, rankings, steps
from posttrain.errors import ConfigError
from posttrain.forest import Row
from posttrain.losses.reward_pairs import reward_losses
from posttrain.models.load import load_policy, load_reward, new_reward, save_merged
from posttrain.models.policy import Model
from posttrain.models.scores import Gate
from posttrain.rewards.kinds import Kind, find_kind
from posttrain.rewards.trained import Scorer, require_record
from posttrain.stages import Context, TrainScorer
from posttrain.train.checkpoint import write_json
from posttrain.train.loop import fit
from posttrain.train.objectives import (
    AttributeReward,
    GatedReward,
    ListedReward,
    RankedReward,
    StepReward,
    VerdictReward,
)
from posttrain.train.sources import response_source
from posttrain.types import Example
from posttrain.work.inputs import Start, choose_dtype, load_examples, row_weights, start_from
from posttrain.work.reward import slice_rows
from posttrain.work.supervised import adapters, optimiser, training_run

GATE = {"hidden": 128, "temperature": 10.0}


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a kind trains on: rows, numbers of responses and of tokens, rows' examples, and what ``reward.json`` says of it."""

    rows: list[Row]
    report: Report
    examples: list[Example]
    columns: dict[str, list[list[Any]]] = field(default_factory=dict[str, list[list[Any]]])
    tokens: dict[str, list[torch.Tensor]] = field(default_factory=dict[str, list[torch.Tensor]])
    record: dict[str, Any] = field(default_factory=dict[str, Any])


def run(stage: TrainScorer, ctx: Context) -> None:
    """Train, measure the mean score of demonstrations, and write the model with its record."""
    model, start, record = trained(stage, ctx)
    write_scorer(model, start, ctx.dir, record)


def trained(stage: TrainScorer, ctx: Context) -> tuple[Model, Start, dict[str, Any]]:
    """The model, what it started from, and what ``reward.json`` is to say of it."""
    kind = find_kind(stage.kind)
    start = start_from(stage.model, ctx)
    examples = slice_rows(load_examples(stage, ctx, data_part(stage, ctx, kind)), stage.rows)
    ready = PREPARE[kind.form](stage, start, examples)
    ctx.console.print(f"{stage.kind}: {ready.report}", highlight=False)
    model = start_model(stage, ctx, start, ready, kind)
    source = response_source(
        ready.rows,
        ready.columns,
        ready.tokens,
        per_step=stage.prompts_per_step,
        seed=ctx.seed + stage.head_seed,
        weights=row_weights(ready.examples, ctx),
    )
    role = "policy" if kind.form == "verdicts" else "reward"
    run = training_run(stage, ctx, round(stage.epochs * source.steps_per_epoch), ctx.dir.name)
    fit({role: model}, objective_for(stage, kind), source, optim=optimiser(stage), run=run)
    record = {
        "kind": stage.kind,
        "form": kind.form,
        "sign": kind.sign,
        "aggregation": aggregation_of(stage, kind),
        "outputs": [],
        "rows": len(ready.rows),
        **ready.record,
    }
    return model, start, record | reference_mean(stage, ctx, start, model, record)


def write_scorer(model: Model, start: Start, directory: Path, record: dict[str, Any]) -> None:
    """Write a plain model directory, the gate if there is one, and ``reward.json``."""
    save_merged(model, start.path, directory, start.tokenizer)
    if model.gate is not None:
        save_file(
            {k: v.detach().contiguous() for k, v in model.gate.state_dict().items()}, directory / "gate.safetensors"
        )
    write_json(directory / "reward.json", record)


def aggregation_of(stage: TrainScorer, kind: Kind) -> str:
    """How outputs become one score, in a word."""
    named = {"attributes": "weighted sum", "gated": "gated sum", "pairs": "mean probability to be preferred"}
    return {"steps": stage.aggregation, "verdicts": "expected verdict"}.get(kind.form) or named.get(kind.form, "score")


def data_part(stage: TrainScorer, ctx: Context, kind: Kind) -> str:
    """The part of the data that a kind reads: rankings, or of what there is the first that can be rated answers."""
    if kind.data.startswith(("ranks", "pairs")):
        return "rankings"
    from posttrain.work.inputs import data_files

    parts = data_files(stage.data, None) if isinstance(stage.data, str) else {}
    return next((p for p in ("labelled", "rankings", "demonstrations") if p in parts), "rankings")


def objective_for(stage: TrainScorer, kind: Kind) -> Any:
    """What the kind minimises."""
    if stage.kind == "plackett_luce":
        return ListedReward()
    if kind.loss:
        loss = stage.loss or kind.loss
        return RankedReward(loss, {**kind.options, **stage.options}, stage.centre)
    return {"attributes": AttributeReward, "steps": StepReward, "verdicts": VerdictReward, "gated": GatedReward}[
        kind.form
    ]()


def start_model(stage: TrainScorer, ctx: Context, start: Start, ready: Prepared, kind: Kind) -> Model:
    """The network that is trained: a language model for verdicts, a new gate on a trained attribute model, else a new head."""
    dtype, seed, lora = choose_dtype(stage.dtype, start.path), ctx.seed + stage.head_seed, adapters(stage)
    if kind.form == "verdicts":
        return load_policy(start.path, dtype=dtype, lora=lora, train=True, seed=seed)
    outputs = ready.record.get("outputs", [])
    if kind.form == "gated":
        model = load_reward(start.path, dtype=dtype, outputs=len(outputs), form="attributes")
        assert model.scalar is not None
        gate = Gate(model.scalar.in_features, len(outputs), seed=seed, **GATE)
        return replace(model, gate=gate, trained=True, head_only=True)
    return new_reward(start.path, dtype=dtype, lora=lora, seed=seed, outputs=max(1, len(outputs)))


def reference_mean(
    stage: TrainScorer, ctx: Context, start: Start, model: Model, record: dict[str, Any]
) -> dict[str, Any]:
    """The mean score of demonstrations (64 at most), which is subtracted from then on; 0 for chances and probabilities."""
    if record["form"] in ("steps", "pairs", "verdicts", "domains") or record["sign"] < 0:
        return {"mean": 0.0, "reference": "none: scores have a zero of their own"}
    try:
        examples = load_examples(stage, ctx, "demonstrations")[:64]
    except ValueError:
        return {"mean": 0.0, "reference": "none: no demonstrations"}
    scorer = Scorer(model, start.tokenizer, {**record, "mean": 0.0}, stage.max_tokens)
    values = [x for row in scorer.values(examples) for x in row]
    return {"mean": sum(values) / len(values), "reference": "demonstrations"}


# ---------------------------------------------------------------------------- rows of each form


def _ranked(stage: TrainScorer, start: Start, examples: list[Example]) -> Prepared:
    """Ranked responses with the columns that the loss reads."""
    rows, report = ranking_rows(start.tokenizer, examples, max_length=stage.max_length, overlong=stage.overlong)
    kept = [examples[i] for i in report.index]
    kind = find_kind(stage.kind)
    name = stage.loss or kind.loss
    wanted = reward_losses.facts(name).get("reads", ()) if name else ()
    columns: dict[str, list[list[Any]]] = {"rank": [[r.rank or 0 for r in e.responses] for e in kept]}
    columns |= {column: COLUMNS[column](kept) for column in wanted}
    return Prepared(rows=rows, report=report, examples=kept, columns=columns)


def _ratings(examples: Sequence[Example]) -> list[list[float]]:
    for i, e in enumerate(examples):
        if any(r.score is None for r in e.responses):
            raise fault(e, i, "score", "a response has none, which this loss reads", "rate it or take another kind")
    return [[float(r.score or 0.0) for r in e.responses] for e in examples]


def _sureness(examples: Sequence[Example]) -> list[list[float]]:
    """The probability that a pair's order is right: of a comparison 'better' in its meta, else 1."""
    return [[float(e.meta.get("better", 1.0))] * len(e.responses) for e in examples]


def _harm(examples: Sequence[Example]) -> list[list[float]]:
    """1 for an unsafe response: the attribute 'safe' is 0, or the label false."""
    out: list[list[float]] = []
    for i, e in enumerate(examples):
        safe = [r.attributes.get("safe", None if r.label is None else float(r.label)) for r in e.responses]
        if None in safe:
            raise fault(e, i, "attributes.safe", "a response is neither safe nor unsafe", "give 'safe' as 1 or 0")
        out.append([1.0 - float(x or 0.0) for x in safe])
    return out


COLUMNS = {"rating": _ratings, "better": _sureness, "unsafe": _harm}


def _by_domain(stage: TrainScorer, start: Start, examples: list[Example]) -> Prepared:
    domains = dict(stage.domains) or DOMAINS
    ready = _ranked(stage, start, conditioned(rankings(examples), domains))
    return replace(ready, record={"domains": domains})


def _attributes(stage: TrainScorer, start: Start, examples: list[Example]) -> Prepared:
    names = stage.attributes or attribute_names(examples)
    weights = list(stage.attribute_weights) or [1.0 / len(names)] * len(names)
    if len(weights) != len(names):
        raise ConfigError(f"got {len(weights)} weights for the attributes {', '.join(names)}; expected one each")
    rows, report = response_rows(start.tokenizer, examples, max_length=stage.max_length, overlong=stage.overlong)
    kept = [examples[i] for i in report.index]
    ratings = attribute_ratings(kept, names)  # NaN where there is none, which no batch may hold
    each = lambda say: [[[say(x) for x in response] for response in row] for row in ratings]  # noqa: E731
    columns = {"attributes": each(lambda x: 0.0 if x != x else x), "rated": each(lambda x: float(x == x))}
    record = {"outputs": list(names), "weights": weights}
    return Prepared(rows=rows, report=report, examples=kept, columns=columns, record=record)


def _steps(stage: TrainScorer, start: Start, examples: list[Example]) -> Prepared:
    checked = steps(examples)
    made, report = response_rows(start.tokenizer, checked, max_length=stage.max_length, overlong=stage.overlong)
    kept = [checked[i] for i in report.index]
    solutions = [[steps_of(e.responses[0], stage.separator)] for e in kept]
    rows, places = mark_steps(start.tokenizer, made, solutions)
    good: list[torch.Tensor] = []
    labelled: list[Row] = []
    for row, example, (ends,) in zip(rows, kept, places, strict=True):
        (branch,) = row.branches
        chances, mask = torch.zeros(len(branch.ids), dtype=torch.float64), [False] * len(branch.ids)
        for end, chance in zip(ends, step_chances(example.responses[0]), strict=True):
            if end is not None and chance is not None:
                chances[end], mask[end] = chance, True
        good.append(chances)
        labelled.append(Row(row.prompt, [branch._replace(masks={**branch.masks, "step": mask})]))
    record = {"separator": stage.separator}
    return Prepared(rows=labelled, report=report, examples=kept, tokens={"good": good}, record=record)


def _pairs(stage: TrainScorer, start: Start, examples: list[Example]) -> Prepared:
    ready = _ranked(stage, start, compared_pairs(examples))
    return replace(ready, record={"template": BOTH})


def _verdicts(stage: TrainScorer, start: Start, examples: list[Example]) -> Prepared:
    words = dict(stage.verdicts) or VERDICTS
    flat = [(e, i, r) for i, e in enumerate(examples) for r in e.responses]
    wanted = [wanted_verdicts(e, i, r, list(words.values())) for e, i, r in flat]
    questions = [asked(e, r, stage.question or QUESTION, list(words)) for e, _, r in flat]
    rows, report = response_rows(start.tokenizer, questions, max_length=stage.max_length, overlong=stage.overlong)
    return Prepared(
        rows=rows,
        report=report,
        examples=[questions[i] for i in report.index],
        columns={"wanted": [wanted[i] for i in report.index]},
        record={"question": stage.question or QUESTION, "verdicts": words},
    )


def _gated(stage: TrainScorer, start: Start, examples: list[Example]) -> Prepared:
    record = require_record(Path(start.path), "attributes")
    ready = _ranked(stage, start, examples)
    return replace(ready, record={"outputs": record["outputs"], "gate": GATE})


PREPARE = {
    "responses": _ranked,
    "domains": _by_domain,
    "attributes": _attributes,
    "steps": _steps,
    "pairs": _pairs,
    "verdicts": _verdicts,
    "gated": _gated,
}
