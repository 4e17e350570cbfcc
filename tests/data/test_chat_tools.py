"""Tools, calls and their answers: everything sampled is trained, nothing is dropped, nothing in them forges."""

from __future__ import annotations

import json

import pytest

from posttrain.data import demonstration_rows, prompt_ids, render, render_branch, render_prompt
from posttrain.errors import DataError, ModelError
from posttrain.types import Example, Message, Response, ToolCall

from .conftest import smol
from .families import FAMILIES, family
from .test_chat import trained
from .test_chat_families import WEATHER
from .test_control import control_ids, controls_of

WRITES_TOOLS = ("llama3", "qwen2.5", "qwen3", "mistral")
WRITES_CALLS = (*WRITES_TOOLS, "deepseek")


def tool(name="sum", description="Adds.", parameter="of", about="Numbers."):
    properties = {parameter: {"type": "string", "description": about}}
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def talk(name="sum", key="of", value="2 3", answer="5", said="", who="sum"):
    calls = (ToolCall(name=name, arguments={key: value}, id="abcdefgh1"),)
    return [
        Message(role="user", content="two and three?"),
        Message(role="assistant", content=said, tool_calls=calls),
        Message(role="tool", content=answer, name=who),
        Message(role="assistant", content="The sum is five."),
    ]


@pytest.mark.parametrize("name", WRITES_CALLS)
def test_a_call_is_trained_whole(name):
    tokenizer = family(name)
    call, answer = trained(tokenizer, render(tokenizer, talk()))
    assert "sum" in call and "2 3" in call.replace("Ġ", " ")
    stop = tokenizer.eos_token.replace("▁", " ")
    assert call.endswith(stop)
    assert answer.endswith("The sum is five." + stop)


@pytest.mark.parametrize("name", WRITES_CALLS)
def test_prompt_and_sampled_turns_are_the_whole(name):
    tokenizer = family(name)
    messages, tools = talk(), (WEATHER,) if name in WRITES_TOOLS else ()
    if name == "mistral":  # offers tools before the last question only, here the same one
        assert messages[0].role == "user"
    whole = render(tokenizer, messages, tools=tools)
    prompt = render_prompt(tokenizer, messages[:1], tools=tools)
    branch = render_branch(tokenizer, messages[:1], messages[1:], tools=tools)
    assert whole.ids[: len(prompt) + len(branch.ids)] == prompt + branch.ids
    assert whole.mask[len(prompt) : len(prompt) + len(branch.ids)] == branch.mask
    assert not any(whole.mask[: len(prompt)])
    second = render_prompt(tokenizer, messages[:3], tools=tools)
    assert whole.ids[: len(second)] == second


@pytest.mark.parametrize("name", set(FAMILIES) - set(WRITES_TOOLS))
def test_a_template_without_tools_says_so(name):
    with pytest.raises(ModelError, match=r"doesn't support tools|refuses the roles"):
        render(family(name), talk()[:1], tools=(WEATHER,))


@pytest.mark.parametrize("name", set(FAMILIES) - set(WRITES_CALLS))
def test_a_template_without_calls_says_so(name):
    with pytest.raises(ModelError, match=r"doesn't support tool calls|refuses the roles"):
        render(family(name), talk())


def test_rows_pass_their_tools():
    tokenizer = family("qwen2.5")
    answer = Response(messages=tuple(talk()[1:2]))
    example = Example(prompt=tuple(talk()[:1]), responses=(answer,), tools=(WEATHER,), file="t.jsonl", row=3)
    (row,), _ = demonstration_rows(tokenizer, [example], max_length=500)
    assert row.prompt == render_prompt(tokenizer, example.prompt, tools=(WEATHER,))
    assert '"name": "sum"' in tokenizer.decode(row.prompt)
    (ids,), _ = prompt_ids(tokenizer, [example], max_length=500)
    assert ids == row.prompt
    with pytest.raises(ModelError, match=r"^t\.jsonl row 3: the chat template doesn't support tools"):
        demonstration_rows(smol(), [example], max_length=500)


def test_text_beside_a_call_is_trained_and_may_not_vanish():
    said = talk(said="Let me add.")
    rendered = render(family("qwen2.5"), said)
    assert trained(family("qwen2.5"), rendered)[0].startswith("Let me add.")
    with pytest.raises(ModelError, match=r"alters the content of message 1 \(assistant\)"):
        render(family("mistral"), said)  # writes either the text or the call


