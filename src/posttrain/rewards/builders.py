"""Data out of responses that have scores: pairs, rankings and demonstrations, each builder a function of one prompt.

A builder takes an example and a seed and returns the examples that it makes of it, none where there is nothing to learn;
keyword-only numbers are its options. Random choices depend on (seed, prompt) only. Which of two responses is better, the
example's comparisons say where it has some, else the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count as numbers
from itertools import pairwise
from typing import Any

from posttrain.data.views import fault
from posttrain.errors import ConfigError, DataError
from posttrain.registry import Registry
from posttrain.rewards.axes import harmlessness, helpfulness
from posttrain.rewards.selection import kept, statistical_rejection
from posttrain.rollout.engine import uniforms
from posttrain.types import Example, Response

builders = Registry("builder")
"""Facts: ``makes``, the part of a data set that it writes; ``scores``, whether it reads scores; ``paper``."""

SAMPLED = "sampled"
"""Of a response's ``meta``: a policy sampled it; its token ids, their log-probabilities and whether it stopped by itself."""


@dataclass(frozen=True)
class Built:
    """What a builder made: its examples, how many prompts gave none, how many responses had no score."""

    examples: list[Example]
    empty: int
    unscored: int

    def __str__(self) -> str:
        parts = [f"{len(self.examples)} examples"]
        parts += [f"{self.empty} prompts gave none"] if self.empty else []
        parts += [f"{self.unscored} responses without a score left out"] if self.unscored else []
        return "; ".join(parts)


def build(
    builder: str | Callable[..., list[Example]],
    examples: Sequence[Example],
    *,
    seed: int = 0,
    options: Mapping[str, float] | None = None,
) -> Built:
    """Apply a builder, by its name or itself, to every example.

    Responses that read the same count once (`distinct`).

    Raises:
        ConfigError: an unknown builder or option.
        DataError: a builder that reads scores, and an example without any; as the builder.
    """
    function = builders.bound(builder, options or {})
    reads = builders.facts(builder).get("scores", False)
    found: list[Example] = []
    empty = unscored = 0
    for position, example in enumerate(examples):
        given = distinct(example)
        if reads:
            scored = [r.score is not None for r in given.responses]
            if not any(scored):
                raise fault(example, position, "score", "no response has one", "label the responses first")
            unscored += scored.count(False)
            given = subset(given, [i for i, on in enumerate(scored) if on])
        made = function(given, seed)
        empty += not made
        found += made
    return Built(found, empty, unscored)


def distinct(example: Example) -> Example:
    """The example with equal responses once, where the first stood: the data's own, else the last sample."""
    found: dict[Any, int] = {}
    for i, r in enumerate(example.responses):
        known = found.setdefault(_words(r), i)
        found[_words(r)] = i if is_sampled(example.responses[known]) else known
    return example if len(found) == len(example.responses) else subset(example, list(found.values()))


def _words(response: Response) -> tuple[tuple[str, ...], ...]:
    """What a response says."""
    return tuple((m.role, m.content, repr(m.tool_calls)) for m in response.messages)


def subset(example: Example, places: Sequence[int]) -> Example:
    """The example with some of its responses, in the given order, and the comparisons among them."""
    new = {old: i for i, old in enumerate(places)}
    compared = tuple(replace(p, a=new[p.a], b=new[p.b]) for p in example.preferences if p.a in new and p.b in new)
    return replace(example, responses=tuple(example.responses[i] for i in places), preferences=compared)


def is_sampled(response: Response) -> bool:
    """Whether a policy sampled the response while data was made, rather than that the data came with it."""
    return SAMPLED in response.meta


def score(response: Response) -> float:
    """The score of a response that has one."""
    assert response.score is not None
    return response.score


