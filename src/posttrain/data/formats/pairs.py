"""Pairs by others: with scores, with several annotators or axes, with judge prompts, with many names of columns."""

from __future__ import annotations

from typing import Any

from posttrain.data.formats.basic import not_all_tied, transcript_pair
from posttrain.data.formats.demonstrations import asked, with_system
from posttrain.data.formats.fields import Place, Row, build, fields_of, flag, number, optional_text, text, whole
from posttrain.data.formats.table import in_format
from posttrain.data.formats.turns import Turns, answer_of, assistant, in_order, prompt_of, told_apart, user
from posttrain.types import Example, Preference, Response

_PAIR = {"prompt": "What is the capital of France?", "chosen": "Paris.", "rejected": "Lyon."}


def _scored(row: Row, place: Place, scores: list[tuple[str, Any]], meta: dict[str, Any] | None = None) -> list[Example]:
    """A pair whose answers have a score each; the chosen one's can't be the lower."""
    if "prompt" in row:
        prompt = prompt_of(row["prompt"], "prompt", place)
        answers = [answer_of(row[column], column, prompt, place) for column in ("chosen", "rejected")]
    else:
        prompt, answers = transcript_pair(row, place)
    better, worse = (number(value, column, place) for column, value in scores)
    if better < worse:
        found = f"the rejected answer has the higher score ({worse:g} against {better:g})"
        raise place.fault(scores[1][0], found, "swap the two or remove the row")
    ranked = in_order(answers, "rejected", place)
    responses = tuple(
        Response(messages=r.messages, rank=r.rank, score=s) for r, s in zip(ranked, (better, worse), strict=True)
    )
    return [build(row, place, prompt=prompt, responses=responses, meta=meta)]


@in_format(
    "scored_pair",
    ["chosen", "rejected", "score_chosen", "score_rejected"],
    reads=["prompt", "prompt_id", "messages"],
    example={**_PAIR, "score_chosen": 9.0, "score_rejected": 4.5},
)
def scored_pair_row(row: Row, place: Place) -> list[Example]:
    """A pair with a score each (UltraFeedback binarised); 'messages', the chosen side once more, is passed over."""
    meta = {"prompt_id": row["prompt_id"]} if "prompt_id" in row else None
    return _scored(row, place, [(column, row[column]) for column in ("score_chosen", "score_rejected")], meta)


@in_format(
    "rated_pair",
    ["chosen", "rejected", "chosen_rating", "rejected_rating"],
    reads=["prompt"],
    example={**_PAIR, "chosen_rating": 5, "rejected_rating": 2},
)
def rated_pair_row(row: Row, place: Place) -> list[Example]:
    """A pair with a rating each (TÜLU 3's preference mixes)."""
    return _scored(row, place, [(column, row[column]) for column in ("chosen_rating", "rejected_rating")])


@in_format(
    "dashed_pair",
    ["chosen", "rejected", "chosen-rating", "rejected-rating"],
    reads=["prompt"],
    example={**_PAIR, "chosen-rating": 5, "rejected-rating": 2},
)
def dashed_pair_row(row: Row, place: Place) -> list[Example]:
    """A pair with a rating each, in columns with a dash (UltraFeedback cleaned)."""
    return _scored(row, place, [(column, row[column]) for column in ("chosen-rating", "rejected-rating")])


@in_format(
    "metadata_pair",
    ["prompt", "chosen", "rejected", "metadata"],
    looks=lambda row: isinstance(row["metadata"], dict) and "score_chosen" in row["metadata"],
    example={**_PAIR, "metadata": {"score_chosen": 9.0, "score_rejected": 4.5}},
)
def metadata_pair_row(row: Row, place: Place) -> list[Example]:
    """A pair with a score each in 'metadata' (slices of UltraFeedback)."""
    keys = ("score_chosen", "score_rejected")
    given = fields_of(row["metadata"], "metadata", place, keys)
    rest = {key: value for key, value in given.items() if key not in keys}
    return _scored(row, place, [(f"metadata.{key}", given[key]) for key in keys], rest)


@in_format(
    "orca_pair",
    ["question", "chosen", "rejected"],
    reads=["system"],
    example={"system": "Answer briefly.", "question": "What is 2 + 3?", "chosen": "5", "rejected": "6"},
)
def orca_pair_row(row: Row, place: Place) -> list[Example]:
    """A pair after an optional system prompt (Orca's pairs)."""
    prompt = with_system(optional_text(row, "system", place), text(row["question"], "question", place))
    answers = [answer_of(row[column], column, prompt, place) for column in ("chosen", "rejected")]
    return [build(row, place, prompt=prompt, responses=in_order(answers, "rejected", place))]


@in_format(
    "stack_pair",
    ["question", "response_j", "response_k"],
    example={"question": "What is 2 + 3?", "response_j": "5", "response_k": "6"},
)
def stack_pair_row(row: Row, place: Place) -> list[Example]:
    """A pair of which response_j is the better (Stack Exchange paired)."""
    prompt = (user(text(row["question"], "question", place)),)
    answers = [answer_of(row[column], column, prompt, place) for column in ("response_j", "response_k")]
    return [build(row, place, prompt=prompt, responses=in_order(answers, "response_k", place))]


