"""Examples to rows of token ids with masks; over-long ones as asked, every drop or cut counted by cause."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, get_args

from posttrain.data.batch import Ask, render_many
from posttrain.data.chat import Rendered, silent
from posttrain.data.layout import trains
from posttrain.data.views import demonstrations, fault, prompts, rankings
from posttrain.errors import ConfigError, DataError, ModelError, suggest
from posttrain.forest import Branch, Row
from posttrain.types import Example, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Overlong = Literal["error", "drop", "truncate_prompt_left", "truncate_completion"]
"""What to do with an example of more than ``max_length`` tokens (prompt plus its longest response)."""

History = Literal["refuse", "last", "each"]
"""What to do where a template rewrites earlier turns (thinking that it strips).

``refuse``: raise, unless no trained turn is concerned. ``last``: train the last assistant turn only, after the history
as the template rewrites it. ``each``: one row for each trained assistant turn, each after the history as it read when
that turn was sampled.
"""

AT_ONCE = 250
"""How many examples are encoded in one call; few, so that what is made on the way is gone before it is looked over."""

TOO_LONG = "longer than max_length"
TWINS = "responses equal after truncation"
UNTRAINED = "no trained token left after truncation"
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
    history: History = "refuse",
) -> tuple[list[Row], Report]:
    """Return a row of one branch for each demonstration, with mask ``loss`` on trained tokens.

    The response is trained; turns of the prompt only where they say ``train=True``. The row's prompt ends
    where the first trained token begins, so that such a conversation is one long branch.

    Raises:
        DataError: an over-long example under ``error``, one that can't be cut as asked, nothing to train on;
            as `views.demonstrations` and `chat.render`.
        ModelError: as `chat.render`.
        ConfigError: an unknown ``overlong`` or ``history``.
    """
    if history not in get_args(History):
        raise ConfigError(f"unknown history '{history}'; {suggest(history, get_args(History))}")

    def ask(example: Example, position: int) -> list[Ask]:
        turns = _demonstration(example)
        trained = [m for m, turn in enumerate(turns) if trains(turn)]
        spoken = [m for m in trained if turns[m].role == "assistant"]
        if history == "refuse":
            return [Ask(turns, example.tools)]
        if len(spoken) < len(trained):
            remedy = "drop 'train' from it, or keep history='refuse'"
            raise fault(example, position, "train", f"history='{history}' trains assistant turns only", remedy)
        kept = spoken if history == "each" or not spoken else spoken[-1:]
        return [Ask([*silent(turns[:m]), turns[m]], example.tools, rewritten=True) for m in kept or [len(turns) - 1]]

    def make(example: Example, position: int, rendered: Sequence[Rendered]) -> list[Row]:
        return [_demonstration_row(example, position, whole) for whole in rendered]

    checked = demonstrations(examples)
    rows, report = _collate(tokenizer, checked, ask, make, max_length, overlong)
    untrained = sum(_untrained(e, history) for e in checked)
    return rows, replace(report, untrained_turns=untrained)


def _demonstration(example: Example) -> list[Message]:
    """The conversation, in which turns of the prompt are trained only if they say so."""
    prompt = [m if m.train is True else replace(m, train=False) if trains(m) else m for m in example.prompt]
    return [*prompt, *example.responses[0].messages]


def _untrained(example: Example, history: str) -> int:
    """How many assistant turns before the last aren't trained."""
    trained = [m.train is True for m in example.prompt if m.role == "assistant"]
    trained += [trains(m) for m in example.responses[0].messages[:-1] if m.role == "assistant"]
    return len(trained) if history == "last" else trained.count(False)


def _demonstration_row(example: Example, position: int, whole: Rendered) -> Row:
    ids, mask = whole.ids, whole.mask
    if True not in mask:
        remedy = "remove train=false from the turn to imitate, or remove the row"
        raise fault(example, position, "train", "no token is trained", remedy)
    first, last = mask.index(True), len(mask)
    while not mask[last - 1]:
        last -= 1
    return Row(ids[:first], [Branch(ids[first:last], {"loss": mask[first:last]})])


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

    def ask(example: Example, position: int) -> list[Ask]:
        if any(m.train for m in example.prompt):
            remedy = "drop 'train' from the prompt, or train that turn as a demonstration"
            raise fault(example, position, "train", "a turn of a ranking's prompt says train=true", remedy)
        prompt = silent(example.prompt)
        answers = [Ask([*prompt, *r.messages], example.tools, answer_from=len(prompt)) for r in example.responses]
        return [Ask(prompt, example.tools, generation_prompt=True), *answers]

    def make(example: Example, position: int, rendered: Sequence[Rendered]) -> list[Row]:
        branches = [_branch(example, position, answer) for answer in rendered[1:]]
        if _twins(example, branches):
            remedy = "remove the row, or one of them"
            raise fault(example, position, "responses", "differently ranked ones read the same", remedy)
        return [Row(rendered[0].ids, branches)]

    return _collate(tokenizer, rankings(examples), ask, make, max_length, overlong)


