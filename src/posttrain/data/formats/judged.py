"""Answers that a judge rated inside its own prompt (Prometheus), and solutions rated step by step (PRM800K)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from posttrain.data.formats.basic import stepped
from posttrain.data.formats.demonstrations import asked
from posttrain.data.formats.fields import (
    Place,
    Row,
    build,
    entries,
    fields_of,
    number_list,
    optional_text,
    shown,
    text,
    texts,
    whole,
)
from posttrain.data.formats.table import in_format
from posttrain.data.formats.turns import assistant, in_order, user
from posttrain.types import Example, Response, Step

_STEPS = 1000  # of a solution, since each step not gone on with makes a solution of all before it

_HEADS = {
    "task": "###The instruction to evaluate:\n",
    "answer": "###Response to evaluate:\n",
    "reference": "###Reference Answer (Score 5):\n",
    "rubric": "###Score Rubrics:\n",
    "end": "###Feedback:",
}
_JUDGE = "".join(f"{head}{name}\n\n" for name, head in _HEADS.items() if name != "end") + _HEADS["end"]


class JudgePrompt(NamedTuple):
    """The parts of a Prometheus judge prompt; ``reference`` is '' where none is given."""

    task: str
    answer: str
    reference: str
    rubric: str


def judge_prompt(value: Any, field: str, place: Place) -> JudgePrompt:
    """Return the parts of a Prometheus judge prompt, each from its heading to the next one."""
    rest = text(value, field, place).partition(_HEADS["task"])[2]
    if not rest:
        raise place.fault(field, "has no part '###The instruction to evaluate:'", "name the format or remove the row")
    task, _, rest = rest.partition("\n" + _HEADS["answer"])
    before, rubric_head, rubric = rest.rpartition("\n" + _HEADS["rubric"])
    rubric = rubric.rpartition("\n" + _HEADS["end"])[0]
    answer, _, reference = before.partition("\n" + _HEADS["reference"])
    if not rubric_head or not rubric.strip():
        raise place.fault(field, "has no parts 'Response', 'Score Rubrics' and 'Feedback'", "remove the row")
    parts = [text(part.strip(), f"{field} ({name})", place) for part, name in ((task, "task"), (answer, "response"))]
    return JudgePrompt(parts[0], parts[1], reference.strip(), rubric.strip())


@in_format(
    "prometheus",
    ["instruction", "gpt4_score", "gpt4_feedback"],
    reads=["category"],
    example={
        "instruction": _JUDGE,
        "gpt4_score": [3, 2, 3],
        "gpt4_feedback": ["Fair.", "Poor.", "Fair."],
        "category": "math",
    },
)
def prometheus_row(row: Row, place: Place) -> list[Example]:
    """The answer inside a judge's prompt; its score is the mean of the judge's, which stay in the response's meta."""
    parts = judge_prompt(row["instruction"], "instruction", place)
    scores = number_list(row["gpt4_score"], "gpt4_score", place)
    feedback = texts(row["gpt4_feedback"], "gpt4_feedback", place, least=len(scores), most=len(scores))
    answer = Response(
        messages=(assistant(parts.answer),),
        score=sum(scores) / len(scores),
        meta={"scores": scores, "feedback": feedback},
    )
    meta = {"judge_prompt": row["instruction"], "rubric": parts.rubric, **_reference(parts.reference)}
    kind = optional_text(row, "category", place)
    return [build(row, place, prompt=(user(parts.task),), responses=(answer,), kind=kind, meta=meta)]


def _reference(reference: str) -> dict[str, Any]:
    return {"references": {"reference": reference}} if reference else {}


@in_format(
    "prometheus_pair",
    ["chosen_instruction", "rejected_instruction"],
    reads=["source"],
    example={
        "source": "honest",
        "chosen_instruction": _JUDGE,
        "rejected_instruction": _JUDGE.replace("answer\n", "another answer\n"),
    },
)
def prometheus_pair_row(row: Row, place: Place) -> list[Example]:
    """The better and the worse answer inside two judge prompts for one task; the source is the kind."""
    columns = ("chosen_instruction", "rejected_instruction")
    chosen, rejected = (judge_prompt(row[column], column, place) for column in columns)
    if chosen.task != rejected.task:
        raise place.fault(columns[1], "judges another task than 'chosen_instruction'", "remove the row")
    pair = in_order([(assistant(parts.answer),) for parts in (chosen, rejected)], columns[1], place)
    meta = {
        "judge_prompts": [row[column] for column in columns],
        "rubric": chosen.rubric,
        **_reference(chosen.reference),
    }
    kind = optional_text(row, "source", place)
    return [build(row, place, prompt=(user(chosen.task),), responses=pair, kind=kind, meta=meta)]


