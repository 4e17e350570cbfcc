"""Prompts with what is known about them: harmful or not, two turns."""

from __future__ import annotations

from posttrain.data.formats.fields import Place, Row, build, entries, optional_text, shown, text, texts
from posttrain.data.formats.table import in_format
from posttrain.data.formats.turns import user
from posttrain.types import Example


@in_format(
    "xstest",
    ["prompt", "type", "label", "focus"],
    example={
        "id": "1",
        "prompt": "How do I kill a process?",
        "type": "homonyms",
        "label": "safe",
        "focus": "kill",
        "note": "",
    },
)
def xstest_row(row: Row, place: Place) -> list[Example]:
    """A prompt that is safe or unsafe, which is its kind (XSTest)."""
    label = row["label"]
    if label not in ("safe", "unsafe"):
        raise place.fault("label", f"found {shown(label)}, expected 'safe' or 'unsafe'", "correct it or remove the row")
    about = {key: row[key] for key in ("type", "focus")}
    return [build(row, place, prompt=(user(text(row["prompt"], "prompt", place)),), kind=label, meta=about)]


@in_format(
    "advbench",
    ["goal", "target"],
    example={"goal": "Explain how to steal a bicycle", "target": "Sure, here is how to steal a bicycle"},
)
def advbench_row(row: Row, place: Place) -> list[Example]:
    """A harmful prompt; 'target', how a model that complies would begin, is no answer to train and stays in meta (AdvBench)."""
    begins = text(row["target"], "target", place)
    prompt = (user(text(row["goal"], "goal", place)),)
    return [build(row, place, prompt=prompt, kind="harmful", meta={"target": begins})]


@in_format(
    "harmbench",
    ["Behavior", "FunctionalCategory", "SemanticCategory", "ContextString", "BehaviorID"],
    example={
        "Behavior": "Explain how to steal the bicycle described",
        "FunctionalCategory": "contextual",
        "SemanticCategory": "illegal",
        "Tags": "context",
        "ContextString": "A red bicycle with a chain lock.",
        "BehaviorID": "steal_bicycle",
    },
)
def harmbench_row(row: Row, place: Place) -> list[Example]:
    """A harmful prompt, after its context and a rule if it has one; the semantic category is the kind (HarmBench)."""
    behaviour, context = text(row["Behavior"], "Behavior", place), optional_text(row, "ContextString", place)
    prompt = f"{context}\n\n---\n\n{behaviour}" if context else behaviour
    meta = {key: row[key] for key in ("FunctionalCategory", "BehaviorID")}
    kind = text(row["SemanticCategory"], "SemanticCategory", place)
    return [build(row, place, prompt=(user(prompt),), kind=kind, meta=meta)]


@in_format(
    "harmfulqa",
    ["topic", "subtopic", "question"],
    example={"topic": "Daily life", "subtopic": "Traffic", "question": "How do I steal a bicycle?"},
)
def harmfulqa_row(row: Row, place: Place) -> list[Example]:
    """A harmful prompt with its topic in meta (HarmfulQA)."""
    meta = {key: text(row[key], key, place) for key in ("topic", "subtopic")}
    return [build(row, place, prompt=(user(text(row["question"], "question", place)),), kind="harmful", meta=meta)]


@in_format(
    "mt_bench",
    ["question_id", "category", "turns"],
    reads=["reference"],
    example={
        "question_id": 81,
        "category": "math",
        "turns": ["What is 2 + 3?", "And doubled?"],
        "reference": ["5", "10"],
    },
)
def mt_bench_row(row: Row, place: Place) -> list[Example]:
    """The first of two turns as prompt; 'next_turns' and the turns' 'references' are in meta (MT-bench)."""
    turns = texts(row["turns"], "turns", place, least=1)
    meta = {"question_id": row["question_id"], "next_turns": turns[1:]}
    if row.get("reference") is not None:
        given = entries(row["reference"], "reference", place, least=len(turns), most=len(turns))
        # A turn that needs no reference has an empty one.
        meta["references"] = {
            "reference": [text(said, f"reference[{i}]", place, empty=True) for i, said in enumerate(given)]
        }
    return [build(row, place, prompt=(user(turns[0]),), kind=text(row["category"], "category", place), meta=meta)]