def response_rows(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], *, max_length: int, overlong: Overlong = "error"
) -> tuple[list[Row], Report]:
    """Return a row for each example, a branch for each of its responses, ranked or not; as `ranking_rows` otherwise.

    Raises:
        DataError: as `ranking_rows`, but any one response and any ranks will do.
    """

    def ask(example: Example, position: int) -> list[Ask]:
        if not example.responses:
            raise fault(example, position, "responses", "no response", "give at least one")
        prompt = silent(example.prompt)
        answers = [Ask([*prompt, *r.messages], example.tools, answer_from=len(prompt)) for r in example.responses]
        return [Ask(prompt, example.tools, generation_prompt=True), *answers]

    def make(example: Example, position: int, rendered: Sequence[Rendered]) -> list[Row]:
        return [Row(rendered[0].ids, [_branch(example, position, answer) for answer in rendered[1:]])]

    unranked = [replace(e, responses=tuple(replace(r, rank=None) for r in e.responses)) for e in examples]
    return _collate(tokenizer, unranked, ask, make, max_length, overlong)


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

    def ask(example: Example, position: int) -> list[Ask]:
        return [Ask(silent(example.prompt), example.tools, generation_prompt=True)]

    def make(example: Example, position: int, rendered: Sequence[Rendered]) -> list[Row]:
        return [Row(rendered[0].ids, [])]

    rows, report = _collate(tokenizer, prompts(examples), ask, make, max_length, overlong)
    return [list(row.prompt) for row in rows], report


def _branch(example: Example, position: int, rendered: Rendered) -> Branch:
    if True not in rendered.mask:
        remedy = "remove train=false from it"
        raise fault(example, position, "train", "no token of a response counts", remedy)
    return Branch(rendered.ids, {"loss": rendered.mask})


def _collate(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    ask: Callable[[Example, int], list[Ask]],
    make: Callable[[Example, int, Sequence[Rendered]], list[Row]],
    max_length: int,
    overlong: str,
) -> tuple[list[Row], Report]:
    """Make each example's rows, fit them to the limit and count."""
    if overlong not in get_args(Overlong):
        raise ConfigError(f"unknown overlong '{overlong}'; {suggest(overlong, get_args(Overlong))}")
    if max_length < 2:
        raise ConfigError(f"max_length is {max_length}, expected at least 2 (a prompt token and a response token)")
    rows: list[Row] = []
    index: list[int] = []
    dropped: Counter[str] = Counter()
    truncated: Counter[str] = Counter()
    longest = 0
    for position, rendered in _rendered(tokenizer, examples, ask):
        example = examples[position]
        for row in make(example, position, rendered):
            length = _length(row)
            longest = max(longest, length)
            if length > max_length:
                if overlong == "drop":
                    dropped[TOO_LONG] += 1
                    continue
                row = _cut(row, example, position, max_length, overlong, tokenizer.bos_token_id)
                if lost := _lost(example, row.branches):
                    dropped[lost] += 1
                    continue
                truncated[PROMPT_CUT if overlong == "truncate_prompt_left" else COMPLETION_CUT] += 1
            rows.append(row)
            index.append(position)
    return rows, Report(index=tuple(index), dropped=dropped, truncated=truncated, longest=longest)


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    ask: Callable[[Example, int], list[Ask]],
) -> Iterator[tuple[int, list[Rendered]]]:
    """Render many examples at a time; the first faulty row's error surfaces, after the rows before it."""
    for start in range(0, len(examples), AT_ONCE):
        chunk = range(start, min(start + AT_ONCE, len(examples)))
        try:
            asked = [ask(examples[position], position) for position in chunk]
            made = iter(render_many(tokenizer, [a for asks in asked for a in asks], spans=False))
        except (DataError, ModelError):  # one by one: the error has to name its row
            for position in chunk:
                with _naming(examples[position], position):
                    asks = ask(examples[position], position)
                    one = render_many(tokenizer, asks, spans=False)
                yield position, one
            continue
        for position, asks in zip(chunk, asked, strict=True):
            yield position, [next(made) for _ in asks]


def _twins(example: Example, branches: Sequence[Branch]) -> bool:
    """Whether two responses of different rank have the same ids."""
    ranks: dict[tuple[int, ...], int | None] = {}
    responses = zip(example.responses, branches, strict=True) if branches else ()
    return any(ranks.setdefault(tuple(b.ids), r.rank) != r.rank for r, b in responses)


def _lost(example: Example, branches: Sequence[Branch]) -> str:
    """Why a row that was cut teaches nothing; '' where it does."""
    if not all(any(True in mask for mask in branch.masks.values()) for branch in branches):
        return UNTRAINED
    return TWINS if _twins(example, branches) else ""


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