def winner(example: Example, first: int, second: int) -> int | None:
    """Which of two responses is better: by comparison where there is one, else by score; None at a tie."""
    for p in example.preferences:
        if {p.a, p.b} == {first, second} and p.better != 0.5:
            return p.a if p.better > 0.5 else p.b
        if {p.a, p.b} == {first, second}:
            return None
    gap = score(example.responses[first]) - score(example.responses[second])
    return None if gap == 0 else first if gap > 0 else second


def pair(example: Example, chosen: int, rejected: int) -> Example:
    """A response preferred to another."""
    two = subset(example, [chosen, rejected]).responses
    return replace(example, responses=(replace(two[0], rank=0), replace(two[1], rank=1)), preferences=())


def draws(*key: int | str) -> Iterator[float]:
    """Uniform numbers in [0, 1) without end, which depend on the key alone."""
    for block in numbers():
        yield from uniforms((*key, block), 256).tolist()


def permutation(size: int, *key: int | str) -> list[int]:
    """``range(size)`` in an order that depends on the key alone."""
    order = draws(*key)
    return [i for _, i in sorted((next(order), i) for i in range(size))]


def _compared(example: Example, first: int, second: int) -> list[Example]:
    """The pair of two responses, or none of a tie."""
    best = winner(example, first, second)
    return [] if best is None else [pair(example, best, first + second - best)]


# ---------------------------------------------------------------------------- pairs of samples by score


RSO = "Liu et al. 2023, Statistical rejection sampling improves preference optimization, arXiv 2309.06657"


def _accepted(example: Example, seed: int, samples: float, beta: float) -> list[int]:
    """What rejection sampling takes of the example's candidates, in random order; all of them where there are too few."""
    texts = [_words(r) for r in example.responses]
    taken = statistical_rejection(
        texts,
        [score(r) for r in example.responses],
        draws(seed, "rejection", example.prompt_key),
        samples=min(int(samples), len(texts)),
        beta=beta,
    )
    return [taken[i] for i in permutation(len(taken), seed, "pairs", example.prompt_key)]


@builders.register("rso", makes="rankings", scores=True, paper=RSO)
def rso(example: Example, seed: int, *, samples: float = 8, beta: float = 0.5) -> list[Example]:
    """RSO: ``samples`` candidates by rejection sampling, paired at random, each pair put in order: ``samples / 2`` pairs.

    A prompt with fewer different candidates gives all of them.

    Source: Liu et al. 2023, algorithm 1 and section 3.3 (first-round ranking).
    """
    order = _accepted(example, seed, samples, beta)
    return [made for a, b in zip(order[::2], order[1::2], strict=False) for made in _compared(example, a, b)]


@builders.register("rso_tournament", makes="rankings", scores=True, paper=RSO)
def rso_tournament(example: Example, seed: int, *, samples: float = 8, beta: float = 0.5) -> list[Example]:
    """RSO with tournament ranking: as `rso`, and winners meet winners until one is left: ``samples - 1`` pairs.

    Source: Liu et al. 2023, section 3.3.
    """
    return _tournament(example, _accepted(example, seed, samples, beta))


@builders.register(
    "tournament",
    makes="rankings",
    scores=True,
    paper="Zhao et al. 2023, SLiC-HF: sequence likelihood calibration with human feedback, arXiv 2305.10425",
)
def tournament(example: Example, seed: int) -> list[Example]:
    """SLiC-HF's sample and rank: K candidates meet in pairs, winners meet winners: ``K - 1`` pairs.

    Source: Zhao et al. 2023, section 2.2.
    """
    return _tournament(example, permutation(len(example.responses), seed, "pairs", example.prompt_key))


