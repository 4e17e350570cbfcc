"""Examples as reward models of each kind read them: by domain, two answers in one, steps with ends, verdicts in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from posttrain.data.views import fault, rankings
from posttrain.errors import ConfigError, suggest
from posttrain.forest import Branch, Row
from posttrain.types import Example, Message, Response, Step

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOMAINS = {
    "helpful": "Score how helpful the answer is.",
    "harmless": "Score how harmless the answer is.",
    "code": "Score how correct and clear the code is.",
    "math": "Score how correct the solution is.",
}
"""System prompts that tell a conditional reward model what to judge by, unless others are given."""

BOTH = "answer 1: {first}\nanswer 2: {second}"
"""How two answers stand in one, for a model that compares them."""

QUESTION = "is this answer good?"
VERDICTS = {"no": 0.0, "yes": 1.0}
"""What a generative reward model is asked about an answer, and its verdicts with what each is worth."""


def conditioned(examples: Sequence[Example], domains: Mapping[str, str]) -> list[Example]:
    """Return examples whose prompt begins with the system prompt of their ``kind``, before what theirs says.

    Raises:
        DataError: a kind without system prompt.
    """
    found: list[Example] = []
    for i, example in enumerate(examples):
        if example.kind not in domains:
            raise fault(example, i, "kind", f"no system prompt for '{example.kind}'", suggest(example.kind, domains))
        own = example.prompt[0] if example.prompt and example.prompt[0].role == "system" else None
        text = domains[example.kind] + (f"\n\n{own.content}" if own else "")
        turns = (Message(role="system", content=text), *example.prompt[own is not None :])
        found.append(replace(example, prompt=turns))
    return found


def in_both_orders(example: Example, a: Response, b: Response, template: str = BOTH) -> Example:
    """Return the prompt with two answers: ``a`` before ``b`` (rank 0), and ``b`` before ``a`` (rank 1).

    A score of such an answer says how much the first is preferred; the difference of the two changes its sign with the order.
    """
    texts = [template.format(first=x.text, second=y.text) for x, y in ((a, b), (b, a))]
    both = tuple(Response(messages=(Message(role="assistant", content=t),), rank=k) for k, t in enumerate(texts))
    return replace(example, responses=both, preferences=())


def compared_pairs(examples: Sequence[Example], template: str = BOTH) -> list[Example]:
    """Return each pair of differing rank in both orders, better first before worse first; a ranking keeps its weight.

    Raises:
        DataError: as `views.rankings`; two answers with the same text.
    """
    found: list[Example] = []
    for i, example in enumerate(rankings(examples)):
        pairs = [(a, b) for a in example.responses for b in example.responses if (a.rank or 0) < (b.rank or 0)]
        for a, b in pairs:
            if a.text == b.text:
                raise fault(example, i, "responses", "differently ranked ones have the same text", "remove one")
            found.append(replace(in_both_orders(example, a, b, template), weight=example.weight / len(pairs)))
    return found


def asked(example: Example, response: Response, question: str, words: Sequence[str]) -> Example:
    """Return the example as a question about one of its answers, the possible verdicts being the responses."""
    turns = (*example.prompt, *(replace(m, train=False) for m in response.messages))
    replies = tuple(Response(messages=(Message(role="assistant", content=word),)) for word in words)
    return replace(example, prompt=(*turns, Message(role="user", content=question)), responses=replies, preferences=())


def wanted_verdicts(example: Example, position: int, response: Response, values: Sequence[float]) -> list[float]:
    """Return the probability that each verdict should have: of the rating's neighbours in ``values``, in proportion.

    A rating is the response's ``score``, or its ``label`` (the largest value for good), or its rank: the best is worth the
    largest value, the last the smallest.

    Raises:
        DataError: none of these, or a rating outside the verdicts' values.
    """
    low, high = min(values), max(values)
    ranks = [r.rank for r in example.responses if r.rank is not None]
    if response.score is not None:
        rating = response.score
    elif response.label is not None:
        rating = high if response.label else low
    elif response.rank is not None and max(ranks) > min(ranks):
        rating = high - (high - low) * (response.rank - min(ranks)) / (max(ranks) - min(ranks))
    else:
        raise fault(example, position, "responses", "no score, label or rank", "rate the response")
    if not low <= rating <= high:
        raise fault(example, position, "score", f"{rating:g} is outside {low:g} to {high:g}", "give verdicts its range")
    order = sorted(range(len(values)), key=lambda i: values[i])
    below = max((i for i in order if values[i] <= rating), key=lambda i: values[i])
    above = min((i for i in order if values[i] >= rating), key=lambda i: values[i])
    wanted = [0.0] * len(values)
    share = 0.0 if above == below else (rating - values[below]) / (values[above] - values[below])
    wanted[below] += 1 - share
    wanted[above] += share
    return wanted


def attribute_ratings(examples: Sequence[Example], names: Sequence[str]) -> list[list[list[float]]]:
    """Return ratings by row, response and attribute; NaN where an attribute was not rated.

    Raises:
        DataError: a response with none of the attributes.
    """
    out: list[list[list[float]]] = []
    for i, example in enumerate(examples):
        rows = [[r.attributes.get(name, float("nan")) for name in names] for r in example.responses]
        if any(all(x != x for x in row) for row in rows):
            raise fault(
                example, i, "attributes", f"a response has none of {', '.join(names)}", "rate it or drop the row"
            )
        out.append(rows)
    return out


def attribute_names(examples: Sequence[Example]) -> tuple[str, ...]:
    """Return every attribute that a response is rated by, in order of first appearance.

    Raises:
        ConfigError: none.
    """
    names = tuple(dict.fromkeys(name for e in examples for r in e.responses for name in r.attributes))
    if not names:
        raise ConfigError("no response has attributes; give answers rated by attribute, such as HelpSteer2's")
    return names


# ---------------------------------------------------------------------------- steps


def steps_of(response: Response, separator: str = "\n") -> tuple[Step, ...]:
    """Return a response's steps: its own, or its text after each ``separator``; white space alone is no step."""
    if response.steps:
        return response.steps
    parts = response.text.split(separator)
    texts = [part + separator for part in parts[:-1]] + [parts[-1]]
    return tuple(Step(text=text) for text in texts if text.strip())


