"""Any examples' answers as rows to be scored, ranked or not, in the tokens of whichever model scores them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from posttrain.data.batch import Ask, render_many
from posttrain.data.chat import silent, stop_ids
from posttrain.data.collate import AT_ONCE
from posttrain.data.views import fault
from posttrain.errors import DataError, ModelError
from posttrain.forest import Branch, Row
from posttrain.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Answers(NamedTuple):
    """One example's answers that fit: the row, None if none does, and each answer's branch, None = too long."""

    row: Row | None
    places: tuple[int | None, ...]


def answer_rows(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_length: int,
    truncated: Sequence[Sequence[bool]] | None = None,
) -> list[Answers]:
    """Render every answer of every example; one of more than ``max_length`` tokens, prompt included, has no branch.

    Args:
        tokenizer: the scoring model's own, with its chat template.
        examples: with any number of responses each.
        max_length: in tokens.
        truncated: for each response whether it was cut by length: then it ends without the stop token.

    Raises:
        DataError: naming the row, one without prompt or that can't be rendered.
        ModelError: as `posttrain.data.chat.render`.
    """
    stops = stop_ids(tokenizer)
    out: list[Answers] = []
    for start in range(0, len(examples), AT_ONCE):
        chunk = examples[start : start + AT_ONCE]
        asks = [_asks(example, start + i) for i, example in enumerate(chunk)]
        made = iter(_rendered(tokenizer, chunk, asks, start))
        for i, example in enumerate(chunk):
            prompt = next(made)
            cut = truncated[start + i] if truncated is not None else [False] * len(example.responses)
            branches: list[Branch] = []
            places: list[int | None] = []
            for whether in cut:
                ids = next(made)
                ids = ids[:-1] if whether and len(ids) > 1 and ids[-1] in stops else ids
                fits = len(prompt) + len(ids) <= max_length
                places.append(len(branches) if fits else None)
                branches += [Branch(ids, {}, whether)] if fits else []
            out.append(Answers(Row(prompt, branches) if branches else None, tuple(places)))
    return out


def _asks(example: Example, position: int) -> list[Ask]:
    if not example.prompt:
        raise fault(example, position, "prompt", "no turns", "give the prompt that is answered")
    prompt = silent(example.prompt)
    answers = [Ask([*prompt, *r.messages], example.tools, answer_from=len(prompt)) for r in example.responses]
    return [Ask(prompt, example.tools, generation_prompt=True), *answers]


def _rendered(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], asks: Sequence[Sequence[Ask]], start: int
) -> list[list[int]]:
    """The ids of all asks; where one can't be rendered, they are tried one by one for the error to name its row."""
    try:
        return [r.ids for r in render_many(tokenizer, [a for each in asks for a in each], spans=False)]
    except (DataError, ModelError):
        for i, each in enumerate(asks):
            try:
                render_many(tokenizer, each, spans=False)
            except (DataError, ModelError) as error:
                raise fault(examples[i], start + i, "responses", str(error), "correct or remove the row") from error
        raise
