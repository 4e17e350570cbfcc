"""Checked views of examples: demonstrations, rankings, prompts; and what rankings say about length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from posttrain.errors import DataError
from posttrain.types import Example, Response


def fault(example: Example, position: int, field: str, problem: str, remedy: str) -> DataError:
    """Return the standard error for an example; one made in memory is named by its position (from 0)."""
    if example.file:
        return DataError.at(example.file, example.row, field, problem, remedy)
    return DataError(f"example {position} (from 0), field '{field}': {problem}; {remedy}")


def demonstrations(examples: Sequence[Example]) -> list[Example]:
    """Return one example each with one response to imitate; of ranked responses, the best.

    Raises:
        DataError: an example without response, with a labelled failure as its best, or without a single best.
    """
    return [replace(e, responses=(_best(e, i),)) for i, e in enumerate(_prompted(examples))]


def rankings(examples: Sequence[Example]) -> list[Example]:
    """Return examples with at least 2 ranked responses that aren't all tied, unchanged.

    Raises:
        DataError: fewer responses, a missing rank, all ranks equal.
    """
    for i, example in enumerate(_prompted(examples)):
        ranks = [r.rank for r in example.responses]
        if len(ranks) < 2:
            found = f"found {len(ranks)} responses, expected at least 2"
            raise fault(example, i, "responses", found, "give 'chosen' and 'rejected', or 'completions'")
        if None in ranks:
            raise fault(example, i, "responses", f"response {ranks.index(None)} has no rank", "rank it")
        if len(set(ranks)) < 2:
            raise fault(example, i, "responses", "all responses are tied", "remove the row, it orders nothing")
    return list(examples)


def prompts(examples: Sequence[Example]) -> list[Example]:
    """Return the examples without their responses; every one is kept, in order, repeats included.

    Raises:
        DataError: an example without prompt, or whose prompt ends in an assistant turn.
    """
    return [replace(e, responses=()) for e in _prompted(examples)]


@dataclass(frozen=True, kw_only=True)
class LabelCorrelation:
    """How far better rank goes with more words, over all pairs of responses to one prompt.

    Attributes:
        tau: Kendall's tau-b of better rank and word count, -1 to 1; nan where ranks or lengths never differ.
        pairs: pairs of responses with different ranks.
        longer_better: share of those where the better response has more words; a tie in words counts half.
        words_best, words_worst: mean words of best- and of worst-ranked responses.
    """

    tau: float
    pairs: int
    longer_better: float
    words_best: float
    words_worst: float


def label_correlation(examples: Sequence[Example]) -> LabelCorrelation:
    """Return rank-length statistics, pooled within rankings (responses to different prompts aren't compared).

    tau_b = (C - D) / sqrt(pairs with different ranks x pairs with different lengths), with C the pairs whose
    better response is the longer, D those whose better is the shorter (Kendall 1945, "The treatment of ties
    in ranking problems"). Length is in words split at white space.

    Raises:
        DataError: as `rankings`; no examples.
    """
    concordant = discordant = ranked = sized = 0
    best: list[int] = []
    worst: list[int] = []
    for example in rankings(examples):
        items = [(r.rank or 0, len(r.text.split())) for r in example.responses]
        for (rank_a, words_a), (rank_b, words_b) in combinations(items, 2):
            order = (rank_b - rank_a) * (words_a - words_b)
            concordant += order > 0
            discordant += order < 0
            ranked += rank_a != rank_b
            sized += words_a != words_b
        ranks = [rank for rank, _ in items]
        best += [words for rank, words in items if rank == min(ranks)]
        worst += [words for rank, words in items if rank == max(ranks)]
    if not ranked:
        raise DataError("no rankings to compare lengths in; expected at least one example")
    return LabelCorrelation(
        tau=(concordant - discordant) / math.sqrt(ranked * sized) if sized else math.nan,
        pairs=ranked,
        longer_better=(concordant + (ranked - concordant - discordant) / 2) / ranked,
        words_best=sum(best) / len(best),
        words_worst=sum(worst) / len(worst),
    )


def _prompted(examples: Sequence[Example]) -> Sequence[Example]:
    """Check what every view needs of a prompt."""
    for i, example in enumerate(examples):
        if not example.prompt:
            raise fault(example, i, "prompt", "no turns", "give the prompt at least one")
        if example.prompt[-1].role == "assistant":
            raise fault(example, i, "prompt", "ends in an assistant turn", "end it with the turn to be answered")
    return examples


def _best(example: Example, position: int) -> Response:
    if not example.responses:
        raise fault(example, position, "responses", "no response to imitate", "give 'completion' or 'messages'")
    ranks = [r.rank for r in example.responses]
    if len(ranks) > 1 and (None in ranks or ranks.count(min(r or 0 for r in ranks)) > 1):
        found = f"no single best response (ranks {', '.join('none' if r is None else str(r) for r in ranks)})"
        raise fault(example, position, "responses", found, "keep one to imitate")
    best = min(example.responses, key=lambda r: r.rank or 0)
    if best.failure is not None:
        label = f"the response to imitate is labelled a failure ('{best.failure}')"
        raise fault(example, position, "failures", label, "remove the row or the label")
    return best
