"""Everything measured of a reward model on held-out rankings, from its scores: one mapping of plain numbers a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from posttrain.errors import ConfigError
from posttrain.evals.bias import STYLES, auroc, within_correlation
from posttrain.evals.calibration import calibration_error, fit_temperature, negative_log_likelihood, pair_bins
from posttrain.evals.overoptimisation import curve, fit_best_of_n_law
from posttrain.evals.reward import PairOutcome, accuracy, pair_outcomes, ranking_ranks
from posttrain.evals.reward_bench import section_scores, style_matrix, style_summary, styled_rows
from posttrain.evals.statistics import Interval
from posttrain.types import Example

Rows = Sequence[Sequence[float]]


def reward_results(
    examples: Sequence[Example], subsets: Sequence[str], scores: Rows, members: Sequence[Rows] = ()
) -> dict[str, Any]:
    """Measure one model.

    Args:
        examples: rankings; answers of differing rank make pairs.
        subsets: which part of the test data each belongs to.
        scores: one row a ranking.
        members: the same of each member of an ensemble.

    Returns:
        ``accuracy`` by subset and over all, ``sections`` of RewardBench where their subsets are there, ``styles`` (RM-Bench's
        matrix), ``calibration``, ``correlations`` with length and style, and ``disagreement`` of an ensemble.

    Raises:
        ConfigError: no pairs, or rows that don't match.
    """
    if not len(examples) == len(subsets) == len(scores):
        raise ConfigError(f"got {len(examples)} rankings, {len(subsets)} subsets, {len(scores)} rows; expected as many")
    ranks = ranking_ranks(examples)
    outcomes = pair_outcomes(scores, ranks)
    by_subset = {name: [o for o in outcomes if subsets[o.ranking] == name] for name in dict.fromkeys(subsets)}
    found: dict[str, Any] = {
        "accuracy": {name: _accuracy(some) for name, some in {"all": outcomes, **by_subset}.items() if some},
        "calibration": calibration(examples, outcomes, scores),
        "correlations": correlations(examples, scores),
    }
    shares = {name: entry["accuracy"] for name, entry in found["accuracy"].items()}
    if sections := section_scores(shares):
        found["sections"] = sections
    if styles := style_results(examples, subsets, scores):
        found["styles"] = styles
    if len(members) > 1:
        found["disagreement"] = disagreement_results(outcomes, members)
    return found


def _accuracy(outcomes: Sequence[PairOutcome]) -> dict[str, Any]:
    found = accuracy(outcomes)
    return {"accuracy": found.mean, **_bounds(found), "pairs": len(outcomes), "rankings": found.n}


def _bounds(found: Interval) -> dict[str, float | None]:
    finite = np.isfinite([found.low, found.high]).all()
    return {"low": found.low if finite else None, "high": found.high if finite else None}


def gaps_of(outcomes: Sequence[PairOutcome], scores: Rows) -> np.ndarray:
    """``[P]`` score of the better answer less that of the worse one."""
    return np.array([scores[o.ranking][o.better] - scores[o.ranking][o.worse] for o in outcomes])


def calibration(examples: Sequence[Example], outcomes: Sequence[PairOutcome], scores: Rows) -> dict[str, Any] | None:
    """Temperature, calibration error and likelihood; None where one half of the prompts has no pairs.

    The temperature is fitted on the half of the prompts whose hash is even and everything else is measured on the others.
    """
    gaps = gaps_of(outcomes, scores)
    even = np.array([int(examples[o.ranking].prompt_key, 16) % 2 == 0 for o in outcomes], dtype=bool)
    if not even.any() or even.all():
        return None
    temperature, held = fit_temperature(gaps[even]), gaps[~even]
    found: dict[str, Any] = {"temperature": temperature, "fitted_on": int(even.sum()), "pairs": len(held)}
    for name, t in (("before", 1.0), ("after", temperature)):
        bins = pair_bins(held, t)
        found[name] = {
            "ece": calibration_error(bins),
            "nll": negative_log_likelihood(held, t),
            "bins": [[b.confidence, b.right, b.count] for b in bins],
        }
    return found


def correlations(examples: Sequence[Example], scores: Rows) -> dict[str, Any]:
    """Within-prompt correlation of the score with each count of style that varies."""
    found: dict[str, Any] = {}
    for name, count in STYLES.items():
        rho = within_correlation(scores, [[count(r.text) for r in e.responses] for e in examples])
        if rho is not None:
            found[name] = {"mean": rho.mean, "low": rho.low, "high": rho.high, "n": rho.n}
    return found


def style_results(examples: Sequence[Example], subsets: Sequence[str], scores: Rows) -> dict[str, Any]:
    """RM-Bench's matrix and its summary for each subset that has styles, and their mean over subsets under ``all``."""
    found: dict[str, Any] = {}
    styled = styled_rows(examples)
    for name in dict.fromkeys(subsets[i] for i in styled):
        rows = [i for i in styled if subsets[i] == name]
        sides = [
            [[s for s, r in zip(scores[i], examples[i].responses, strict=True) if r.rank == rank] for i in rows]
            for rank in (0, 1)
        ]
        matrix = style_matrix(*sides)
        found[name] = {"matrix": matrix.tolist(), **style_summary(matrix), "rows": len(rows)}
    if len(found) > 1:
        matrix = np.mean([entry["matrix"] for entry in found.values()], axis=0)
        found["all"] = {"matrix": matrix.tolist(), **style_summary(matrix), "rows": len(styled)}
    return found


def disagreement_results(outcomes: Sequence[PairOutcome], members: Sequence[Rows]) -> dict[str, float]:
    """How far members disagree on a pair's gap, and whether more of it means that the ensemble is wrong (AUROC)."""
    spread = np.std([gaps_of(outcomes, scores) for scores in members], axis=0)
    right = np.array([o.correct for o in outcomes])
    same = np.mean([np.sign(gaps_of(outcomes, scores)) for scores in members], axis=0)
    found = {"gap_deviation": float(spread.mean()), "unanimous": float((np.abs(same) == 1).mean())}
    if (right == 1).any() and (right == 0).any():
        found["auroc_wrong"] = auroc(spread[right == 1], spread[right == 0])
    return found


def best_of_n_results(proxy: Rows, gold: Rows, *, most: int | None = None) -> dict[str, Any]:
    """The best-of-n curve over powers of two, and the law fitted to gold's gain over one sample."""
    samples = len(proxy[0])
    top = min(most or samples, samples)
    counts = sorted({*(1 << k for k in range(top.bit_length()) if 1 << k <= top), top})
    rows = curve(proxy, gold, counts)
    found: dict[str, Any] = {"curve": rows, "prompts": len(proxy), "samples": samples}
    found["limit"] = float(np.mean([np.max(row) for row in gold]))
    if len(counts) > 2:
        law = fit_best_of_n_law([r["kl"] for r in rows], [r["gold"] - rows[0]["gold"] for r in rows])
        peak = law.peak if np.isfinite(law.peak) else None
        found["law"] = {"alpha": law.alpha, "beta": law.beta, "error": law.error, "peak": peak}
    return found


def complete(
    examples: Sequence[Example], columns: Mapping[str, Sequence[Sequence[float | None]]]
) -> tuple[list[int], int]:
    """Positions of the examples all of whose answers every model scored, and how many others there are."""
    kept = [i for i in range(len(examples)) if all(None not in rows[i] for rows in columns.values())]
    return kept, len(examples) - len(kept)
