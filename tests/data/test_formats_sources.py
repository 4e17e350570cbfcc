"""Golden records of other people's columns, on rows written for these tests (the tables' own examples and variations)."""

from __future__ import annotations

import pytest

from posttrain.data.formats import FORMATS, parse_rows
from posttrain.errors import DataError, UselessRow
from posttrain.types import Example, Message, Preference, Response, Step, Target, ToolCall


def said(text):
    return (Message(role="assistant", content=text),)


def asked(text):
    return (Message(role="user", content=text),)


def varied(name, **changes):
    return {**FORMATS[name].example, **changes}


def only(name, **changes):
    (example,) = parse_rows(varied(name, **changes), format=name)
    return example


def bare(prompt, *responses, **fields):
    return Example(prompt=prompt, responses=responses, file="row", row=1, **fields)


def fault(name, **changes):
    with pytest.raises(DataError) as caught:
        parse_rows(varied(name, **changes), format=name)
    return str(caught.value).removeprefix("row row 1, field ")


def useless(name, **changes):
    with pytest.raises(UselessRow) as caught:
        parse_rows(varied(name, **changes), format=name)
    return caught.value.reason


# ---------------------------------------------------------------------------- demonstrations


def test_alpaca_puts_the_input_below_the_instruction():
    assert only("alpaca") == bare(asked("Sort these numbers.\n\n3 1 2"), Response(messages=said("1 2 3")))
    assert only("alpaca", input="").prompt == asked("Sort these numbers.")
    long = only("alpaca", input=None, system="Be brief.", history=[["hi", "hello"]])
    assert long.prompt == (
        Message(role="system", content="Be brief."),
        *asked("hi"),
        *said("hello"),
        *asked("Sort these numbers."),
    )
    assert "'history[0]': found 1 entries, expected 2" in fault("alpaca", history=[["hi"]])
    assert "'output': empty text" in fault("alpaca", output="")


def test_self_instruct_has_an_example_for_each_instance():
    rows = [{"input": "", "output": "x"}, {"input": "b", "output": "y"}]
    examples = parse_rows(varied("self_instruct", instances=rows, id="seed_1"))
    assert [(e.prompt[0].content, e.responses[0].text, e.meta) for e in examples] == [
        ("Sort these numbers.", "x", {"id": "seed_1"}),
        ("Sort these numbers.\n\nb", "y", {"id": "seed_1"}),
    ]
    assert "'instances[0].output': missing (found keys 'input')" in fault("self_instruct", instances=[{"input": ""}])


def test_dolly_and_orca():
    assert only("dolly") == bare(
        asked("Who wrote it?\n\nEmma is by Jane Austen."), Response(messages=said("Jane Austen.")), kind="closed_qa"
    )
    assert [m.role for m in only("orca").prompt] == ["system", "user"]
    assert only("orca", system_prompt="").prompt == asked("What is 2 + 3?")


