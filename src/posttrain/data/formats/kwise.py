"""Several completions by others: ranked, rated, compared two by two, right or wrong."""

from __future__ import annotations

from typing import Any

from posttrain.data.formats.basic import not_all_tied
from posttrain.data.formats.fields import (
    Place,
    Row,
    build,
    entries,
    fields_of,
    flag,
    number,
    shown,
    text,
    texts,
    whole,
)
from posttrain.data.formats.table import in_format
from posttrain.data.formats.turns import (
    Turns,
    answer_of,
    assistant,
    messages,
    spoken,
    told_apart,
    transcript,
    user,
)
from posttrain.data.formats.verifiable import final_number
from posttrain.types import Example, Preference, Response, Target


def _holds(value: Any, key: str) -> bool:
    """Whether a value is a list whose first entry is an object with that key."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and key in value[0]


@in_format(
    "nectar",
    ["prompt", "answers"],
    looks=lambda row: _holds(row["answers"], "rank"),
    example={
        "prompt": "\n\nHuman: What is 2 + 3?\n\nAssistant: ",
        "answers": [{"answer": "6", "model": "b", "rank": 2.0}, {"answer": "5", "model": "a", "rank": 1.0}],
    },
)
def nectar_row(row: Row, place: Place) -> list[Example]:
    """K answers with a rank each, 1 = best (Nectar); the prompt is a transcript up to the answer."""
    prompt = _open_transcript(row["prompt"], "prompt", place)
    answers: list[Turns] = []
    ranks: list[int] = []
    about: list[dict[str, Any]] = []
    for i, item in enumerate(entries(row["answers"], "answers", place, least=2)):
        item = fields_of(item, f"answers[{i}]", place, ("answer", "rank"))
        answers.append((assistant(text(item["answer"], f"answers[{i}].answer", place)),))
        ranks.append(whole(item["rank"], f"answers[{i}].rank", place))
        about.append({k: v for k, v in item.items() if k not in ("answer", "rank") and v is not None})
    not_all_tied(ranks, "answers", place)
    told_apart(answers, "answers", place)
    responses = tuple(
        Response(messages=turns, rank=rank - min(ranks), meta=meta)
        for turns, rank, meta in zip(answers, ranks, about, strict=True)
    )
    return [build(row, place, prompt=prompt, responses=responses)]


def _open_transcript(value: Any, field: str, place: Place) -> Turns:
    """The turns of a prompt: messages, or a transcript that ends where the assistant is to answer."""
    if isinstance(value, list):
        return messages(value, field, place)
    said = transcript(value, field, place)
    if said[-1] != ("assistant", ""):
        raise place.fault(field, "doesn't end in '\\n\\nAssistant:'", "end it where the answer begins")
    return spoken(said[:-1], field, place)


_STYLES = ("concise", "detailed", "detailed, marked up")


@in_format(
    "rm_bench",
    ["prompt", "chosen", "rejected", "subset"],
    looks=lambda row: all(
        isinstance(row[c], list) and row[c] and isinstance(row[c][0], str) for c in ("chosen", "rejected")
    ),
    example={
        "id": 8,
        "subset": "chat",
        "prompt": "What is 2 + 3?",
        "chosen": ["5", "It is 5, for 2 and 3 make 5.", "**5**, for 2 and 3 make 5."],
        "rejected": ["6", "It is 6, for 2 and 3 make 6.", "**6**, for 2 and 3 make 6."],
    },
)
def rm_bench_row(row: Row, place: Place) -> list[Example]:
    """Three right answers, tied, against three wrong ones, tied; the response's meta has the style (RM-Bench)."""
    prompt = (user(text(row["prompt"], "prompt", place)),)
    responses: list[Response] = []
    for rank, column in enumerate(("chosen", "rejected")):
        answers = texts(row[column], column, place, least=3, most=3)
        responses += [
            Response(messages=(assistant(answer),), rank=rank, label=rank == 0, meta={"style": style})
            for answer, style in zip(answers, _STYLES, strict=True)
        ]
    return [build(row, place, prompt=prompt, responses=tuple(responses), kind=text(row["subset"], "subset", place))]


_PREDICTIONS = tuple(f"prediction {i}" for i in range(1, 5))
_ORDER = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))


