"""``posttrain eval reward``: read test files, score them with every model and with baselines, measure, and write it all down."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.data.load import ReadReport, read
from posttrain.data.opened import stem
from posttrain.data.views import rankings, scored_as_rankings
from posttrain.errors import ConfigError, DataError
from posttrain.evals.bias import EDITS, auroc, edit_effects, rating_correlation
from posttrain.evals.results import write_results
from posttrain.evals.reward import bag_of_words_scores, length_scores, ranking_texts
from posttrain.evals.reward_eval import best_of_n_results, complete, reward_results
from posttrain.evals.reward_page import write_page
from posttrain.rewards.outlier import distance, fit_familiar
from posttrain.rewards.panel import Panel, Scored
from posttrain.rollout.engine import uniforms
from posttrain.types import Example, Message, Response

_FAMILIAR = 64  # rankings whose answers' distance is taken

Say = Callable[[str, int, int], None]
"""Hears what is being scored, how many answers are done, and of how many."""


@dataclass
class TestData:
    """Held-out rankings, the part of the data each belongs to, single answers with a rating, and what was left out."""

    __test__ = False  # no test, whatever its name

    examples: list[Example] = field(default_factory=list[Example])
    subsets: list[str] = field(default_factory=list[str])
    rated: list[Example] = field(default_factory=list[Example])
    notes: list[str] = field(default_factory=list[str])


def read_tests(files: Sequence[str], *, limit: int | None = None, skip_bad: int = 0) -> TestData:
    """Read rankings, pairs, and answers with a score; a subset is the rows' ``kind``, where they have one, else the file.

    Answers to one prompt in rows of their own are ranked by score. Where a prompt has one answer only, it counts for the
    correlation with ratings.

    Raises:
        DataError: a file without anything to compare or correlate.
    """
    found = TestData()
    for file in files:
        report = ReadReport()
        examples = read(file, limit=limit, skip_bad=skip_bad, report=report)
        ranked, left_out = comparable(examples)
        name = stem(Path(file))
        rated = [replace(e, kind=e.kind or name) for e in examples if _rated(e)]
        if not ranked and not rated:
            raise DataError(f"{file}: no two answers to one prompt of which one is better, and no ratings ({report})")
        found.rated += rated
        found.examples += ranked
        found.subsets += [e.kind or name for e in ranked]
        if left_out or report.useless or report.bad:
            said = [f"{n} {why}" for why, n in left_out.items()]
            found.notes.append("; ".join([f"{name}: {report}", *said]))
    return found


def _rated(example: Example) -> bool:
    return len(example.responses) == 1 and example.responses[0].score is not None


def comparable(examples: Sequence[Example]) -> tuple[list[Example], Counter[str]]:
    """The examples as rankings: as ranked, else by score; single rated answers to one prompt together."""
    grouped: dict[str, Example] = {}
    single = [e for e in examples if len(e.responses) == 1]
    for example in single:
        key = example.prompt_key
        first = grouped.get(key)
        joined = (*first.responses, *example.responses) if first else example.responses
        grouped[key] = replace(first or example, responses=joined)
    left_out: Counter[str] = Counter()
    found: list[Example] = []
    for example in [*(e for e in examples if len(e.responses) > 1), *grouped.values()]:
        if len(example.responses) < 2:
            left_out["prompts with one answer"] += 1
        elif all(r.rank is not None for r in example.responses):
            tied = len({r.rank for r in example.responses}) < 2
            left_out["rows all tied"] += tied
            found += [] if tied else rankings([example])
        elif all(r.score is not None for r in example.responses):
            kept = scored_as_rankings([example])
            left_out["rows all tied"] += kept.ties
            found += kept.examples
        else:
            left_out["rows without ranks or scores"] += 1
    return found, +left_out


def evaluate(
    panels: Sequence[Panel],
    tests: TestData,
    out: Path,
    *,
    train: Sequence[Example] = (),
    best_of: Sequence[Example] = (),
    edits: int = 0,
    say: Say = lambda what, done, total: None,
) -> dict[str, Any]:
    """Score and measure; writes ``results.json`` and ``report.html`` into ``out`` and returns the results.

    Args:
        panels: the models; labels are made unique.
        tests: from `read_tests`.
        out: a directory.
        train: rankings that the bag of words is fitted to, and whose answers are familiar to the models (else half the tests).
        best_of: prompts with many answers each, whose ``score`` is gold.
        edits: how many of the best-ranked answers are edited, at most; English.
        say: hears of progress.
    """
    labels = unique([p.label for p in panels])
    scored = {label: _scored(panel, tests.examples, label, say) for label, panel in zip(labels, panels, strict=True)}
    kept, incomplete = complete(tests.examples, {n: [s.scores for s in rows] for n, rows in scored.items()})
    if not kept:
        raise ConfigError("no ranking of which every answer could be scored; raise --max-length")
    examples = [tests.examples[i] for i in kept]
    subsets = [tests.subsets[i] for i in kept]
    models: dict[str, Any] = {}
    for label, panel in zip(labels, panels, strict=True):
        rows = [scored[label][i] for i in kept]
        told = log_odds if panel.members[0].record["form"] == "pairs" else known
        members = [[told(s.members[k]) for s in rows] for k in range(len(panel.members))]
        models[label] = reward_results(examples, subsets, [told(s.scores) for s in rows], members)
        models[label] |= _more(panel, label, examples, tests.rated, train, best_of, edits, say)
    ratings = baseline_rows(tests.rated, train) if tests.rated else {}
    for name, scores in baseline_rows(examples, train).items():
        models[name] = reward_results(examples, subsets, scores) | {"baseline": True}
        if name in ratings:
            models[name]["ratings"] = rating_results([Scored(list(s), [], []) for s in ratings[name]], tests.rated)
    notes = [
        *tests.notes,
        *([f"{incomplete} rankings with an answer too long to score were left out"] if incomplete else []),
    ]
    facts = {
        "models": ", ".join(labels),
        "test data": ", ".join(f"{name} ({n})" for name, n in Counter(subsets).items()),
        "rankings": str(len(examples)),
    }
    results = finite({"facts": facts, "models": models, "notes": notes})
    out.mkdir(parents=True, exist_ok=True)
    write_results(results, out / "results.json")
    write_page(results, out / "report.html")
    return results


def _more(
    panel: Panel,
    label: str,
    examples: Sequence[Example],
    rated: Sequence[Example],
    train: Sequence[Example],
    best_of: Sequence[Example],
    edits: int,
    say: Say,
) -> dict[str, Any]:
    """What needs other texts scored than the rankings."""
    found: dict[str, Any] = {}
    if _reads_answers(panel):
        found["outliers"] = outlier_results(panel, examples, train)
    if edits:
        found["edits"] = edit_results(panel, examples[:edits])
    if rated:
        found["ratings"] = rating_results(_scored(panel, rated, f"{label}: ratings", say), rated)
    gold = [e for e in best_of if len(e.responses) > 1]
    if gold:
        found["best_of_n"] = best_of_results(_scored(panel, gold, f"{label}: best of n", say), gold)
    return found


def _scored(panel: Panel, examples: Sequence[Example], what: str, say: Say) -> list[Scored]:
    """Scores, a few examples at a time, so that progress can be seen and memory stays small."""
    found: list[Scored] = []
    for start in range(0, len(examples), 32):
        found += panel.score(examples[start : start + 32])
        say(what, len(found), len(examples))
    return found


def known(scores: Sequence[float | None]) -> list[float]:
    """Scores that are all there."""
    return [s for s in scores if s is not None]


def log_odds(chances: Sequence[float | None]) -> list[float]:
    """Half the log-odds of probabilities to be preferred: of two answers, which add up to 1, the gap is the pair's log-odds."""
    near = [min(max(p, 1e-12), 1 - 1e-12) for p in known(chances)]
    return [math.log(p / (1 - p)) / 2 for p in near]


