"""Checked views of examples: demonstrations, rankings, pairs, ratings ...; and what rankings say about length."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import NamedTuple

from posttrain.data.tally import Pair, PairLengths
from posttrain.errors import DataError
from posttrain.types import Example, Message, Response


def fault(example: Example, position: int, field: str, problem: str, remedy: str) -> DataError:
    """Return the standard error for an example; one made in memory is named by its position (from 0)."""
    if example.file:
        return DataError.at(example.file, example.row, field, problem, remedy)
    return DataError(f"example {position} (from 0), field '{field}': {problem}; {remedy}")


def demonstrations(examples: Sequence[Example]) -> list[Example]:
    """Return one example each with one response to imitate; of ranked responses, the best.

    Raises:
        DataError: an example without response, with a labelled failure or bad answer as its best, without a single best.
    """
    found: list[Example] = []
    for i, example in enumerate(_prompted(examples)):
        best = _best(example, i)
        found.append(example if len(example.responses) == 1 else replace(example, responses=(best,)))
    return found


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


def best_and_worst(examples: Sequence[Example]) -> list[Example]:
    """Return of each ranked row its best answer as a good one and its worst as a bad one, rated 1 and 0 unless both have scores.

    Raises:
        DataError: as `rankings`.
    """
    found: list[Example] = []
    for example in rankings(examples):
        order = sorted(example.responses, key=lambda r: r.rank or 0)
        unscored = order[0].score is None or order[-1].score is None
        for r, good in ((order[0], True), (order[-1], False)):
            score = float(good) if unscored else r.score
            found.append(replace(example, responses=(replace(r, rank=None, label=good, score=score, failure=None),)))
    return found


def prompts(examples: Sequence[Example]) -> list[Example]:
    """Return the examples without their responses; every one is kept, in order, repeats included.

    Raises:
        DataError: an example without prompt, or whose prompt ends in an assistant turn.
    """
    return [replace(e, responses=()) for e in _prompted(examples)]


class Kept(NamedTuple):
    """The examples of a view, and how many comparisons or rows order nothing (ties) and were left out."""

    examples: list[Example]
    ties: int


def labelled(examples: Sequence[Example]) -> list[Example]:
    """Return one example for each response, which has a label.

    Raises:
        DataError: an example without responses, a response without label, labels of one kind only.
    """
    found = _each(examples, "label", lambda response: response.label is not None)
    labels = {example.responses[0].label for example in found}
    if len(labels) == 1:
        problem = f"all {len(found)} labels are {str(labels == {True}).lower()}"
        raise DataError(f"{problem}; expected good and bad answers, for one alone can't be told from the other")
    return found


def rated(examples: Sequence[Example], attribute: str = "") -> list[Example]:
    """Return one example for each response, which has a score or, if ``attribute`` is given, that rating as its score.

    Raises:
        DataError: an example without responses, a response without the score or rating.
    """
    if not attribute:
        return _each(examples, "score", lambda response: response.score is not None)
    found = _each(examples, f"attributes.{attribute}", lambda response: attribute in response.attributes)
    return [replace(e, responses=(replace(r, score=r.attributes[attribute]),)) for e in found for r in e.responses]


def steps(examples: Sequence[Example]) -> list[Example]:
    """Return one example for each response, which has steps, at least one of them labelled.

    Raises:
        DataError: an example without responses, a response without a labelled step.
    """
    return _each(examples, "steps", lambda response: any(step.label is not None for step in response.steps))


def targets(examples: Sequence[Example]) -> list[Example]:
    """Return the examples as prompts that say what a right answer is.

    Raises:
        DataError: as `prompts`; an example without target.
    """
    found = prompts(examples)
    for i, example in enumerate(found):
        if example.target is None:
            raise fault(
                example, i, "target", "no target", "expected a row whose answer can be checked; see docs/data.md"
            )
    return found


def scored_as_rankings(examples: Sequence[Example], attribute: str = "") -> Kept:
    """Return examples whose responses are ranked by score, or by the rating ``attribute``; equal ones are tied.

    An example all of whose responses are tied is left out and counted.

    Raises:
        DataError: fewer than 2 responses, a response without the score or rating.
    """
    found: list[Example] = []
    for i, example in enumerate(_prompted(examples)):
        if len(example.responses) < 2:
            problem = f"found {len(example.responses)} responses, expected at least 2"
            raise fault(example, i, "responses", problem, "give several answers to one prompt")
        each = rated([example], attribute)
        scores = [response.score or 0.0 for one in each for response in one.responses]
        ranks = {score: rank for rank, score in enumerate(sorted(set(scores), reverse=True))}
        if len(ranks) > 1:
            ranked = zip(example.responses, scores, strict=True)
            found.append(replace(example, responses=tuple(replace(r, rank=ranks[s]) for r, s in ranked)))
    return Kept(found, len(examples) - len(found))


def preferences_as_pairs(examples: Sequence[Example], axis: str = "", by: str = "") -> Kept:
    """Return an example for each comparison along ``axis``, its two responses ranked; ties are left out and counted.

    ``by`` takes the comparisons of one annotator only. What a verdict's probability and giver were, an example's meta
    says under 'better' and 'by'.

    Raises:
        DataError: no comparison to take, or comparisons along several axes of which none is named.
    """
    found: list[Example] = []
    ties = 0
    axes = sorted({p.axis for e in examples for p in e.preferences})
    if axis not in axes or not examples:
        known = ", ".join(f"'{name}'" for name in axes) or "none"
        raise DataError(f"no comparisons along the axis '{axis}'; name one of those in the data: {known}")
    for example in _prompted(examples):
        for given in example.preferences:
            if given.axis != axis or by not in ("", given.by):
                continue
            if given.better == 0.5:
                ties += 1
                continue
            first, second = (given.a, given.b) if given.better > 0.5 else (given.b, given.a)
            pair = (replace(example.responses[first], rank=0), replace(example.responses[second], rank=1))
            meta = {**example.meta, "better": max(given.better, 1 - given.better), "by": given.by}
            found.append(replace(example, responses=pair, preferences=(), meta=meta))
    if not found and not ties:
        raise DataError(f"no comparisons by '{by}'; leave the name out to take everybody's")
    return Kept(found, ties)


def references(examples: Sequence[Example], name: str) -> list[Example]:
    """Return demonstrations of the reference answers that examples keep in ``meta["references"][name]``.

    Raises:
        DataError: as `prompts`; an example without that reference.
    """
    found: list[Example] = []
    for i, example in enumerate(_prompted(examples)):
        known = example.meta.get("references", {})
        given = known.get(name)
        first = given[0] if isinstance(given, list) and given else given  # one for each turn: the first is the prompt's
        if not isinstance(first, str):
            have = ", ".join(f"'{key}'" for key in known) or "none"
            raise fault(example, i, "references", f"no reference '{name}' (found {have})", "name one or drop the row")
        answer = Response(messages=(Message(role="assistant", content=first),))
        found.append(replace(example, responses=(answer,), preferences=()))
    return found


def _each(examples: Sequence[Example], field: str, has: Callable[[Response], bool]) -> list[Example]:
    """One example for each response, all of which have to have what the view is about."""
    found: list[Example] = []
    for i, example in enumerate(_prompted(examples)):
        if not example.responses:
            raise fault(example, i, "responses", "no response", "give at least one")
        for k, response in enumerate(example.responses):
            if not has(response):
                raise fault(example, i, field, f"response {k} (from 0) has none", "add it or remove the row")
            found.append(replace(example, responses=(response,), preferences=()))
    return found


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

    Every pair of a ranking counts, ties only among those of different lengths; the arithmetic is that of `tally.Compared`.

    Raises:
        DataError: as `rankings`; no examples.
    """
    counted = PairLengths()
    best: list[int] = []
    worst: list[int] = []
    for example in rankings(examples):
        words = [len(r.text.split()) for r in example.responses]
        ranks = [r.rank or 0 for r in example.responses]
        order = sorted(range(len(ranks)), key=lambda i: ranks[i])
        counted.add(words, [Pair(a, b, "", ranks[a] == ranks[b]) for a, b in combinations(order, 2)])
        best += [count for count, rank in zip(words, ranks, strict=True) if rank == min(ranks)]
        worst += [count for count, rank in zip(words, ranks, strict=True) if rank == max(ranks)]
    found = counted.result()
    if found is None:
        raise DataError("no rankings to compare lengths in; expected at least one example")
    return LabelCorrelation(
        tau=math.nan if found.tau is None else found.tau,
        pairs=found.pairs,
        longer_better=found.longer_better,
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
    if best.label is False:
        raise fault(example, position, "label", "the response to imitate is labelled bad (false)", "remove the row")
    return best