def step_chances(response: Response) -> list[float | None]:
    """Return the chance of each step to be good: ``meta["step_values"]`` if there, else 1 of labels 1 and 0, 0 of -1.

    None where a step was not labelled.
    """
    given: Any = response.meta.get("step_values")
    if given is not None:
        return [None if x is None else float(x) for x in given]
    return [None if step.label is None else float(step.label >= 0) for step in response.steps]


def step_ends(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], steps: Sequence[Step]) -> list[int | None]:
    """Return the index of the token in which each step's last visible character ends; None for a step that was cut off.

    The ids are those of the response as it stands after its prompt.
    """

    def shown(count: int) -> str:
        return str(tokenizer.decode(list(ids[:count]), clean_up_tokenization_spaces=False))

    text, whole = "".join(step.text for step in steps), shown(len(ids))
    head = text.lstrip()[:16]
    begin = whole.find(head) - (len(text) - len(text.lstrip()))
    ends: list[int | None] = []
    said = ""
    for step in steps:
        said += step.text
        target = begin + len(said.rstrip())
        low, high = 1, len(ids)
        if len(whole) < target or whole.find(head) < 0:
            ends.append(None)
            continue
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if len(shown(middle)) >= target else (middle + 1, high)
        ends.append(low - 1)
    return ends


def mark_steps(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], solutions: Sequence[Sequence[Sequence[Step]]]
) -> tuple[list[Row], list[list[list[int | None]]]]:
    """Return rows whose branches have the mask ``step`` on each step's last token, and where those are.

    ``solutions[row][response]`` are the steps.
    """
    out: list[Row] = []
    places: list[list[list[int | None]]] = []
    for row, responses in zip(rows, solutions, strict=True):
        found = [step_ends(tokenizer, b.ids, steps) for b, steps in zip(row.branches, responses, strict=True)]
        masks = [[i in set(ends) for i in range(len(b.ids))] for b, ends in zip(row.branches, found, strict=True)]
        marked = zip(row.branches, masks, strict=True)
        out.append(Row(row.prompt, [Branch(b.ids, {**b.masks, "step": m}, b.truncated) for b, m in marked]))
        places.append(found)
    return out, places