@in_format(
    "feedback_collection",
    ["orig_instruction", "orig_response", "orig_score", "orig_feedback"],
    reads=["orig_reference_answer", "orig_criteria"],
    example={
        "orig_instruction": "What is 2 + 3?",
        "orig_response": "5",
        "orig_reference_answer": "It is 5.",
        "orig_criteria": "Is it right?",
        "orig_score": "4",
        "orig_feedback": "Right, but short.",
    },
)
def feedback_collection_row(row: Row, place: Place) -> list[Example]:
    """An answer with its score, 1 to 5, and the feedback in the response's meta (Feedback Collection)."""
    answer = Response(
        messages=(assistant(text(row["orig_response"], "orig_response", place)),),
        score=float(whole(row["orig_score"], "orig_score", place, range(1, 6))),
        meta={"feedback": [text(row["orig_feedback"], "orig_feedback", place)]},
    )
    rubric = optional_text(row, "orig_criteria", place)
    meta = {"rubric": rubric, **_reference(optional_text(row, "orig_reference_answer", place))}
    prompt = (user(asked(text(row["orig_instruction"], "orig_instruction", place), "")),)
    return [build(row, place, prompt=prompt, responses=(answer,), meta=meta)]


@in_format(
    "truthfulqa_judge",
    ["prompt", "completion"],
    example={"prompt": "Q: Do opposites attract?\nA: Seldom.\nTrue:", "completion": " yes"},
    asked=True,
)
def truthfulqa_judge_row(row: Row, place: Place) -> list[Example]:
    """An answer (it may be empty) that is true or not, from a judge's training row 'Q: ...', 'A: ...', 'True:' (TruthfulQA)."""
    asks = text(row["prompt"], "prompt", place)
    question, found, answer = asks.removeprefix("Q: ").rpartition("\nA: ")
    if not found or not asks.startswith("Q: ") or not answer.endswith("\nTrue:"):
        raise place.fault("prompt", "isn't 'Q: ...', 'A: ...' and 'True:', a line each", "name another format")
    verdict = text(row["completion"], "completion", place).strip()
    if verdict not in ("yes", "no"):
        raise place.fault(
            "completion", f"found {shown(verdict)}, expected 'yes' or 'no'", "correct it or remove the row"
        )
    said = text(answer.removesuffix("\nTrue:"), "prompt", place, empty=True)
    response = Response(messages=(assistant(said),), label=verdict == "yes")
    return [build(row, place, prompt=(user(text(question, "prompt", place)),), responses=(response,))]


@in_format(
    "prm800k",
    ["question", "label"],
    looks=lambda row: isinstance(row["label"], dict) and "steps" in row["label"],
    example={
        "question": {"problem": "What is 2 + 3 * 4?", "ground_truth_answer": "14"},
        "label": {
            "steps": [
                {
                    "completions": [{"text": "3 * 4 = 12", "rating": 1}, {"text": "2 + 3 = 5", "rating": -1}],
                    "human_completion": None,
                    "chosen_completion": 0,
                },
                {
                    "completions": [{"text": "2 + 12 = 14", "rating": 1}],
                    "human_completion": None,
                    "chosen_completion": 0,
                },
            ],
            "finish_reason": "solution",
        },
    },
)
def prm800k_row(row: Row, place: Place) -> list[Example]:
    """A solution by rated steps, then one for each step that was rated but not gone on with (PRM800K)."""
    question = fields_of(row["question"], "question", place, ("problem",))
    label = fields_of(row["label"], "label", place, ("steps",))
    path: list[Step] = []
    aside: list[list[Step]] = []
    for i, entry in enumerate(entries(label["steps"], "label.steps", place, most=_STEPS)):
        field = f"label.steps[{i}]"
        taken, others = _step(fields_of(entry, field, place, ("completions", "chosen_completion")), field, place)
        aside += [[*path, other] for other in others]
        if taken is None:  # every step on offer was wrong: the solution ends before it
            break
        path.append(taken)
    solutions = ([path] if any(step.label is not None for step in path) else []) + aside
    if not solutions:
        problem = f"no step is rated (finish_reason {shown(label.get('finish_reason'))})"
        raise place.useless("no rated steps", "label.steps", problem, "remove the row")
    responses = tuple(stepped(steps, "\n", place) for steps in solutions)
    prompt = (user(text(question["problem"], "question.problem", place)),)
    meta = {
        **{key: value for key, value in question.items() if key != "problem"},
        **{key: value for key, value in label.items() if key != "steps"},
    }
    return [build(row, place, prompt=prompt, responses=responses, meta=meta)]


def _step(entry: Mapping[str, Any], field: str, place: Place) -> tuple[Step | None, list[Step]]:
    """The step that the solution goes on with, None where there is none, and the rated others."""
    given = entries(entry["completions"] or [], f"{field}.completions", place)
    steps = [_rated(item, f"{field}.completions[{i}]", place) for i, item in enumerate(given)]
    chosen, human = entry["chosen_completion"], entry.get("human_completion")
    if chosen is not None:
        at = whole(chosen, f"{field}.chosen_completion", place, range(len(steps)))
        return steps[at], _labelled([*steps[:at], *steps[at + 1 :]])
    if human is not None:
        return _rated(human, f"{field}.human_completion", place), _labelled(steps)
    return None, _labelled(steps)


def _labelled(steps: Sequence[Step]) -> list[Step]:
    return [step for step in steps if step.label is not None]


def _rated(item: Any, field: str, place: Place) -> Step:
    item = fields_of(item, field, place, ("text",))
    rating = item.get("rating")
    label = None if rating is None else whole(rating, f"{field}.rating", place, (-1, 0, 1))
    return Step(text=text(item["text"], f"{field}.text", place), label=label)