@in_format(
    "finegrained",
    ["question", "gold", *_PREDICTIONS, "feedback", "preference"],
    example={
        "question": "Where does the film take place?",
        "passages": [["The film", "It is set in Paris."]],
        "gold": "The film takes place in Paris.",
        "prediction 1": "In Paris. It is long.",
        "prediction 2": "In Paris.",
        "prediction 3": "In Rome.",
        "prediction 4": "In Nice.",
        "feedback": {
            "errors": [{"error type": "Irrelevant", "start": 10, "end": 21, "explanation": ""}],
            "missing-info": [],
            "corrected-prediction": "In Paris.",
        },
        "preference": [2, 1, 1, 1, 1, 0],
    },
)
def finegrained_row(row: Row, place: Place) -> list[Example]:
    """Four answers compared two by two, with ties, in any order; errors marked in the first; gold and corrected texts."""
    answers = [text(row[name], name, place) for name in _PREDICTIONS]
    given = entries(row["preference"], "preference", place, least=6, most=6)
    verdicts = [whole(value, f"preference[{i}]", place, (0, 1, 2)) for i, value in enumerate(given)]
    found = tuple(
        Preference(a=a, b=b, better=(0.5, 1.0, 0.0)[verdict]) for (a, b), verdict in zip(_ORDER, verdicts, strict=True)
    )
    feedback = fields_of(row["feedback"], "feedback", place, ("errors", "corrected-prediction"))
    marked = {"errors": _spans(feedback["errors"], len(answers[0]), place)}
    marked |= {"missing": entries(feedback.get("missing-info", []), "feedback.missing-info", place)}
    responses = tuple(
        Response(messages=(assistant(answer),), meta=marked if i == 0 else {}) for i, answer in enumerate(answers)
    )
    references = {"gold": text(row["gold"], "gold", place)}
    if feedback["corrected-prediction"] != "":  # nothing to correct
        field = "feedback.corrected-prediction"
        references["corrected"] = text(feedback["corrected-prediction"], field, place)
    prompt = (user(text(row["question"], "question", place)),)
    meta = {"references": references}
    return [build(row, place, prompt=prompt, responses=responses, preferences=found, meta=meta)]


def _spans(value: Any, length: int, place: Place) -> list[dict[str, Any]]:
    """Marked errors: type, start and end in characters of the answer, and an explanation."""
    spans: list[dict[str, Any]] = []
    for i, item in enumerate(entries(value, "feedback.errors", place)):
        field = f"feedback.errors[{i}]"
        item = fields_of(item, field, place, ("error type", "start", "end"))
        start, end = (whole(item[key], f"{field}.{key}", place) for key in ("start", "end"))
        if not 0 <= start <= end <= length:
            found = f"characters {start} to {end} of an answer of {length}"
            raise place.fault(field, found, "correct the span or remove the row")
        kind = text(item["error type"], f"{field}.error type", place)
        spans.append({"type": kind, "start": start, "end": end, "explanation": item.get("explanation", "")})
    return spans


_MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


@in_format(
    "gsm8k_solutions",
    ["question", "ground_truth", *_MODELS],
    example={
        "question": "What is 2 + 3?",
        "ground_truth": "2 + 3 = <<2+3=5>>5\nA: 5",
        **{name: {"is_correct": i == 3, "solution": f"It is {i + 2}.\nA: {i + 2}"} for i, name in enumerate(_MODELS)},
    },
)
def gsm8k_solutions_row(row: Row, place: Place) -> list[Example]:
    """Four models' solutions, each right or wrong, and the number that is right."""
    responses: list[Response] = []
    for name in _MODELS:
        item = fields_of(row[name], name, place, ("is_correct", "solution"))
        answer = (assistant(text(item["solution"], f"{name}.solution", place)),)
        right = flag(item["is_correct"], f"{name}.is_correct", place)
        responses.append(Response(messages=answer, label=right, meta={"model": name}))
    truth = text(row["ground_truth"], "ground_truth", place)
    target = Target(kind="number", answer=final_number(truth, "ground_truth", place, "\nA:"))
    prompt = (user(text(row["question"], "question", place)),)
    meta = {"references": {"ground_truth": truth}}
    return [build(row, place, prompt=prompt, responses=tuple(responses), target=target, meta=meta)]


_ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")


