"""Iterative refinement: where a reward model and a judge disagree on fresh samples, the next rows to train on are made.

A judge is any ``compare(prompt, a, b)`` that gives the probability that answer a is the better one: a person's verdicts, a
model that compares, a larger reward model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from posttrain.errors import ConfigError
from posttrain.types import Example, Response

Compare = Callable[[str, str, str], float]
"""``(prompt, answer a, answer b) -> P(a over b)``."""


@dataclass(frozen=True)
class Compared:
    """Two answers of an example, by position, with the model's and the judge's probability that the first is better."""

    example: int
    a: int
    b: int
    model: float
    judge: float

    @property
    def surprise(self) -> float:
        """``KL(judge || model)`` in nats: how wrong the model is if the judge is right."""
        pairs = ((self.judge, self.model), (1 - self.judge, 1 - self.model))
        return sum(p * math.log(p / max(q, 1e-12)) for p, q in pairs if p > 0)

    @property
    def agrees(self) -> bool:
        """Whether both put the same answer first; a judge at 1/2 agrees with anything."""
        return (self.model - 0.5) * (self.judge - 0.5) >= 0 and (self.model != 0.5 or self.judge == 0.5)


def disagreements(
    examples: Sequence[Example],
    scores: Sequence[Sequence[float]],
    compare: Compare,
    *,
    pairs_per_prompt: int = 4,
    temperature: float = 1.0,
) -> list[Compared]:
    """Ask the judge about pairs of each prompt's answers, and return them with the most surprising first.

    Which pairs: those of differing text whose scores are the closest and the farthest apart, alternately: where the model
    is unsure, and where it would be most costly to be wrong.

    Args:
        examples: prompts with sampled responses.
        scores: the reward model's, one row an example.
        compare: the judge.
        pairs_per_prompt: how many comparisons to ask for at most.
        temperature: the model's probability is ``sigmoid(gap / temperature)`` (`posttrain.evals.calibration` fits one).

    Raises:
        ConfigError: scores that do not match the responses.
    """
    found: list[Compared] = []
    for index, (example, row) in enumerate(zip(examples, scores, strict=True)):
        if len(row) != len(example.responses):
            raise ConfigError(f"example {index} has {len(example.responses)} responses and {len(row)} scores")
        texts = [r.text for r in example.responses]
        for a, b in _asked_pairs(texts, row, pairs_per_prompt):
            chance = 1 / (1 + math.exp(min(700.0, -(row[a] - row[b]) / temperature)))
            found.append(Compared(index, a, b, chance, compare(example.prompt[-1].content, texts[a], texts[b])))
    return sorted(found, key=lambda c: -c.surprise)


def _asked_pairs(texts: Sequence[str], scores: Sequence[float], most: int) -> Iterator[tuple[int, int]]:
    pairs = [(a, b) for a, b in combinations(range(len(texts)), 2) if texts[a] != texts[b]]
    ordered = sorted(pairs, key=lambda p: abs(scores[p[0]] - scores[p[1]]))
    for k in range(min(most, len(ordered))):
        yield ordered[-1 - k // 2] if k % 2 else ordered[k // 2]


def confirmed(examples: Sequence[Example], compared: Sequence[Compared], second: Compare) -> list[Compared]:
    """The comparisons less the disagreements that a second judge does not confirm; it hears the answers in the other order.

    A judge who errs now and then contradicts the model most where the model is right and sure, so that what surprises most
    holds most of the errors. Asked about these alone once more (another person, the other order), few of them stay.
    """
    found: list[Compared] = []
    for c in compared:
        if not c.agrees:
            example = examples[c.example]
            again = 1 - second(example.prompt[-1].content, example.responses[c.b].text, example.responses[c.a].text)
            if (again - 0.5) * (c.judge - 0.5) <= 0:
                continue
        found.append(c)
    return found


def next_rows(
    examples: Sequence[Example],
    compared: Sequence[Compared],
    count: int,
    *,
    agreeing: float = 0.25,
    per_prompt: int | None = None,
) -> list[Example]:
    """The next ``count`` training pairs: what surprised most, and a share ``agreeing`` on which both agree.

    Pairs on which the model was right hold what it knows: of disagreements alone it would learn to contradict itself. Of one
    prompt ``per_prompt`` pairs at most are taken. A pair keeps the judge's probability as ``meta["better"]``, which a loss on
    soft labels reads; ties are left out.
    """
    taken: Counter[int] = Counter()
    decided: list[Compared] = []
    for c in compared:
        if c.judge != 0.5 and (per_prompt is None or taken[c.example] < per_prompt):
            taken[c.example] += 1
            decided.append(c)
    wrong, right = [c for c in decided if not c.agrees], [c for c in decided if c.agrees]
    kept = min(len(right), max(round(count * agreeing), count - len(wrong)))
    chosen = [*wrong[: count - kept], *right[:kept]]
    return [as_pair(examples[c.example], c) for c in chosen]


def spread_rows(examples: Sequence[Example], compared: Sequence[Compared], count: int) -> list[Example]:
    """``count`` training pairs spread evenly from the most surprising to the least, ties left out; all if there are fewer.

    Unlike `next_rows` these say what is true of the samples as they are. Pairs that all surprise teach a model that whatever
    it is sure of is wrong.
    """
    decided = [c for c in compared if c.judge != 0.5]
    most = min(count, len(decided))
    return [as_pair(examples[c.example], c) for c in (decided[k * len(decided) // most] for k in range(most))]


def as_pair(example: Example, compared: Compared) -> Example:
    """The two answers ranked as the judge does."""
    sure = compared.judge
    first, second = (compared.a, compared.b) if sure > 0.5 else (compared.b, compared.a)
    responses = tuple(replace(example.responses[k], rank=rank) for rank, k in enumerate((first, second)))
    return replace(example, responses=responses, preferences=(), meta={**example.meta, "better": max(sure, 1 - sure)})


def agreement(examples: Sequence[Example], compared: Sequence[Compared]) -> float:
    """The share of decided pairs on which model and judge agree, ties of the model counting half.

    Raises:
        ConfigError: no pair that the judge decided.
    """
    decided = [c for c in compared if c.judge != 0.5]
    if not decided:
        raise ConfigError(f"the judge decided none of {len(compared)} pairs of {len(examples)} prompts")
    return sum(0.5 if c.model == 0.5 else float(c.agrees) for c in decided) / len(decided)


def from_scorer(score: Callable[[str, str], float], *, temperature: float = 1.0) -> Compare:
    """A judge of scores: ``sigmoid((s(a) - s(b)) / temperature)``, such as a larger reward model's."""

    def compare(prompt: str, a: str, b: str) -> float:
        return 1 / (1 + math.exp(max(-700.0, min(700.0, (score(prompt, b) - score(prompt, a)) / temperature))))

    return compare


def noisy(compare: Compare, flips: float, draw: Callable[[str], float]) -> Compare:
    """A judge who says the opposite with probability ``flips``; ``draw(key)`` in [0, 1) decides, by the pair and not its order."""

    def judged(prompt: str, a: str, b: str) -> float:
        key = "\x1f".join([prompt, *sorted((a, b))])
        said = compare(prompt, a, b)
        return 1 - said if draw(key) < flips else said

    return judged


def responses_of(texts: Sequence[str]) -> tuple[Response, ...]:
    """Sampled texts as responses of one assistant turn."""
    from posttrain.rewards.trained import said

    return tuple(said(text) for text in texts)
