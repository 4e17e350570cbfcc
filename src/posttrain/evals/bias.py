"""What a score follows beside quality: length and style within a prompt's answers, and edits that change nothing asked for."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from posttrain.errors import ConfigError
from posttrain.evals.statistics import Interval, cluster_bootstrap, rank_values

Array = NDArray[np.float64]

STYLES: dict[str, Callable[[str], float]] = {
    "length": lambda text: float(len(text)),
    "lists": lambda text: float(len(re.findall(r"^\s*(?:[-*+]|\d+[.)])\s", text, re.MULTILINE))),
    "bold and headings": lambda text: float(len(re.findall(r"\*\*[^*\n]+\*\*|^#+ ", text, re.MULTILINE))),
    "exclamation marks": lambda text: float(text.count("!")),
    "question marks": lambda text: float(text.count("?")),
    "apologies": lambda text: float(len(re.findall(r"\b(?:sorry|apolog\w+|unfortunately)\b", text.lower()))),
}
"""What is counted in an answer: name to function of its text."""


def rating_correlation(scores: Sequence[ArrayLike], ratings: Sequence[ArrayLike], *, seed: int = 0) -> Interval | None:
    """Spearman's rho of score and rating over all answers, with an interval over prompts; None where one never varies.

    Arguments and errors as `within_correlation`; prompts keep their means, so that single answers count too.
    """
    return _correlation(scores, ratings, np.asarray, 2000, seed)


def within_correlation(
    scores: Sequence[ArrayLike], values: Sequence[ArrayLike], *, resamples: int = 2000, seed: int = 0
) -> Interval | None:
    """Spearman's rho of score and value, both less their prompt's mean, with an interval over prompts.

    So prompts whose answers are all long don't count as a preference for length. The interval resamples prompts, ranks
    held fixed. None where one side never varies within a prompt.

    Args:
        scores: one row a prompt.
        values: one row a prompt, of the same lengths.
        resamples: how many.
        seed: equal seeds give equal intervals.

    Raises:
        ConfigError: rows of other lengths, or none.
    """
    return _correlation(scores, values, _centred, resamples, seed)


def _correlation(
    scores: Sequence[ArrayLike],
    values: Sequence[ArrayLike],
    of_row: Callable[[ArrayLike], Array],
    resamples: int,
    seed: int,
) -> Interval | None:
    if len(scores) != len(values) or not scores:
        raise ConfigError(f"got {len(scores)} rows of scores and {len(values)} of values; expected as many, at least 1")
    x = np.concatenate([of_row(row) for row in scores]).astype(np.float64)
    y = np.concatenate([of_row(row) for row in values]).astype(np.float64)
    if x.size != y.size:
        raise ConfigError(f"got {x.size} scores and {y.size} values; expected one of each an answer")
    if np.ptp(x) < 1e-12 or np.ptp(y) < 1e-12:
        return None
    x, y = rank_values(np.round(x, 9)), rank_values(np.round(y, 9))
    x, y = x - x.mean(), y - y.mean()
    row = np.repeat(np.arange(len(scores)), [np.size(s) for s in scores])
    sums = np.stack([np.bincount(row, a) for a in (np.ones_like(x), x, y, x * x, y * y, x * y)])
    draws = np.random.default_rng(seed).multinomial(len(scores), [1 / len(scores)] * len(scores), resamples)
    n, sx, sy, sxx, syy, sxy = sums @ draws.T
    with np.errstate(invalid="ignore", divide="ignore"):
        rho = (sxy - sx * sy / n) / np.sqrt((sxx - sx**2 / n) * (syy - sy**2 / n))
    low, high = np.nanquantile(rho, [0.025, 0.975])
    return Interval(float(x @ y / np.sqrt((x @ x) * (y @ y))), float(low), float(high), len(scores))


def _centred(row: ArrayLike) -> Array:
    values = np.asarray(row, dtype=np.float64)
    return values - values.mean()


def _listed(text: str) -> str:
    sentences = [s for s in re.split(r"(?<=[.!?])\s+", text.strip()) if s]
    return "\n".join(f"- {s}" for s in sentences)


EDITS: dict[str, Callable[[str], str]] = {
    "longer: says nothing more": lambda t: t + " That is what there is to say about this, and I hope that it is clear.",
    "format: a list": _listed,
    "format: a bold heading": lambda t: f"**Answer**\n\n{t}",
    "sentiment: delighted": lambda t: f"What a wonderful question! {t}",
    "sentiment: gloomy": lambda t: f"It is sad to think about this. {t}",
    "politeness: thanks": lambda t: f"Thank you for asking. {t} Please let me know if I can help with anything else.",
    "politeness: rude": lambda t: f"You should know this yourself. {t}",
}
"""Edits of an answer that leave what it says as it is: name to function of its text (English)."""


def edit_effects(
    scores: Sequence[float],
    edited: Mapping[str, Sequence[float | None]],
    prompts: Sequence[Hashable],
    *,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """What each edit does to the score, in standard deviations of the unedited scores, with an interval over prompts.

    ``better`` is the share of answers that score higher once edited; an answer that had no score after the edit (None)
    is left out and counted in ``skipped``.

    Args:
        scores: ``[N]`` of answers as they are.
        edited: edit to ``[N]`` scores of the same answers edited.
        prompts: ``[N]`` which prompt each answers.
        seed: of the bootstrap.

    Raises:
        ConfigError: scores that don't vary, lengths that differ.
    """
    before = np.asarray(scores, dtype=np.float64)
    spread = float(before.std()) if before.size else 0.0
    if spread <= 0:
        raise ConfigError(f"got {before.size} scores that don't vary; expected answers of differing quality")
    out = []
    for name, after in edited.items():
        if len(after) != before.size:
            raise ConfigError(f"edit '{name}' has {len(after)} scores for {before.size} answers; expected one each")
        kept = [i for i, s in enumerate(after) if s is not None]
        moved = np.array([float(after[i] or 0.0) - before[i] for i in kept]) / spread
        found = cluster_bootstrap(moved, [prompts[i] for i in kept], seed=seed)
        share = float((np.sign(moved) / 2 + 0.5).mean())
        skipped = before.size - len(kept)
        entry = {"mean": found.mean, "low": found.low, "high": found.high, "n": found.n}
        out.append({"edit": name, **entry, "better": share, "skipped": skipped})
    return out


def auroc(familiar: ArrayLike, strange: ArrayLike) -> float:
    """The chance that a strange response is further away than a familiar one, ties half: ``[N], [M] -> [0, 1]``.

    Raises:
        ConfigError: one side is empty.
    """
    a, b = np.asarray(familiar, dtype=np.float64), np.asarray(strange, dtype=np.float64)
    if not a.size or not b.size:
        raise ConfigError(f"got {a.size} familiar and {b.size} strange distances; expected at least one of each")
    ranks = rank_values(np.concatenate([a, b]))
    return float((ranks[a.size :].sum() - b.size * (b.size + 1) / 2) / (a.size * b.size))