def _reads_answers(panel: Panel) -> bool:
    return panel.members[0].record["form"] in ("responses", "domains", "attributes", "gated")


def baseline_rows(examples: Sequence[Example], train: Sequence[Example]) -> dict[str, list[list[float]]]:
    """Longer is better, and, where there is training data, a bag of words fitted to it."""
    found = {"length (longer is better)": length_scores(ranking_texts(examples))}
    return found | ({"bag of words": bag_of_words_scores(rankings(train), examples)} if train else {})


def outlier_results(panel: Panel, examples: Sequence[Example], train: Sequence[Example]) -> dict[str, float]:
    """Whether distance tells an answer from its own words shuffled, and how many answers lie beyond the threshold.

    What is familiar is the answers of ``train``, else those of every second test ranking; 64 rankings at most on each side.
    """
    tested = (list(examples) if train else list(examples[1::2]))[:_FAMILIAR]
    known_rows = list(train[:_FAMILIAR]) if train else list(examples[::2])[:_FAMILIAR]
    flat = np.concatenate(panel.features(known_rows))
    if len(flat) < 8 or not tested:
        return {}
    familiar = fit_familiar(flat)
    inside = np.concatenate([distance(familiar, row) for row in panel.features(tested) if len(row)])
    mixed = [replace(e, responses=tuple(shuffled(r, i) for r in e.responses)) for i, e in enumerate(tested)]
    outside = np.concatenate([distance(familiar, row) for row in panel.features(mixed) if len(row)])
    return {"auroc_shuffled": auroc(inside, outside), "beyond": float((inside > familiar.threshold).mean())}