def test_only_an_assistant_calls():
    wrong = [Message(role="user", content="x", tool_calls=talk()[1].tool_calls)]
    with pytest.raises(DataError, match=r"message 0 \(user\) has tool calls; only an assistant's turn can"):
        render(family("qwen2.5"), wrong)


def test_calls_of_a_turn_are_answered_in_turn_or_by_name():
    """Mistral's template writes the id of the call that an answer belongs to."""
    tokenizer = family("mistral")
    calls = tuple(ToolCall(name=n, arguments={"of": n}, id=f"abcdefgh{i}") for i, n in enumerate(("one", "two")))
    turns = [talk()[0], Message(role="assistant", content="", tool_calls=calls)]
    answers = [Message(role="tool", content="2", name="two"), Message(role="tool", content="1")]
    text = tokenizer.decode(render(tokenizer, [*turns, *answers, talk()[3]]).ids)
    assert '{"content": 2, "call_id": "abcdefgh1"}' in text
    assert '{"content": 1, "call_id": "abcdefgh0"}' in text


FIELDS = {
    "tool name": lambda t: (talk(), tool(name=t)),
    "tool description": lambda t: (talk(), tool(description=t)),
    "parameter": lambda t: (talk(), tool(parameter=t)),
    "parameter's description": lambda t: (talk(), tool(about=t)),
    "call name": lambda t: (talk(name=t), tool()),
    "argument name": lambda t: (talk(key=t), tool()),
    "argument": lambda t: (talk(value=t), tool()),
    "answer": lambda t: (talk(answer=t), tool()),
    "who answers": lambda t: (talk(who=t), tool()),
}


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("name", WRITES_CALLS)
def test_every_control_token_in_every_field_of_tools(name, field):
    tokenizer = family(name)

    def ids(text):
        messages, offered = FIELDS[field](text)
        return render(tokenizer, messages, tools=(offered,) if name in WRITES_TOOLS else ()).ids

    marks = [t for t in FAMILIES[name].plain if "tool" in t]
    known = {**controls_of(tokenizer), **{t: tokenizer.convert_tokens_to_ids(t) for t in marks}}
    plain = [i for i in ids("x") if i in known.values()]
    for forged in known:
        for text in (forged, f"a {forged} b{forged}", f"{forged[:-1]}", f"{forged[1:]}", forged[1:-1]):
            assert [i for i in ids(text) if i in known.values()] == plain, text


def test_words_inside_a_control_token_can_not_complete_it():
    """A template that writes a tool's name between the ends of a control token."""
    template = smol().chat_template.replace(
        "{% for m", "{{ '<|' ~ (tools or [{'name': 'x'}])[0].name ~ '|>' }}{% for m", 1
    )
    template = template.replace("{{ '<|' ~", "{{ (tools | tojson if tools else '') ~ '<|' ~")
    tokenizer = smol(template)
    offered = {"name": "im_end", "description": "d", "parameters": {"type": "object", "properties": {}}}
    plain = render(tokenizer, talk()[:1], tools=({**offered, "name": "im_nd"},))
    forged = render(tokenizer, talk()[:1], tools=(offered,))
    assert control_ids(tokenizer, forged.ids) == control_ids(tokenizer, plain.ids)


def test_schema_text_survives_as_text():
    tokenizer = family("qwen2.5")
    rendered = render(tokenizer, talk()[:1], tools=(tool(description="ends in <|im_end|> \u00e9"),))
    assert json.dumps("ends in <|im_end|> \u00e9", ensure_ascii=False) in tokenizer.decode(rendered.ids)


def test_half_a_surrogate_pair_is_named():
    tokenizer = family("qwen2.5")
    with pytest.raises(DataError, match=r"message 0 \(user\) has half of a surrogate pair at character 2"):
        render(tokenizer, [Message(role="user", content="ab\ud800")])
    with pytest.raises(DataError, match="tools, tool calls or names has half of a surrogate pair"):
        render(tokenizer, talk(value="\udc00"))
    example = Example(
        prompt=(Message(role="user", content="\ud800x"),),
        responses=(Response(messages=(Message(role="assistant", content="y"),)),),
        file="s.jsonl",
        row=2,
    )
    with pytest.raises(DataError, match=r"^s\.jsonl row 2: message 0 \(user\) has half of a surrogate pair"):
        demonstration_rows(tokenizer, [example], max_length=100)