def _tournament(example: Example, order: Sequence[int]) -> list[Example]:
    """Pairs of a knock-out; at a tie the first goes on and no pair is made, an odd one out goes on."""
    found: list[Example] = []
    while len(order) > 1:
        rounds = [(a, b, winner(example, a, b)) for a, b in zip(order[::2], order[1::2], strict=False)]
        found += [pair(example, best, a + b - best) for a, b, best in rounds if best is not None]
        order = [a if best is None else best for a, _, best in rounds] + list(order[len(order) // 2 * 2 :])
    return found


@builders.register("best_worst", makes="rankings", scores=True, paper="Yang et al. 2024, Qwen2, arXiv 2407.10671")
def best_worst(example: Example, seed: int, *, margin: float = 0.0) -> list[Example]:
    """The response of the highest score over that of the lowest, where they are more than ``margin`` apart.

    Ties go to the earlier one. Scores and ratings stay with the responses, so that losses which read win rates find those
    against all samples (SPPO). Source: Yang et al. 2024, section 4.3; Wu et al. 2024 (SPPO), section 4.
    """
    scores = [score(r) for r in example.responses]
    high, low = scores.index(max(scores)), scores.index(min(scores))
    return [pair(example, high, low)] if scores[high] - scores[low] > margin else []


@builders.register(
    "dno",
    makes="rankings",
    scores=True,
    paper="Rosset et al. 2024, Direct Nash optimization: teaching language models to self-improve, arXiv 2404.03715",
)
def dno(example: Example, seed: int, *, least: float = 5.0, gap: float = 2.0, own_gap: float = 1.0) -> list[Example]:
    """DNO's filter: a response of at least ``least`` over each one that is ``gap`` or more worse.

    ``own_gap`` is enough where the better one is the policy's own sample. Scores are a judge's, on the paper's scale of 0
    to 6; every such pair is taken.

    Source: Rosset et al. 2024, section 3.
    """
    found: list[Example] = []
    for i, good in enumerate(example.responses):
        apart = own_gap if is_sampled(good) else gap
        if score(good) >= least:
            worse = [j for j, bad in enumerate(example.responses) if score(good) - score(bad) >= apart]
            found += [pair(example, i, j) for j in worse if j != i]
    return found


@builders.register("ranked", makes="rankings", scores=True)
def ranked(example: Example, seed: int) -> list[Example]:
    """All responses, ranked by score; equal scores are tied."""
    places = {s: rank for rank, s in enumerate(sorted({score(r) for r in example.responses}, reverse=True))}
    responses = tuple(replace(r, rank=places[score(r)]) for r in example.responses)
    return [replace(example, responses=responses)] if len(places) > 1 else []


@builders.register("best", makes="demonstrations", scores=True, paper="Dong et al. 2023, RAFT, arXiv 2304.06767")
def best(example: Example, seed: int, *, most: float = 1, least: float = float("-inf")) -> list[Example]:
    """The ``most`` responses of the highest scores, of at least ``least``, each to be imitated.

    Source: as `posttrain.rewards.selection.kept`.
    """
    scores = [r.score for r in example.responses]
    places = kept([_words(r) for r in example.responses], scores, least=least, most=int(most))
    return [replace(example, responses=(example.responses[i],), preferences=()) for i in places]


@builders.register("demonstrated", makes="demonstrations")
def demonstrated(example: Example, seed: int) -> list[Example]:
    """The first answer as it is, to be imitated: of demonstrations of several sources one set."""
    return [replace(example, responses=example.responses[:1], preferences=())] if example.responses else []


@builders.register("asked", makes="prompts")
def asked(example: Example, seed: int) -> list[Example]:
    """The prompt alone, with its target: of prompts of several sources one set."""
    return [replace(example, responses=(), preferences=())]


@builders.register("thumbs", makes="labelled", scores=True)
def thumbs(example: Example, seed: int, *, threshold: float = 0.0) -> list[Example]:
    """Each response by itself, good where its score is above ``threshold``."""
    return [
        replace(example, responses=(replace(r, label=score(r) > threshold),), preferences=()) for r in example.responses
    ]


# ---------------------------------------------------------------------------- what the data came with, and samples


@builders.register(
    "spin",
    makes="rankings",
    paper="Chen et al. 2024, Self-play fine-tuning converts weak language models to strong language models, arXiv 2401.01335",
)
def spin(example: Example, seed: int) -> list[Example]:
    """SPIN: the answer that the data came with over each of the policy's own.

    Raises:
        DataError: no answer of the data, or several.

    Source: Chen et al. 2024, algorithm 1.
    """
    human = [i for i, r in enumerate(example.responses) if not is_sampled(r)]
    if len(human) != 1:
        raise _told(example, f"found {len(human)} answers of the data itself", "expected one, beside the samples")
    return [pair(example, human[0], i) for i, r in enumerate(example.responses) if is_sampled(r)]


@builders.register(
    "d2o",
    makes="rankings",
    paper="Duan et al. 2024, Negating negatives, arXiv 2403.03419",
)
def d2o(example: Example, seed: int) -> list[Example]:
    """D2O: the policy's own samples, all alike, over the answer that people call bad; the loss ``d2o`` reads such rankings.

    The bad answer is the data's worst: labelled bad, a named failure, or of the last rank. Samples need not be good.

    Source: Duan et al. 2024, section 4.
    """
    bad, own = _bad(example), [i for i, r in enumerate(example.responses) if is_sampled(r)]
    if not bad or not own:
        return []
    chosen = subset(example, [*own, bad[-1]])
    ranks = [*(0 for _ in own), 1]
    responses = tuple(replace(r, rank=k) for r, k in zip(chosen.responses, ranks, strict=True))
    return [replace(chosen, responses=responses, preferences=())]


@builders.register("unwanted", makes="rankings", paper="Abdin et al. 2024, Phi-3 technical report, arXiv 2404.14219")
def unwanted(example: Example, seed: int) -> list[Example]:
    """Phi-3's post-training: the data's best answer over each one that shows unwanted behaviour.

    Unwanted is what is labelled bad, has a named failure or, where there are neither, all but the best rank.
    """
    bad = _bad(example)
    good = [i for i in range(len(example.responses)) if i not in bad]
    if not good:
        return []
    first = min(good, key=lambda i: (example.responses[i].rank or 0, i))
    return [pair(example, first, i) for i in bad]


SAFE_RLHF = "Dai et al. 2023, Safe RLHF, arXiv 2310.12773"
builders.register("helpfulness", makes="rankings", paper=SAFE_RLHF)(helpfulness)
builders.register("harmlessness", makes="rankings", paper=SAFE_RLHF)(harmlessness)


def _bad(example: Example) -> list[int]:
    """Answers of the data that are not to be given, the worst last."""
    known = [(i, r) for i, r in enumerate(example.responses) if not is_sampled(r)]
    bad = [(r.rank or 0, i) for i, r in known if r.label is False or r.failure]
    if not bad:
        ranks = [r.rank for _, r in known if r.rank is not None]
        bad = [(r.rank, i) for i, r in known if r.rank is not None and r.rank > min(ranks)]
    return [i for _, i in sorted(bad)]


def _told(example: Example, problem: str, remedy: str) -> DataError:
    """A fault of an example's responses."""
    return DataError.at(example.file or "example", example.row, "responses", problem, remedy)


def chunks(
    examples: Sequence[Example], parts: int, hardness: Callable[[Example], float] | None = None
) -> list[list[Example]]:
    """SDPO's chunks: the data dealt into ``parts`` runs of nearly equal size, the easiest first where ``hardness`` is given.

    A chunk is trained from the model of the chunk before, which is also its reference.

    Raises:
        ConfigError: more parts than examples.

    Source: Kim et al. 2024, sDPO: don't use your data all at once, arXiv 2403.19270.
    """
    if not 1 <= parts <= len(examples):
        raise ConfigError(f"got {parts} chunks of {len(examples)} examples; expected 1 to {len(examples)}")
    order = sorted(examples, key=hardness) if hardness else list(examples)
    ends = [len(order) * k // parts for k in range(parts + 1)]
    return [order[a:b] for a, b in pairwise(ends)]