def shuffled(response: Response, key: int) -> Response:
    """The response with its words in another order."""
    words = response.text.split()
    order = np.argsort(uniforms(("shuffled words", key, response.text), max(1, len(words))))
    text = " ".join(words[i] for i in order) if words else response.text
    return replace(response, messages=(Message(role="assistant", content=text),))


def rating_results(scored: Sequence[Scored], rated: Sequence[Example]) -> dict[str, Any]:
    """Spearman's rho of score and rating, by subset, of single answers that have both."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(e.kind for e in rated):
        rows = [(s.scores[0], e.responses[0].score) for s, e in zip(scored, rated, strict=True) if e.kind == name]
        both = [(s, r) for s, r in rows if s is not None and r is not None]
        rho = rating_correlation([[s] for s, _ in both], [[r] for _, r in both]) if both else None
        if rho is not None:
            found[name] = {
                "mean": rho.mean,
                "low": rho.low,
                "high": rho.high,
                "n": rho.n,
                "skipped": len(rows) - len(both),
            }
    return found


def edit_results(panel: Panel, examples: Sequence[Example]) -> list[dict[str, Any]]:
    """What each of `posttrain.evals.bias.EDITS` does to the score of the best-ranked answers."""
    best = [replace(e, responses=(min(e.responses, key=lambda r: r.rank or 0),)) for e in examples]
    before = [s.scores[0] for s in panel.score(best)]
    kept = [i for i, s in enumerate(before) if s is not None]
    after: dict[str, list[float | None]] = {}
    for name, edit in EDITS.items():
        said = lambda e, edit=edit: (Message(role="assistant", content=edit(e.responses[0].text)),)  # noqa: E731
        changed = [replace(e, responses=(replace(e.responses[0], messages=said(e)),)) for e in best]
        scores = panel.score(changed)
        after[name] = [scores[i].scores[0] for i in kept]
    return edit_effects([s for s in before if s is not None], after, [best[i].prompt_key for i in kept])


def best_of_results(scored: Sequence[Scored], gold: Sequence[Example]) -> dict[str, Any]:
    """The best-of-n curve over prompts whose answers all have scores; each has the same number of them.

    Raises:
        ConfigError: none is complete, or they differ in their number of answers.
    """
    rows = [
        (known(s.scores), known([r.score for r in e.responses]))
        for s, e in zip(scored, gold, strict=True)
        if None not in s.scores
    ]
    sizes = {(len(p), len(g)) for p, g in rows}
    if len(sizes) != 1 or len(set(next(iter(sizes)))) != 1:
        raise ConfigError(
            f"best of n: {len(rows)} prompts with {sorted(sizes)} (scores, golds); expected as many of each everywhere"
        )
    found = best_of_n_results([p for p, _ in rows], [g for _, g in rows])
    return found | {"left_out": len(gold) - len(rows)}


def finite(value: Any) -> Any:
    """A copy of results in which a bound that is not finite (of a single prompt, say) is None, as JSON has no infinity."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def unique(labels: Sequence[str]) -> list[str]:
    """Labels, those that stand twice with their place."""
    return [x if labels.count(x) == 1 else f"{x} ({i})" for i, x in enumerate(labels, 1)]