@in_format(
    "ultrafeedback",
    ["instruction", "completions"],
    looks=lambda row: _holds(row["completions"], "annotations"),
    example={
        "instruction": "What is 2 + 3?",
        "completions": [
            {
                "model": "a",
                "response": "5",
                "overall_score": 9,
                "annotations": {name: {"Rating": "5"} for name in _ASPECTS},
            },
            {
                "model": "b",
                "response": "6",
                "overall_score": 9,
                "annotations": {name: {"Rating": "2"} for name in _ASPECTS},
            },
        ],
    },
)
def ultrafeedback_row(row: Row, place: Place) -> list[Example]:
    """K answers rated by aspect; the score is the mean of the aspects rated, never 'overall_score' (UltraFeedback)."""
    responses: list[Response] = []
    for i, item in enumerate(entries(row["completions"], "completions", place, least=1)):
        field = f"completions[{i}]"
        item = fields_of(item, field, place, ("response", "annotations"))
        rated = _aspects(item["annotations"], f"{field}.annotations", place)
        responses.append(
            Response(
                messages=(assistant(text(item["response"], f"{field}.response", place)),),
                attributes=rated,
                score=sum(rated.values()) / len(rated),
                meta={key: value for key, value in item.items() if key != "response"},
            )
        )
    return [
        build(row, place, prompt=(user(text(row["instruction"], "instruction", place)),), responses=tuple(responses))
    ]


def _aspects(value: Any, field: str, place: Place) -> dict[str, float]:
    """Ratings by aspect; 'N/A' is the data's own word for none and leaves the aspect out."""
    rated: dict[str, float] = {}
    for name, entry in fields_of(value, field, place).items():
        entry = entry[0] if isinstance(entry, list) and len(entry) == 1 else entry
        rating = fields_of(entry, f"{field}.{name}", place, ("Rating",))["Rating"]
        if rating != "N/A":
            rated[name] = number(rating, f"{field}.{name}.Rating", place)
    if not rated:
        raise place.fault(field, "no aspect is rated", "rate at least one or remove the row")
    return rated


@in_format(
    "summarize",
    ["info", "summaries", "choice"],
    example={
        "info": {"post": "It rained all day and we stayed in.", "title": "Rain"},
        "summaries": [{"text": "Rain kept us in.", "policy": "a"}, {"text": "Sun.", "policy": "b"}],
        "choice": 0,
        "worker": "w1",
    },
)
def summarize_row(row: Row, place: Place) -> list[Example]:
    """Two summaries of a post and which is better ('Learning to summarize from human feedback')."""
    info = fields_of(row["info"], "info", place)
    source = "post" if info.get("post") is not None else "article"
    prompt = (user(text(info.get(source), f"info.{source}", place)),)
    given = entries(row["summaries"], "summaries", place, least=2, most=2)
    items = [fields_of(item, f"summaries[{i}]", place, ("text",)) for i, item in enumerate(given)]
    answers: list[Turns] = [
        (assistant(text(item["text"], f"summaries[{i}].text", place).strip()),) for i, item in enumerate(items)
    ]
    told_apart(answers, "summaries", place)
    choice = whole(row["choice"], "choice", place, (0, 1))
    responses = tuple(
        Response(messages=turns, rank=int(i != choice), meta={k: v for k, v in item.items() if k != "text"})
        for i, (turns, item) in enumerate(zip(answers, items, strict=True))
    )
    return [build(row, place, prompt=prompt, responses=responses, meta={"info": info})]


_HELPSTEER = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


@in_format(
    "helpsteer",
    ["prompt", "response", *_HELPSTEER],
    example={"prompt": "What is 2 + 3?", "response": "5", **dict.fromkeys(_HELPSTEER, 3)},
)
def helpsteer_row(row: Row, place: Place) -> list[Example]:
    """An answer rated from 0 to 4 by five attributes (HelpSteer, HelpSteer2)."""
    rated = {name: float(whole(row[name], name, place, range(5))) for name in _HELPSTEER}
    prompt = _helpsteer_prompt(row["prompt"], place)
    answer = answer_of(row["response"], "response", prompt, place)
    return [build(row, place, prompt=prompt, responses=(Response(messages=answer, attributes=rated),))]


def _helpsteer_prompt(value: Any, place: Place) -> Turns:
    """HelpSteer2 writes earlier turns into the prompt, between its own marks."""
    said = text(value, "prompt", place)
    first, *rest = said.split("<extra_id_1>")
    turns = [user(text(first.strip(), "prompt turn 1", place))]
    for i, part in enumerate(rest, 2):
        who, _, words = part.partition("\n")
        if who not in ("Assistant", "User"):
            raise place.fault(
                f"prompt turn {i}", f"speaker {shown(who)}, expected 'Assistant' or 'User'", "remove the row"
            )
        words = text(words.strip(), f"prompt turn {i}", place)
        turns.append(assistant(words) if who == "Assistant" else user(words))
    if turns[-1].role != "user":
        raise place.fault("prompt", "ends in an assistant turn", "end it with the turn to be answered")
    return tuple(turns)