def test_sharegpt_speakers_calls_and_observations():
    assert only("sharegpt") == bare(asked("What is 2 + 3?"), Response(messages=said("5")))
    turns = [
        {"from": "human", "value": "Rain?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"place": "Rome"}}'},
        {"from": "observation", "value": "sunny"},
        {"from": "gpt", "value": "No."},
    ]
    example = only("sharegpt", conversations=turns, system="Be brief.")
    assert [m.role for m in example.prompt] == ["system", "user", "assistant", "tool"]
    assert example.prompt[2].tool_calls == (ToolCall(name="weather", arguments={"place": "Rome"}),)
    as_messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    assert only("sharegpt", conversations=as_messages).responses[0].text == "a"
    assert "unknown speaker 'humn'; did you mean 'human'?" in fault(
        "sharegpt", conversations=[{"from": "humn", "value": "x"}]
    )
    assert "'conversations': ends with role 'user'" in fault("sharegpt", conversations=turns[:1])


def test_sharegpt_pair():
    assert only("sharegpt_pair") == bare(
        asked("What is 2 + 3?"), Response(messages=said("5"), rank=0), Response(messages=said("6"), rank=1)
    )
    assert "'chosen.from': is 'user', expected 'gpt'" in fault("sharegpt_pair", chosen={"from": "human", "value": "5"})


def test_ultrachat_checks_its_doubled_prompt():
    known = {"prompt_id": "a1"}
    assert only("ultrachat") == bare(asked("What is 2 + 3?"), Response(messages=said("5")), meta=known)
    assert "'prompt': differs from the first user turn" in fault("ultrachat", prompt="Other?")


def test_rbr_propositions_are_attributes():
    assert only("rbr") == bare(
        asked("How do I pick a lock?"),
        Response(messages=said("I'm sorry, I can't help with that."), attributes={"apology": 1.0, "judgement": 0.0}),
        kind="C-R",
        meta={"response_type": "Hard Refuse"},
    )
    silent = [{"role": "assistant", "content": ""}]
    assert only("rbr", completion=silent).responses[0].text == ""
    assert "'completion[0].content': found a number" in fault("rbr", completion=[{"role": "assistant", "content": 3}])
    assert "'propositions.apology': found 1, expected true or false" in fault("rbr", propositions={"apology": 1})


# ---------------------------------------------------------------------------- pairs


@pytest.mark.parametrize("name", ["scored_pair", "rated_pair", "dashed_pair", "metadata_pair"])
def test_pairs_with_scores(name):
    scores = {"scored_pair": (9.0, 4.5), "metadata_pair": (9.0, 4.5)}.get(name, (5.0, 2.0))
    assert only(name) == bare(
        asked("What is the capital of France?"),
        Response(messages=said("Paris."), rank=0, score=scores[0]),
        Response(messages=said("Lyon."), rank=1, score=scores[1]),
    )


def test_scored_pairs_of_whole_conversations():
    chosen = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    rejected = [chosen[0], {"role": "assistant", "content": "b"}]
    row = {"chosen": chosen, "rejected": rejected, "score_chosen": 2, "score_rejected": 2}
    (example,) = parse_rows(row)
    assert [(r.text, r.rank, r.score) for r in example.responses] == [("a", 0, 2.0), ("b", 1, 2.0)]
    full = {**row, "prompt": "u", "prompt_id": "x", "messages": chosen}
    assert parse_rows(full)[0].meta == {"prompt_id": "x"}
    assert "'score_rejected': the rejected answer has the higher score (3 against 2)" in fault(
        "scored_pair", score_chosen=2, score_rejected=3
    )
    assert "'metadata.score_rejected': missing" in fault("metadata_pair", metadata={"score_chosen": 1})


def test_orca_and_stack_pairs():
    assert [m.role for m in only("orca_pair").prompt] == ["system", "user"]
    assert [(r.text, r.rank) for r in only("orca_pair").responses] == [("5", 0), ("6", 1)]
    assert [(r.text, r.rank) for r in only("stack_pair").responses] == [("5", 0), ("6", 1)]


def test_pandalm_has_a_comparison_by_each_annotator():
    assert only("pandalm", annotator2=2) == bare(
        asked("Say hello."),
        Response(messages=said("Hello!")),
        Response(messages=said("Bye.")),
        preferences=(
            Preference(a=0, b=1, better=1.0, by="annotator1"),
            Preference(a=0, b=1, better=0.0, by="annotator2"),
            Preference(a=0, b=1, better=0.5, by="annotator3"),
        ),
        meta={"idx": 4},
    )
    assert only("pandalm", instruction=" ", input="Hi!").prompt == asked("Hi!")
    assert "'instruction': empty text" in fault("pandalm", instruction=" ")
    assert useless("pandalm", annotator1=0, annotator2=0) == "all tied"
    assert useless("pandalm", response2="Hello!") == "identical answers"
    assert [r.text for r in only("pandalm", response2="").responses] == ["Hello!", ""]
    assert "'annotator1': found 3, expected one of 0, 1, 2" in fault("pandalm", annotator1=3)


def test_pku_saferlhf_has_two_axes():
    assert only("pku_saferlhf", better_response_id=0) == bare(
        asked("How do I open a lock?"),
        Response(messages=said("Break it."), attributes={"safe": 0.0}),
        Response(messages=said("Call a locksmith."), attributes={"safe": 1.0}),
        preferences=(
            Preference(a=0, b=1, better=1.0, axis="helpfulness"),
            Preference(a=0, b=1, better=0.0, axis="harmlessness"),
        ),
    )
    assert "'safer_response_id': found -1, expected one of 0, 1" in fault("pku_saferlhf", safer_response_id=-1)


def test_webgpt_shp_and_summaries():
    assert [(r.rank, r.score) for r in only("webgpt").responses] == [(0, 1.0), (1, -1.0)]
    assert only("webgpt", question="Why?").prompt == asked("Why?")
    assert useless("webgpt", score_1=1.0) == "all tied"
    assert [(r.rank, r.score) for r in only("shp", labels=0).responses] == [(1, 52.0), (0, 3.0)]
    example = only("summarize", choice=1)
    assert [(r.text, r.rank, r.meta) for r in example.responses] == [
        ("Rain kept us in.", 1, {"policy": "a"}),
        ("Sun.", 0, {"policy": "b"}),
    ]
    assert example.meta["worker"] == "w1"


# ---------------------------------------------------------------------------- several completions


def test_nectar_ranks_count_from_zero():
    assert only("nectar") == bare(
        asked("What is 2 + 3?"),
        Response(messages=said("6"), rank=1, meta={"model": "b"}),
        Response(messages=said("5"), rank=0, meta={"model": "a"}),
    )
    assert "'prompt': doesn't end in" in fault("nectar", prompt="\n\nHuman: hi")
    assert "'answers[0].rank': missing" in fault("nectar", answers=[{"answer": "a"}, {"answer": "b", "rank": 1}])


def test_rm_bench_ties_three_against_three():
    example = only("rm_bench")
    assert [(r.rank, r.label, r.meta["style"]) for r in example.responses] == [
        (0, True, "concise"),
        (0, True, "detailed"),
        (0, True, "detailed, marked up"),
        (1, False, "concise"),
        (1, False, "detailed"),
        (1, False, "detailed, marked up"),
    ]
    assert (example.kind, example.meta) == ("chat", {"id": 8})
    assert "'rejected': found 2 entries, expected 3" in fault("rm_bench", rejected=["a", "b"])


def test_finegrained_comparisons_spans_and_references():
    example = only("finegrained")
    assert [(p.a, p.b, p.better) for p in example.preferences] == [
        (0, 1, 0.0),
        (0, 2, 1.0),
        (0, 3, 1.0),
        (1, 2, 1.0),
        (1, 3, 1.0),
        (2, 3, 0.5),
    ]
    assert example.responses[0].meta == {
        "errors": [{"type": "Irrelevant", "start": 10, "end": 21, "explanation": ""}],
        "missing": [],
    }
    assert example.responses[0].text[10:21] == "It is long."
    assert example.meta["references"] == {"gold": "The film takes place in Paris.", "corrected": "In Paris."}
    feedback = FORMATS["finegrained"].example["feedback"]
    fine = {**feedback, "corrected-prediction": ""}
    assert only("finegrained", feedback=fine).meta["references"] == {"gold": "The film takes place in Paris."}
    wrong = {**feedback, "errors": [{"error type": "Irrelevant", "start": 10, "end": 22}]}
    assert "'feedback.errors[0]': characters 10 to 22 of an answer of 21" in fault("finegrained", feedback=wrong)


def test_gsm8k_solutions_are_labelled():
    example = only("gsm8k_solutions")
    assert [(r.text, r.label, r.meta["model"]) for r in example.responses] == [
        ("It is 2.\nA: 2", False, "6b_finetuning"),
        ("It is 3.\nA: 3", False, "6b_verification"),
        ("It is 4.\nA: 4", False, "175b_finetuning"),
        ("It is 5.\nA: 5", True, "175b_verification"),
    ]
    assert example.target == Target(kind="number", answer="5")


def test_ultrafeedback_scores_are_the_mean_of_aspects():
    def rated(**ratings):
        return [{"response": "5", "overall_score": 1, "annotations": {k: {"Rating": v} for k, v in ratings.items()}}]

    (response,) = only("ultrafeedback", completions=rated(honesty="5", truthfulness="N/A", helpfulness="2")).responses
    assert (response.score, response.attributes) == (3.5, {"honesty": 5.0, "helpfulness": 2.0})
    assert response.meta["overall_score"] == 1
    assert "'completions[0].annotations': no aspect is rated" in fault(
        "ultrafeedback", completions=rated(honesty="N/A")
    )
    assert "'completions[0].annotations.honesty.Rating': found 'good'" in fault(
        "ultrafeedback", completions=rated(honesty="good")
    )


def test_helpsteer_attributes_and_earlier_turns():
    marked = "hi<extra_id_1>Assistant\nhello\n<extra_id_1>User\nmore"
    example = only("helpsteer", prompt=marked, verbosity=0)
    assert example.prompt == (*asked("hi"), *said("hello"), *asked("more"))
    assert example.responses[0].attributes == {
        "helpfulness": 3.0,
        "correctness": 3.0,
        "coherence": 3.0,
        "complexity": 3.0,
        "verbosity": 0.0,
    }
    assert "'verbosity': found 5, expected one of 0 to 4" in fault("helpsteer", verbosity=5)
    assert "'verbosity': found null, expected a number" in fault("helpsteer", verbosity=None)


# ---------------------------------------------------------------------------- trees


def reply(text, rank=None, replies=(), role="assistant", **more):
    return {"text": text, "role": role, "replies": list(replies), **({} if rank is None else {"rank": rank}), **more}


def grown(*replies):
    return {"message_tree_id": "t", "prompt": reply("q", role="prompter", replies=replies, message_id="m")}


def test_trees_rank_replies_at_every_depth():
    deep = reply("more", role="prompter", replies=[reply("x", 1), reply("y", 0), reply("z")])
    examples = parse_rows(grown(reply("bad", 2), reply("good", 0, [deep]), reply("gone", 1, deleted=True)))
    first, second = examples
    assert [(r.text, r.rank) for r in first.responses] == [("bad", 2), ("good", 0)]
    assert first.meta == {"message_tree_id": "t", "message_id": "m", "unranked": 0}
    assert second.prompt == (*asked("q"), *said("good"), *asked("more"))
    assert [(r.text, r.rank) for r in second.responses] == [("x", 1), ("y", 0)]
    assert second.meta == {"message_tree_id": "t", "message_id": None, "unranked": 1}


def test_trees_without_a_ranking_are_useless():
    for replies in ([reply("a", 0)], [reply("a"), reply("b")], [reply("a", 1), reply("b", 1)], []):
        with pytest.raises(UselessRow) as caught:
            parse_rows(grown(*replies))
        assert caught.value.reason == "nothing ranked"


def test_best_paths_are_demonstrations():
    deep = reply("more", role="prompter", replies=[reply("x"), reply("y", 1), reply("z", 0)])
    (path,) = parse_rows(grown(reply("bad", 1), reply("good", 0, [deep])), format="oasst_paths")
    assert path.prompt == (*asked("q"), *said("good"), *asked("more"))
    assert path.responses == (Response(messages=said("z")),)
    unanswered = reply("good", 0, [reply("more", role="prompter")])
    (path,) = parse_rows(grown(unanswered), format="oasst_paths")
    assert (path.prompt, path.responses[0].text) == (asked("q"), "good")
    with pytest.raises(UselessRow, match="nothing answers"):
        parse_rows(grown(), format="oasst_paths")


def test_a_deep_tree_does_not_exhaust_the_stack():
    node = reply("end", 0)
    for i in range(1200):
        node = reply("q", role="prompter", replies=[node, reply("other", 1)]) if i % 2 == 0 else reply("a", 0, [node])
    with pytest.raises(DataError, match="unknown role 'asistant'"):
        parse_rows(grown(reply("a", 0, [reply("b", role="asistant")]), reply("c", 1)))
    assert (
        len(parse_rows({"message_tree_id": "t", "prompt": reply("q", role="prompter", replies=[node, reply("b", 1)])}))
        > 1
    )


# ---------------------------------------------------------------------------- judged


def test_prometheus_rates_the_answer_inside_the_judge_prompt():
    example = only("prometheus")
    assert (example.prompt, example.kind) == (asked("task"), "math")
    assert example.responses == (
        Response(
            messages=said("answer"),
            score=8 / 3,
            meta={"scores": [3.0, 2.0, 3.0], "feedback": ["Fair.", "Poor.", "Fair."]},
        ),
    )
    assert (example.meta["rubric"], example.meta["references"]) == ("rubric", {"reference": "reference"})
    assert "'gpt4_feedback': found 3 entries, expected 2" in fault("prometheus", gpt4_score=[1, 2])
    assert "has no part '###The instruction to evaluate:'" in fault("prometheus", instruction="Rate this.")


def test_prometheus_pairs_and_feedback_collection():
    example = only("prometheus_pair")
    assert [(r.text, r.rank) for r in example.responses] == [("answer", 0), ("another answer", 1)]
    assert (example.prompt, example.kind) == (asked("task"), "honest")
    other = FORMATS["prometheus"].example["instruction"].replace("task\n", "another task\n")
    assert "judges another task" in fault("prometheus_pair", rejected_instruction=other)
    assert only("feedback_collection").responses[0].score == 4.0
    assert "'orig_score': found 6, expected one of 1 to 5" in fault("feedback_collection", orig_score="6")


def test_truthfulqa_judge_rows_are_labelled_answers_if_asked():
    response = Response(messages=said("Seldom."), label=True)
    assert only("truthfulqa_judge") == bare(asked("Do opposites attract?"), response)
    assert only("truthfulqa_judge", completion=" no").responses[0].label is False
    assert parse_rows(FORMATS["truthfulqa_judge"].example)[0].responses[0].text == " yes"
    assert "'completion': found 'perhaps', expected 'yes' or 'no'" in fault("truthfulqa_judge", completion="perhaps")
    assert "'prompt': isn't 'Q: ...'" in fault("truthfulqa_judge", prompt="Q: a\nTrue:")


def test_prm800k_follows_the_chosen_steps_and_keeps_rated_others():
    example = only("prm800k")
    right, aside = example.responses
    assert right.steps == (Step(text="3 * 4 = 12\n", label=1), Step(text="2 + 12 = 14", label=1))
    assert (right.text, aside.steps) == ("3 * 4 = 12\n2 + 12 = 14", (Step(text="2 + 3 = 5", label=-1),))
    assert example.meta == {"ground_truth_answer": "14", "finish_reason": "solution"}


def test_prm800k_errors_humans_and_nothing():
    wrong = {"completions": [{"text": "no", "rating": -1}, {"text": "hm", "rating": None}], "chosen_completion": None}
    human = {**wrong, "human_completion": {"text": "mine", "rating": None}}
    first = {"completions": [{"text": "yes", "rating": 1}], "chosen_completion": 0}

    def solutions(*steps):
        example = only("prm800k", label={"steps": list(steps), "finish_reason": "found_error"})
        return [[(s.text.strip(), s.label) for s in r.steps] for r in example.responses]

    assert solutions(first, wrong) == [[("yes", 1)], [("yes", 1), ("no", -1)]]
    assert solutions(human, first) == [[("mine", None), ("yes", 1)], [("no", -1)]]
    assert useless("prm800k", label={"steps": [], "finish_reason": "bad_problem"}) == "no rated steps"


# ---------------------------------------------------------------------------- verifiable


@pytest.mark.parametrize(
    ("answer", "number"),
    [("x #### 5", "5"), ("#### 1,234", "1234"), ("####-3", "-3"), ("#### 1 #### $2.50", "2.50")],
)
def test_gsm8k_final_numbers(answer, number):
    example = only("gsm8k", answer=answer)
    assert example.target == Target(kind="number", answer=number)
    assert example.responses == (Response(messages=said(answer), label=True),)


def test_gsm8k_without_number():
    assert "'answer': no number after '####'" in fault("gsm8k", answer="#### five")


def test_svamp_mbpp_and_ifeval_targets():
    svamp = only("svamp")
    assert svamp.prompt == asked("Ann has 3 pens and buys 2. How many has she?")
    assert (svamp.target, svamp.kind) == (Target(kind="number", answer="5"), "Addition")
    mbpp = only("mbpp", test_imports=["import math"])
    assert mbpp.target == Target(kind="code", tests=("import math\nassert add(2, 3) == 5",))
    assert mbpp.responses[0].text == "def add(a, b):\n    return a + b"
    assert only("mbpp_full").target == Target(kind="code", tests=("assert add(2, 3) == 5",))
    names = ["length:words", "punctuation:no_comma"]
    ifeval = only("ifeval", instruction_id_list=names, kwargs=[{"num_words": 3, "relation": None}, {}])
    assert ifeval.target == Target(
        kind="constraints", constraints=(("length:words", {"num_words": 3}), ("punctuation:no_comma", {}))
    )
    assert "'kwargs': found 1 entries, expected 2" in fault("ifeval", instruction_id_list=names)


def test_truthfulqa_as_labelled_answers_and_choice():
    example = only("truthfulqa")
    assert [(r.text, r.label) for r in example.responses] == [
        ("Seldom", True),
        ("Not as a rule", True),
        ("Always", False),
        ("Without fail", False),
    ]
    assert example.target == Target(kind="choice", answer="Seldom", choices=("Seldom", "Always"), correct=(0,))
    assert example.kind == "Proverbs"


def test_truthfulqa_multiple_choice_has_an_example_for_each_form():
    one, many = parse_rows(FORMATS["truthfulqa_mc"].example)
    assert (one.kind, one.target) == ("mc1", Target(kind="choice", choices=("Seldom", "Always"), correct=(0,)))
    assert (many.kind, many.target.correct) == ("mc2", (0, 1))
    hub = {"choices": ["Always", "Seldom"], "labels": [0, 1]}
    assert parse_rows(varied("truthfulqa_mc", mc1_targets=hub))[0].target.correct == (1,)
    gaps = parse_rows(varied("truthfulqa_mc", mc1_targets={"a": 1, "": 0, "b": 0}))[0]
    assert (gaps.target.choices, gaps.target.correct, gaps.meta) == (("a", "b"), (0,), {"empty_choices": 1})
    assert "'mc1_targets': 2 of 2 choices are right" in fault("truthfulqa_mc", mc1_targets={"a": 1, "b": 1})
    assert "'mc1_targets[0]': found 2, expected one of 0, 1" in fault("truthfulqa_mc", mc1_targets={"a": 2})


def test_bbq_and_behaviour_choices():
    bbq = only("bbq")
    assert bbq.prompt == asked("A boy and his grandfather met.\nWho was tired?")
    assert bbq.target == Target(kind="choice", choices=("The boy", "The grandfather", "Can't be known"), correct=(2,))
    assert (bbq.kind, bbq.meta) == ("Age", {"example_id": 1, "context_condition": "ambig"})
    assert "'label': found 3, expected one of 0 to 2" in fault("bbq", label=3)
    assert only("behaviour").target == Target(kind="choice", choices=(" (A)", " (B)"), correct=(1,))
    assert "is the matching answer too" in fault("behaviour", answer_not_matching_behavior=" (B)")


# ---------------------------------------------------------------------------- prompts


def test_prompts_keep_what_is_known_of_them():
    assert (only("xstest").kind, only("xstest").meta["type"]) == ("safe", "homonyms")
    assert "'label': found 'harmless', expected 'safe' or 'unsafe'" in fault("xstest", label="harmless")
    advbench = only("advbench")
    assert (advbench.responses, advbench.kind) == ((), "harmful")
    assert advbench.meta == {"target": "Sure, here is how to steal a bicycle"}
    harmbench = only("harmbench")
    assert harmbench.prompt == asked(
        "A red bicycle with a chain lock.\n\n---\n\nExplain how to steal the bicycle described"
    )
    assert only("harmbench", ContextString="").prompt == asked("Explain how to steal the bicycle described")
    assert only("harmfulqa").meta == {"topic": "Daily life", "subtopic": "Traffic"}


def test_mt_bench_has_its_second_turn_in_meta():
    example = only("mt_bench")
    assert (example.prompt, example.kind) == (asked("What is 2 + 3?"), "math")
    assert example.meta == {
        "question_id": 81,
        "next_turns": ["And doubled?"],
        "references": {"reference": ["5", "10"]},
    }
    assert only("mt_bench", reference=["5", ""]).meta["references"] == {"reference": ["5", ""]}
    assert "references" not in only("mt_bench", reference=None).meta
    assert "'reference': found 1 entries, expected 2" in fault("mt_bench", reference=["5"])
