"""Scoring answers: every response of every example gets a score, a rank and a win rate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch

from posttrain.data.collate import demonstration_rows, prompt_ids
from posttrain.data.views import fault
from posttrain.losses.games import win_rates as rates_of_scores
from posttrain.models.load import load_tokenizer
from posttrain.registry import load_object
from posttrain.rewards.base import Completion, Reward, require_finite
from posttrain.rewards.builders import SAMPLED
from posttrain.rewards.comparing import WIN_RATE, Comparison, compared, self_play_scores, win_rates
from posttrain.rewards.panel import panel_base
from posttrain.stages import Context, Label
from posttrain.train.journal import Journal
from posttrain.train.progress import progress
from posttrain.types import Example, Preference, Response, stable_hash
from posttrain.work.generate import write_part
from posttrain.work.inputs import choose_dtype, load_any
from posttrain.work.rewarding import compares, judge_dir, reward_of

LONG = 1 << 20  # tokens of a prompt or answer: nothing is cut to be scored


@dataclass(frozen=True)
class Judge:
    """How examples are judged: ``ask`` gives what is journalled of each, ``read`` puts that into it."""

    ask: Callable[[Sequence[Example]], list[Any]]
    read: Callable[[Example, Any], Example]


def run(stage: Label, ctx: Context) -> None:
    """Score lot by lot, each on disk before the next, then write them all."""
    examples = load_any(stage, ctx)
    for i, example in enumerate(examples):
        if not example.responses:
            raise fault(example, i, "responses", "there are none to score", "sample some first")
    write_part(ctx, "samples", judged(stage, ctx, judge_of(stage, ctx), examples))


def judge_of(stage: Label, ctx: Context) -> Judge:
    """The stage's reward model, function or comparison."""
    if compares(stage.reward):
        compare: Comparison = load_object(str(stage.reward))
        return Judge(lambda lot: [tables(compare, e) for e in lot], with_comparisons)
    place = judge_dir(stage.reward, ctx)
    base = "" if place is None else panel_base(str(place))
    dtype = choose_dtype(stage.dtype, base) if base else torch.float32
    reward = reward_of(stage.reward, ctx, dtype=dtype, max_tokens=stage.max_tokens)
    tokenizer = load_tokenizer(base) if base else None
    return Judge(
        lambda lot: scores(reward, tokenizer, lot),
        lambda example, values: with_scores(example, values, stage.cut_score),
    )


def judged(stage: Label, ctx: Context, judge: Judge, examples: Sequence[Example]) -> Iterator[Example]:
    """Each example with what the judge says of its responses; how many got no score is said."""
    journal, abstained, done = Journal(ctx.dir / "journal"), 0, 0
    with progress(ctx.console, "label", len(examples)) as update:
        for first in range(0, len(examples), stage.at_once):
            lot = examples[first : first + stage.at_once]
            name = f"scores {stable_hash([[e.prompt_key, [r.text for r in e.responses]] for e in lot])}"
            found = journal.once(first, name, lambda lot=lot: judge.ask(lot))
            done += len(lot)
            update(done, "")
            for example, said in zip(lot, found, strict=True):
                out = judge.read(example, said)
                abstained += sum(r.score is None for r in out.responses)
                yield out
    if abstained:
        ctx.console.print(f"{abstained} responses got no score", highlight=False)


def tables(compare: Comparison, example: Example) -> list[list[float]]:
    """The probability of each response to beat each other one."""
    return compared(compare, example.prompt[-1].content, [r.text for r in example.responses])


def with_comparisons(example: Example, better: Sequence[Sequence[float]]) -> Example:
    """All comparisons; as scores the mean probability to beat each of the others, and the win rate."""
    pairs = combinations(range(len(better)), 2)
    found = with_scores(example, self_play_scores(better), None, win_rates(better))
    return replace(found, preferences=tuple(Preference(a=a, b=b, better=better[a][b]) for a, b in pairs))


def scores(reward: Reward, tokenizer: Any, examples: Sequence[Example]) -> list[list[float | None]]:
    """The reward of every response of some examples; None = it abstained."""
    completions = completions_of(tokenizer, examples)
    found = reward(completions)
    require_finite(completions, found)
    values = iter(found)
    return [[next(values).value for _ in e.responses] for e in examples]


def with_scores(
    example: Example, given: Sequence[float | None], cut_score: float | None, rates: Sequence[float] | None = None
) -> Example:
    """The example with score, rank and win rate of each response; the rate follows from the scores if not given."""
    judged = [
        cut_score if cut(r) and cut_score is not None else v for v, r in zip(given, example.responses, strict=True)
    ]
    first = dict[
        str, float | None
    ]()  # responses that read the same have one score: that of the first, of one that stopped
    for r, v in sorted(zip(example.responses, judged, strict=True), key=lambda pair: cut(pair[0])):
        first.setdefault(r.text, v)
    values = [first[r.text] for r in example.responses]
    known = [v for v in values if v is not None]
    best_first = sorted(set(known), reverse=True)
    if rates is None:
        wide = torch.tensor(known, dtype=torch.float64)
        rates = rates_of_scores(wide, torch.zeros(len(known), dtype=torch.long)).tolist()
    left = iter(rates)
    responses = tuple(
        replace(r, score=None, rank=None)
        if v is None
        else replace(
            r,
            score=v,
            rank=best_first.index(v) if len(known) == len(values) else None,
            attributes={**r.attributes, WIN_RATE: next(left)},
        )
        for r, v in zip(example.responses, values, strict=True)
    )
    return replace(example, responses=responses)


def completions_of(tokenizer: Any, examples: Sequence[Example]) -> list[Completion]:
    """What a reward sees of every response; as ids too where a reward model's tokenizer is given."""
    prompts = [[] for _ in examples] if tokenizer is None else prompt_ids(tokenizer, examples, max_length=LONG)[0]
    return [
        Completion(
            example=example,
            text=response.text,
            prompt_ids=tuple(prompt),
            ids=() if tokenizer is None else response_ids(tokenizer, example, response),
            truncated=cut(response),
            group=group,
        )
        for group, (example, prompt) in enumerate(zip(examples, prompts, strict=True))
        for response in example.responses
    ]


def response_ids(tokenizer: Any, example: Example, response: Response) -> tuple[int, ...]:
    """The ids of a response: those that were sampled, where this tokenizer reads them as its text; else it is rendered."""
    known = response.meta.get(SAMPLED, {}).get("ids")
    if known and tokenizer.decode(known, skip_special_tokens=True).strip() == response.text:
        return tuple(known)
    bare = replace(response, label=None, score=None, failure=None, rank=None)
    rows, _ = demonstration_rows(tokenizer, [replace(example, responses=(bare,), preferences=())], max_length=LONG)
    return tuple(rows[0].branches[0].ids)


def cut(response: Response) -> bool:
    """Whether a sample ended by length."""
    return not response.meta.get(SAMPLED, {}).get("stopped", True)
