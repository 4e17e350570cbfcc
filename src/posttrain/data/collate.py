"""Examples to rows of token ids with masks; over-long ones as asked, every drop or cut counted by cause."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, get_args

from posttrain.data.chat import Rendered, render, render_branch, render_prompt
from posttrain.data.views import demonstrations, fault, prompts, rankings
from posttrain.errors import ConfigError, DataError, ModelError, suggest
from posttrain.forest import Branch, Row
from posttrain.types import Example, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Overlong = Literal["error", "drop", "truncate_prompt_left", "truncate_completion"]
"""What to do with an example of more than ``max_length`` tokens (prompt plus its longest response)."""

TOO_LONG = "longer than max_length"
TWINS = "responses equal after truncation"
PROMPT_CUT = "prompt cut on the left"
COMPLETION_CUT = "completion cut, without stop token"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of the examples.

    Attributes:
        index: for each row made, the position of its example.
        dropped: examples left out, by cause.
        truncated: examples kept but cut, by what was cut.
        untrained_turns: assistant turns in prompts of demonstrations without ``train=True``.
        longest: tokens of the longest prompt with response, before any cut.
    """

    index: tuple[int, ...]
    dropped: Mapping[str, int] = field(default_factory=dict)
    truncated: Mapping[str, int] = field(default_factory=dict)
    untrained_turns: int = 0
    longest: int = 0

    @property
    def kept(self) -> int:
        """How many rows were made."""
        return len(self.index)

    def __str__(self) -> str:
        total = self.kept + sum(self.dropped.values())
        parts = [f"kept {self.kept} of {total}, longest {self.longest} tokens"]
        parts += [f"dropped {n}: {cause}" for cause, n in self.dropped.items()]
        parts += [f"cut {n}: {cause}" for cause, n in self.truncated.items()]
        if self.untrained_turns:
            parts.append(f"{self.untrained_turns} earlier assistant turns not trained (set train=true to train them)")
        return "; ".join(parts)


def demonstration_rows(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_length: int,
    overlong: Overlong = "error",
) -> tuple[list[Row], Report]:
    """Return a row of one branch for each demonstration, with mask ``loss`` on trained tokens.

    The response is trained; turns of the prompt only where they say ``train=True``. The row's prompt ends
    where the first trained token begins, so that such a conversation is one long branch.

    Raises:
        DataError: an over-long example under ``error``, one that can't be cut as asked, nothing to train on;
            as `views.demonstrations` and `chat.render`.
        ModelError: as `chat.render`.
    """

    def make(example: Example, position: int) -> Row:
        response = example.responses[0].messages
        history = [replace(m, train=m.train is True) for m in example.prompt]
        whole = render(tokenizer, [*history, *response])
        if True not in whole.mask:
            remedy = "remove train=false from the turn to imitate, or remove the row"
            raise fault(example, position, "train", "no token is trained", remedy)
        first = whole.mask.index(True)
        last = len(whole.mask) - whole.mask[::-1].index(True)
        branch = Branch(whole.ids[first:last], {"loss": whole.mask[first:last]})
        return Row(whole.ids[:first], [branch])

    checked = demonstrations(examples)
    turns = [m for e in checked for m in e.prompt if m.role == "assistant" and m.train is not True]
    rows, report = _collate(tokenizer, checked, make, max_length, overlong)
    return rows, replace(report, untrained_turns=len(turns))


def ranking_rows(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_length: int,
    overlong: Overlong = "error",
) -> tuple[list[Row], Report]:
    """Return a row for each ranking: a branch for each response, in their order, with mask ``loss``.

    A cut is the same for all responses of an example: one shared prompt, one shared limit of response tokens.

    Raises:
        DataError: as `demonstration_rows` and `views.rankings`; a prompt turn with ``train=True``, which a
            loss that compares responses can't honour; differently ranked responses with the same ids.
        ModelError: as `chat.render`.
    """

    def make(example: Example, position: int) -> Row:
        if any(m.train for m in example.prompt):
            remedy = "drop 'train' from the prompt, or train that turn as a demonstration"
            raise fault(example, position, "train", "a turn of a ranking's prompt says train=true", remedy)
        prompt = render_prompt(tokenizer, example.prompt)
        branches = [_branch(tokenizer, example, position, r.messages) for r in example.responses]
        if _twins(example, branches):
            remedy = "remove the row, or one of them"
            raise fault(example, position, "responses", "differently ranked ones read the same", remedy)
        return Row(prompt, branches)

    return _collate(tokenizer, rankings(examples), make, max_length, overlong)


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_length: int,
    overlong: Overlong = "error",
) -> tuple[list[list[int]], Report]:
    """Return each prompt's ids with the generation prompt; ``max_length`` counts prompt tokens only.

    Raises:
        ConfigError: ``truncate_completion``, as there is none.
        DataError: an over-long prompt under ``error``; as `views.prompts` and `chat.render`.
        ModelError: as `chat.render`.
    """
    if overlong == "truncate_completion":
        raise ConfigError("prompts have no completion to truncate; use 'error', 'drop' or 'truncate_prompt_left'")

    def make(example: Example, position: int) -> Row:
        return Row(render_prompt(tokenizer, example.prompt), [])

    rows, report = _collate(tokenizer, prompts(examples), make, max_length, overlong)
    return [list(row.prompt) for row in rows], report


