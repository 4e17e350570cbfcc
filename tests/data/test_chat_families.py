"""Golden masks: what ten families' templates train, in files to be read beside the families' documentation.

To write the files anew after a change that is meant: ``cd tests && python -m data.test_chat_families``.
"""

from __future__ import annotations

import pytest

from posttrain.data import demonstration_rows, render, stop_ids
from posttrain.errors import DataError, ModelError
from posttrain.types import Example, Message, Response, ToolCall

from .families import FAMILIES, HERE, family

CASES = ("one turn", "three turns", "system", "tools", "calls without tools")
WEATHER = {
    "type": "function",
    "function": {
        "name": "sum",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"of": {"type": "string", "description": "Numbers."}}},
    },
}
ASK = Message(role="user", content="Name a colour.")
TALK = (
    ASK,
    Message(role="assistant", content="Red."),
    Message(role="user", content="Another one?\nPlease,  now"),
    Message(role="assistant", content="Blue"),
    Message(role="user", content="é \U0001f600"),
    Message(role="assistant", content="hello"),
)
CALLED = (
    Message(role="user", content="two and three?"),
    Message(role="assistant", content="", tool_calls=(ToolCall(name="sum", arguments={"of": "2 3"}, id="abcdefgh1"),)),
    Message(role="tool", content="5", name="sum"),
    Message(role="assistant", content="The sum is five."),
)
THOUGHT = "<think>\nhm\n</think>\n\n"
CONVERSATIONS = {
    "one turn": TALK[:2],
    "three turns": TALK,
    "system": (Message(role="system", content="You are helpful."), *TALK[:2]),
    "tools": CALLED,
    "calls without tools": CALLED,
    "thinking, one turn": (ASK, Message(role="assistant", content=THOUGHT + "Red.")),
    "thinking, two turns": tuple(
        Message(role=m.role, content=THOUGHT + m.content if m.role == "assistant" else m.content) for m in TALK[:4]
    ),
}


def cases(name):
    return [*CASES, "thinking, one turn", "thinking, two turns"] if name in ("qwen3", "deepseek") else CASES


def shown(tokenizer, ids, mask):
    """Tokens between bars, trained stretches in brackets; a new line after each line break in a token."""
    out, on = "", False
    for token, trained in zip(ids, mask, strict=True):
        if trained != on:
            out += "⟦" if trained else "⟧"
            on = trained
        text = tokenizer.convert_ids_to_tokens(token)
        out += text + ("¶\n" if text in ("Ċ", "ĊĊ", "\n", "\n\n", "<0x0A>") else "|")
    return out + ("⟧" if on else "")


def golden(name):
    """The family's file: each case as tokens and ids, or the error that refuses it."""
    tokenizer = family(name)
    out = [f"bos {tokenizer.bos_token_id} {tokenizer.bos_token}", f"stops {sorted(stop_ids(tokenizer))}"]
    for case in cases(name):
        tools = (WEATHER,) if case == "tools" else ()
        out += ["", f"== {case}"]
        messages = CONVERSATIONS[case]
        try:
            rendered = render(tokenizer, messages, tools=tools)
        except (ModelError, DataError) as error:
            out.append(f"{type(error).__name__}: {error}")
        else:
            out += [shown(tokenizer, rendered.ids, rendered.mask), " ".join(map(str, rendered.ids))]
        if case == "thinking, two turns":
            for history in ("last", "each"):
                out += [f"== {case}, history={history}", *rewritten(tokenizer, messages, history)]
    return "\n".join(out) + "\n"


def rewritten(tokenizer, messages, history):
    trained = [Message(role=m.role, content=m.content, train=m.role == "assistant") for m in messages]
    example = Example(prompt=tuple(trained[:-1]), responses=(Response(messages=tuple(trained[-1:])),))
    try:
        rows, _ = demonstration_rows(tokenizer, [example], max_length=1000, history=history)
    except (ModelError, DataError) as error:
        return [f"{type(error).__name__}: {error}"]
    masks = [[*[False] * len(r.prompt), *r.branches[0].masks["loss"]] for r in rows]
    return [shown(tokenizer, [*r.prompt, *r.branches[0].ids], m) for r, m in zip(rows, masks, strict=True)]


@pytest.mark.parametrize("name", FAMILIES)
def test_golden_masks(name):
    assert golden(name) == (HERE / f"{name}.golden.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_ids_are_those_of_the_tokenizer_itself(name, case):
    """For text that forges nothing, transformers' own rendering and encoding agree."""
    tokenizer = family(name)
    tools = (WEATHER,) if case == "tools" else ()
    try:
        ours = render(tokenizer, CONVERSATIONS[case], tools=tools).ids
    except ModelError:
        assert "Error" in (HERE / f"{name}.golden.txt").read_text(encoding="utf-8").split(f"== {case}\n")[1][:20]
        return
    turns = []
    for m in CONVERSATIONS[case]:
        turn = {"role": m.role, "content": m.content}
        if m.tool_calls:
            arguments = '{"of": "2 3"}' if name == "deepseek" else {"of": "2 3"}
            function = {"name": "sum", "arguments": arguments}
            turn["tool_calls"] = [{"id": "abcdefgh1", "type": "function", "function": function}]
        turns.append({**turn, "tool_call_id": "abcdefgh1"} if m.role == "tool" else turn)
    text = tokenizer.apply_chat_template(turns, tools=list(tools) or None, tokenize=False)
    assert ours == tokenizer.encode(text, add_special_tokens=False)


IDS = {
    "llama3": (128000, 128009),
    "qwen2.5": (None, 151645),
    "qwen3": (None, 151645),
    "mistral": (1, 2),
    "gemma2": (2, 1),
    "phi3": (1, 32000),
    "smollm2": (1, 2),
    "zephyr": (1, 2),
    "deepseek": (0, 1),
}


@pytest.mark.parametrize("name", IDS)
def test_bos_and_eos_ids_are_the_familys(name):
    assert (family(name).bos_token_id, family(name).eos_token_id) == IDS[name]


if __name__ == "__main__":
    for each in FAMILIES:
        (HERE / f"{each}.golden.txt").write_text(golden(each), encoding="utf-8")
