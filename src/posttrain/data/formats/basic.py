"""This library's own columns: prompts, completions, pairs, rankings, messages and whole transcripts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from posttrain.data.formats.fields import Place, Row, build, entries, fields_of, flag, kind_of, number, text, whole
from posttrain.data.formats.table import in_format
from posttrain.data.formats.turns import (
    Turns,
    answer_of,
    conversation,
    identity,
    in_order,
    messages,
    prompt_of,
    spoken,
    told_apart,
    tools,
    transcript,
)
from posttrain.types import Example, Preference, Response, Step

_QUESTION = "What is the capital of France?"
_TURNS = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": "Paris."}]


@in_format("prompt", ["prompt"], reads=["tools"], example={"prompt": _QUESTION})
def prompt_row(row: Row, place: Place) -> list[Example]:
    """A prompt, as text or messages."""
    return [build(row, place, prompt=prompt_of(row["prompt"], "prompt", place), tools=tools(row.get("tools"), place))]


@in_format(
    "completion", ["prompt", "completion"], reads=["tools"], example={"prompt": _QUESTION, "completion": "Paris."}
)
def completion_row(row: Row, place: Place) -> list[Example]:
    """A demonstration: a prompt and its answer, each as text or messages."""
    prompt, answer = _one(row, place)
    return [_answered(row, place, [Response(messages=answer)], prompt)]


@in_format(
    "labelled",
    ["prompt", "completion", "label"],
    reads=["tools"],
    example={"prompt": _QUESTION, "completion": "Lyon.", "label": False},
)
def labelled_row(row: Row, place: Place) -> list[Example]:
    """An answer that is good or not (KTO's columns)."""
    prompt, answer = _one(row, place)
    return [_answered(row, place, [Response(messages=answer, label=flag(row["label"], "label", place))], prompt)]


@in_format(
    "rated",
    ["prompt", "completion", "score"],
    reads=["tools"],
    example={"prompt": _QUESTION, "completion": "Paris.", "score": 4.5},
)
def rated_row(row: Row, place: Place) -> list[Example]:
    """An answer and its score; of a list of scores, the mean, and the list in the response's meta."""
    value = row["score"]
    scores = [value] if not isinstance(value, list) else entries(value, "score", place, least=1)
    found = [number(s, f"score[{i}]" if value is scores else "score", place) for i, s in enumerate(scores)]
    meta = {"scores": found} if value is scores else {}
    prompt, answer = _one(row, place)
    return [_answered(row, place, [Response(messages=answer, score=sum(found) / len(found), meta=meta)], prompt)]


@in_format(
    "attributes",
    ["prompt", "completion", "attributes"],
    reads=["tools"],
    example={"prompt": _QUESTION, "completion": "Paris.", "attributes": {"correctness": 4, "verbosity": 0}},
)
def attributes_row(row: Row, place: Place) -> list[Example]:
    """An answer and named ratings of it."""
    given = fields_of(row["attributes"], "attributes", place)
    if not given:
        raise place.fault("attributes", "no rating", "name at least one or remove the row")
    found = {text(k, "attributes", place): number(v, f"attributes.{k}", place) for k, v in given.items()}
    prompt, answer = _one(row, place)
    return [_answered(row, place, [Response(messages=answer, attributes=found)], prompt)]


@in_format(
    "pair",
    ["prompt", "chosen", "rejected"],
    reads=["tools"],
    example={"prompt": _QUESTION, "chosen": "Paris.", "rejected": "Lyon."},
)
def pair_row(row: Row, place: Place) -> list[Example]:
    """A better and a worse answer, each as text, messages or the whole conversation."""
    prompt = prompt_of(row["prompt"], "prompt", place)
    answers = [answer_of(row[c], c, prompt, place) for c in ("chosen", "rejected")]
    return [_answered(row, place, in_order(answers, "rejected", place), prompt)]


@in_format(
    "ranking",
    ["prompt", "completions"],
    reads=["failures", "tools"],
    example={"prompt": _QUESTION, "completions": ["Paris.", "It is Paris, I think.", "Lyon."]},
)
def ranking_row(row: Row, place: Place) -> list[Example]:
    """K answers, best first; ``failures`` may say how each fails."""
    prompt, answers = _several(row, place)
    failures = row.get("failures")
    failures = [None] * len(answers) if failures is None else failures
    if not isinstance(failures, list) or len(failures) != len(answers):
        found = f"{len(failures)} entries" if isinstance(failures, list) else kind_of(failures)
        wanted = f"found {found}, expected {len(answers)} (one a completion)"
        raise place.fault("failures", wanted, "use null where there is none")
    for i, label in enumerate(failures):
        if label is not None and not (isinstance(label, str) and label.strip()):
            found = f"found {kind_of(label)}, expected a label or null"
            raise place.fault(f"failures[{i}]", found, "name the failure or use null")
    told_apart(answers, "completions", place)
    ranked = [Response(messages=m, rank=i, failure=f) for i, (m, f) in enumerate(zip(answers, failures, strict=True))]
    return [_answered(row, place, ranked, prompt)]


@in_format(
    "ranks",
    ["prompt", "completions", "ranks"],
    reads=["tools"],
    example={"prompt": _QUESTION, "completions": ["Lyon.", "Paris.", "It is Paris."], "ranks": [1, 0, 0]},
)
def ranks_row(row: Row, place: Place) -> list[Example]:
    """K answers and their ranks, smallest = best, equal = tied (InstructGPT's comparisons)."""
    prompt, answers = _several(row, place)
    given = entries(row["ranks"], "ranks", place, least=len(answers), most=len(answers))
    ranks = [whole(rank, f"ranks[{i}]", place) for i, rank in enumerate(given)]
    ranked = [Response(messages=m, rank=r - min(ranks)) for m, r in zip(answers, ranks, strict=True)]
    not_all_tied(ranks, "ranks", place)
    told_apart(answers, "completions", place)
    return [_answered(row, place, ranked, prompt)]


@in_format(
    "scores",
    ["prompt", "completions", "scores"],
    reads=["tools"],
    example={"prompt": _QUESTION, "completions": ["Paris.", "Lyon."], "scores": [0.9, 0.1]},
)
def scores_row(row: Row, place: Place) -> list[Example]:
    """K answers and a score each; they needn't stand in order."""
    prompt, answers = _several(row, place)
    given = entries(row["scores"], "scores", place, least=len(answers), most=len(answers))
    scores = [number(score, f"scores[{i}]", place) for i, score in enumerate(given)]
    scored = [Response(messages=m, score=s) for m, s in zip(answers, scores, strict=True)]
    return [_answered(row, place, scored, prompt)]


@in_format(
    "comparisons",
    ["prompt", "completions", "comparisons"],
    reads=["tools"],
    example={"prompt": _QUESTION, "completions": ["Paris.", "Lyon.", "Nice."], "comparisons": [[0, 1], [2, 1]]},
)
def comparisons_row(row: Row, place: Place) -> list[Example]:
    """K answers and comparisons of two: [better, worse] positions, or {"a", "b", "better", "axis", "by"}."""
    prompt, answers = _several(row, place)
    given = entries(row["comparisons"], "comparisons", place, least=1)
    found = tuple(_comparison(item, f"comparisons[{i}]", len(answers), place) for i, item in enumerate(given))
    offered = tools(row.get("tools"), place)
    responses = tuple(Response(messages=m) for m in answers)
    return [build(row, place, prompt=prompt, responses=responses, preferences=found, tools=offered)]


def _comparison(item: Any, field: str, count: int, place: Place) -> Preference:
    if isinstance(item, list):
        a, b = entries(item, field, place, least=2, most=2)
        better, axis, by = 1.0, "", ""
    else:
        item = fields_of(item, field, place, ("a", "b", "better"))
        a, b, better = item["a"], item["b"], number(item["better"], f"{field}.better", place)
        axis, by = (text(item.get(key, ""), f"{field}.{key}", place, empty=True) for key in ("axis", "by"))
    a, b = (whole(v, field, place, range(count)) for v in (a, b))
    if a == b or not 0 <= better <= 1:
        found = f"compares answer {a} with itself" if a == b else f"better is {better:g}, expected 0 to 1"
        raise place.fault(field, found, "correct it or remove the comparison")
    return Preference(a=a, b=b, better=better, axis=axis, by=by)


@in_format(
    "steps",
    ["prompt", "completions", "labels"],
    reads=["tools"],
    example={"prompt": "2 + 3 * 4 = ?", "completions": ["3 * 4 = 12", "2 + 12 = 15"], "labels": [True, False]},
)
def steps_row(row: Row, place: Place) -> list[Example]:
    """One answer in steps, each right or wrong: true and false, or 1, 0 (neutral) and -1."""
    prompt = prompt_of(row["prompt"], "prompt", place)
    given = entries(row["completions"], "completions", place, least=1)
    labels = entries(row["labels"], "labels", place, least=len(given), most=len(given))
    found: list[Step] = []
    for i, (step, label) in enumerate(zip(given, labels, strict=True)):
        words = text(step, f"completions[{i}]", place)
        if isinstance(label, bool):
            value = 1 if label else -1
        else:
            value = None if label is None else whole(label, f"labels[{i}]", place, (-1, 0, 1))
        found.append(Step(text=words, label=value))
    return [_answered(row, place, [stepped(found, "\n", place)], prompt)]


def stepped(found: Sequence[Step], between: str, place: Place, meta: dict[str, Any] | None = None) -> Response:
    """Return an answer in steps; each step but the last is followed by ``between``, so that steps join to the answer."""
    last = len(found) - 1
    whole_steps = tuple(Step(text=s.text + (between if i < last else ""), label=s.label) for i, s in enumerate(found))
    content = text("".join(s.text for s in whole_steps), "completions", place)
    return Response(messages=answer_of(content, "completions", (), place), steps=whole_steps, meta=meta or {})


@in_format("messages", ["messages"], reads=["tools"], example={"messages": _TURNS})
def messages_row(row: Row, place: Place) -> list[Example]:
    """A conversation that ends with the assistant's answer; tools, tool calls and text parts are read (TÜLU mixes)."""
    prompt, responses = conversation(messages(row["messages"], "messages", place), "messages", place)
    return [_answered(row, place, responses, prompt)]


@in_format(
    "transcripts",
    ["chosen", "rejected"],
    reads=["tools"],
    example={
        "chosen": f"\n\nHuman: {_QUESTION}\n\nAssistant: Paris.",
        "rejected": f"\n\nHuman: {_QUESTION}\n\nAssistant: Lyon.",
    },
)
def transcripts_row(row: Row, place: Place) -> list[Example]:
    """Two conversations that differ in the last answer only, as transcripts (hh-rlhf) or messages (Skywork-Reward)."""
    prompt, answers = transcript_pair(row, place)
    return [_answered(row, place, in_order(answers, "rejected", place), prompt)]


def transcript_pair(row: Row, place: Place) -> tuple[Turns, list[Turns]]:
    """Return the shared turns and the two last answers of the columns 'chosen' and 'rejected'.

    A fault names everything that is wrong with the two conversations' ends and with what they share.
    """
    if row["chosen"] == row["rejected"]:
        problem = "answers 0 and 1 (from 0) are identical, so their order means nothing"
        raise place.useless("identical answers", "rejected", problem, "remove the row or one of them")
    sides = {column: _side(row[column], column, place) for column in ("chosen", "rejected")}
    wrong = [(column, problem) for column, (said, _) in sides.items() if (problem := _bad_end(said))]
    if problem := _differ(*(said for said, _ in sides.values())):
        wrong.append(("rejected", problem))
    if wrong:
        problem = ", and ".join(problem for _, problem in wrong)
        raise place.fault(wrong[0][0], problem, "remove the row, or give the turns to be answered as 'prompt'")
    chosen, rejected = (turns or spoken(said, column, place) for column, (said, turns) in sides.items())
    return chosen[:-1], [chosen[-1:], rejected[-1:]]


_Said = list[tuple[str, str]]


def _side(value: Any, column: str, place: Place) -> tuple[_Said, Turns]:
    """Role and text (which may be empty) of each turn, and, of a conversation that isn't a transcript, its messages."""
    if isinstance(value, str):
        return transcript(value, column, place), ()
    turns = messages(value, column, place)
    said = [(turn.role, repr(identity((turn,))) if turn.tool_calls else turn.content) for turn in turns]
    return said, turns


def _bad_end(said: _Said) -> str:
    """What is wrong with a conversation that should end in an answer; '' = nothing."""
    role, words = said[-1]
    if role != "assistant" or len(said) < 2:
        found = {"user": "ends with a Human turn: it "}.get(role, "")
        return f"{found}doesn't end in an assistant turn after another turn"
    return "" if words.strip() else "the final answer is empty"


def _differ(chosen: _Said, rejected: _Said) -> str:
    """Where two conversations part before their last turn; '' = they share all others."""
    if chosen[:-1] == rejected[:-1]:
        return ""
    length = max(len(chosen), len(rejected))
    part = next(i for i in range(length) if chosen[i : i + 1] != rejected[i : i + 1])
    counts = f"{len(rejected)} and {len(chosen)} turns"
    return f"the turns before the last differ: 'rejected' differs from 'chosen' from turn {part + 1} on ({counts})"


def not_all_tied(ranks: Sequence[float], field: str, place: Place) -> None:
    """Check that ranks or scores order something; else the row is useless."""
    if len(set(ranks)) < 2:
        raise place.useless(
            "all tied", field, f"all {len(ranks)} answers are tied", "remove the row, it orders nothing"
        )


def _several(row: Row, place: Place) -> tuple[Turns, list[Turns]]:
    """The prompt and the answers of 'completions', at least 2."""
    prompt = prompt_of(row["prompt"], "prompt", place)
    given = row["completions"]
    if not isinstance(given, list) or len(given) < 2:
        found = f"{len(given)} entries" if isinstance(given, list) else kind_of(given)
        wanted = f"found {found}, expected a list of at least 2, best first"
        raise place.fault("completions", wanted, "one answer goes in 'completion'")
    return prompt, [answer_of(entry, f"completions[{i}]", prompt, place) for i, entry in enumerate(given)]


def _one(row: Row, place: Place) -> tuple[Turns, Turns]:
    """The prompt and the answer of 'completion'."""
    prompt = prompt_of(row["prompt"], "prompt", place)
    return prompt, answer_of(row["completion"], "completion", prompt, place)


def _answered(row: Row, place: Place, responses: Sequence[Response], prompt: Turns) -> Example:
    return build(row, place, prompt=prompt, responses=tuple(responses), tools=tools(row.get("tools"), place))