def _branch(tokenizer: PreTrainedTokenizerBase, example: Example, position: int, response: Sequence[Message]) -> Branch:
    rendered: Rendered = render_branch(tokenizer, example.prompt, response)
    if True not in rendered.mask:
        remedy = "remove train=false from it"
        raise fault(example, position, "train", "no token of a response counts", remedy)
    return Branch(rendered.ids, {"loss": rendered.mask})


def _collate(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    make: Callable[[Example, int], Row],
    max_length: int,
    overlong: str,
) -> tuple[list[Row], Report]:
    """Make each example's row, fit it to the limit and count."""
    if overlong not in get_args(Overlong):
        raise ConfigError(f"unknown overlong '{overlong}'; {suggest(overlong, get_args(Overlong))}")
    if max_length < 2:
        raise ConfigError(f"max_length is {max_length}, expected at least 2 (a prompt token and a response token)")
    rows: list[Row] = []
    index: list[int] = []
    dropped: Counter[str] = Counter()
    truncated: Counter[str] = Counter()
    longest = 0
    for position, example in enumerate(examples):
        with _naming(example, position):
            row = make(example, position)
        length = _length(row)
        longest = max(longest, length)
        if length > max_length:
            if overlong == "drop":
                dropped[TOO_LONG] += 1
                continue
            row = _cut(row, example, position, max_length, overlong, tokenizer.bos_token_id)
            if _twins(example, row.branches):
                dropped[TWINS] += 1
                continue
            truncated[PROMPT_CUT if overlong == "truncate_prompt_left" else COMPLETION_CUT] += 1
        rows.append(row)
        index.append(position)
    return rows, Report(index=tuple(index), dropped=dropped, truncated=truncated, longest=longest)


def _twins(example: Example, branches: Sequence[Branch]) -> bool:
    """Whether two responses of different rank have the same ids."""
    ranks: dict[tuple[int, ...], int | None] = {}
    responses = zip(example.responses, branches, strict=True) if branches else ()
    return any(ranks.setdefault(tuple(b.ids), r.rank) != r.rank for r, b in responses)


def _length(row: Row) -> int:
    return len(row.prompt) + max((len(b.ids) for b in row.branches), default=0)


def _cut(row: Row, example: Example, position: int, max_length: int, overlong: str, bos: object) -> Row:
    """Return the row cut to ``max_length``; a leading BOS stays. Refuses what isn't asked or possible."""
    room = max_length - len(row.prompt)
    answer = _length(row) - len(row.prompt)
    parts = f"{len(row.prompt)} prompt" + (f" + {answer} response" if row.branches else "")
    found = f"{_length(row)} tokens ({parts}), more than max_length {max_length}"
    if overlong == "error":
        remedy = "raise max_length, or set overlong to drop, truncate_prompt_left or truncate_completion"
        raise fault(example, position, "prompt and response", found, remedy)
    if overlong == "truncate_completion":
        if room < 1:
            remedy = "no room for a response; raise max_length or set overlong to drop"
            raise fault(example, position, "prompt", found, remedy)
        return Row(row.prompt, [_shorten(b, room) for b in row.branches])
    keep = max_length - answer
    head = list(row.prompt[:1]) if row.prompt[0] == bos else []
    if keep < len(head) + 1:
        remedy = "no room for a prompt; raise max_length or set overlong to drop"
        raise fault(example, position, "response", found, remedy)
    return Row([*head, *row.prompt[len(row.prompt) - keep + len(head) :]], row.branches)


def _shorten(branch: Branch, limit: int) -> Branch:
    if len(branch.ids) <= limit:
        return branch
    masks = {name: mask[:limit] for name, mask in branch.masks.items()}
    return Branch(branch.ids[:limit], masks, truncated=True)


@contextmanager
def _naming(example: Example, position: int) -> Iterator[None]:
    """Put file and row before errors that rendering raises."""
    where = f"{example.file} row {example.row}" if example.file else f"example {position} (from 0)"
    try:
        yield
    except (DataError, ModelError) as error:
        if str(error).startswith(where):
            raise
        raise type(error)(f"{where}: {error}") from error