@in_format(
    "pandalm",
    ["instruction", "input", "response1", "response2", "annotator1", "annotator2", "annotator3"],
    example={
        "idx": 4,
        "instruction": "Say hello.",
        "input": "",
        "response1": "Hello!",
        "response2": "Bye.",
        "annotator1": 1,
        "annotator2": 1,
        "annotator3": 0,
    },
)
def pandalm_row(row: Row, place: Place) -> list[Example]:
    """Two answers, of which one may be empty, and three annotators' verdicts: 1 and 2 the better one, 0 a tie (PandaLM)."""
    given = optional_text(row, "input", place)
    # One row of the data has its whole instruction in 'input'.
    instruction = text(row["instruction"], "instruction", place, empty=bool(given))
    prompt = asked(instruction, given) if instruction.strip() else given
    answers = _two(row, ("response1", "response2"), place, silent=True)
    by = ("annotator1", "annotator2", "annotator3")
    verdicts = [whole(row[name], name, place, (0, 1, 2)) for name in by]
    if not any(verdicts):
        raise place.useless("all tied", by[0], "all annotators find a tie", "remove the row, it orders nothing")
    found = tuple(Preference(a=0, b=1, better=(0.5, 1.0, 0.0)[v], by=n) for n, v in zip(by, verdicts, strict=True))
    responses = tuple(Response(messages=turns) for turns in answers)
    return [build(row, place, prompt=(user(prompt),), responses=responses, preferences=found)]


def _two(row: Row, columns: tuple[str, str], place: Place, *, silent: bool = False) -> list[Turns]:
    """Two answers that have to differ; one may be empty if ``silent``."""
    answers: list[Turns] = [(assistant(text(row[column], column, place, empty=silent)),) for column in columns]
    told_apart(answers, columns[1], place)
    return answers


@in_format(
    "pku_saferlhf",
    [
        "prompt",
        "response_0",
        "response_1",
        "is_response_0_safe",
        "is_response_1_safe",
        "better_response_id",
        "safer_response_id",
    ],
    example={
        "prompt": "How do I open a lock?",
        "response_0": "Break it.",
        "response_1": "Call a locksmith.",
        "is_response_0_safe": False,
        "is_response_1_safe": True,
        "better_response_id": 1,
        "safer_response_id": 1,
    },
)
def pku_row(row: Row, place: Place) -> list[Example]:
    """Two answers compared on two axes, helpfulness and harmlessness; 'safe' is an attribute, 1 or 0."""
    answers = _two(row, ("response_0", "response_1"), place)
    responses = tuple(
        Response(messages=turns, attributes={"safe": float(flag(row[name], name, place))})
        for turns, name in zip(answers, ("is_response_0_safe", "is_response_1_safe"), strict=True)
    )
    better, safer = (whole(row[name], name, place, (0, 1)) for name in ("better_response_id", "safer_response_id"))
    found = (
        Preference(a=0, b=1, better=float(better == 0), axis="helpfulness"),
        Preference(a=0, b=1, better=float(safer == 0), axis="harmlessness"),
    )
    prompt = prompt_of(row["prompt"], "prompt", place)
    return [build(row, place, prompt=prompt, responses=responses, preferences=found)]


@in_format(
    "webgpt",
    ["question", "answer_0", "answer_1", "score_0", "score_1"],
    example={
        "question": {"full_text": "Why is the sky blue?"},
        "answer_0": "Air scatters blue light most.",
        "answer_1": "It mirrors the sea.",
        "score_0": 1.0,
        "score_1": -1.0,
    },
)
def webgpt_row(row: Row, place: Place) -> list[Example]:
    """Two answers with a score each from -1 to 1 (WebGPT's comparisons); equal scores make the row useless."""
    question = row["question"]
    about: dict[str, Any] = {}
    if isinstance(question, dict):
        about = {k: v for k, v in fields_of(question, "question", place, ("full_text",)).items() if k != "full_text"}
        question = question["full_text"]
    answers = _two(row, ("answer_0", "answer_1"), place)
    scores = [number(row[column], column, place) for column in ("score_0", "score_1")]
    not_all_tied(scores, "score_0", place)
    responses = tuple(
        Response(messages=turns, score=score, rank=int(score < max(scores)))
        for turns, score in zip(answers, scores, strict=True)
    )
    prompt, meta = (user(text(question, "question", place)),), {"question": about} if about else None
    return [build(row, place, prompt=prompt, responses=responses, meta=meta)]


@in_format(
    "shp",
    ["history", "human_ref_A", "human_ref_B", "labels"],
    reads=["score_A", "score_B"],
    example={
        "history": "How long do I boil an egg?",
        "human_ref_A": "Six minutes.",
        "human_ref_B": "An hour.",
        "labels": 1,
        "score_A": 52,
        "score_B": 3,
    },
)
def shp_row(row: Row, place: Place) -> list[Example]:
    """Two replies of which A is preferred where 'labels' is 1, B where it is 0; votes are scores (SHP)."""
    answers = _two(row, ("human_ref_A", "human_ref_B"), place)
    first = whole(row["labels"], "labels", place, (0, 1)) == 1
    scores = [number(row[name], name, place) if name in row else None for name in ("score_A", "score_B")]
    responses = tuple(
        Response(messages=turns, score=score, rank=rank)
        for turns, score, rank in zip(answers, scores, (0, 1) if first else (1, 0), strict=True)
    )
    return [build(row, place, prompt=(user(text(row["history"], "history", place)),), responses=responses)]
