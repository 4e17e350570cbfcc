"""Where turns' sampling starts is seen without a rendering of every beginning, where a template is proved to allow it."""

from __future__ import annotations

import pytest

from posttrain.data import layout, render
from posttrain.data.causal import marked
from posttrain.data.layout import Scaffold, roles_only
from posttrain.data.template import template_key
from posttrain.types import Message

from .conftest import BUILDERS, CHATML, GEMMA, LAST_SYSTEM, LLAMA3, THINK, smol
from .families import FAMILIES, HERE, family

ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
BODY = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
SHIFTED = (
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}<|im_start|>{{ messages[0]['content'] }}"
    "{% else %}{% set turns = messages %}{% endif %}{% for m in turns %}" + BODY + "{% endfor %}" + ASKS
)
SPACED = "{%- for m in messages -%}\n  \n    {%- if true %}\n" + BODY + "\n    {%- endif %}\n{%- endfor %}\n" + ASKS
PATTERNS = [
    ("user", "assistant") * 6,
    ("system", *("user", "assistant") * 4),
    ("system", "assistant", "user", "user", "assistant", "assistant", "user", "assistant"),
    ("user", "assistant", "tool", "assistant", "user", "tool", "assistant", "user"),
]


def scaffold(tokenizer, roles, generation_prompt=False) -> Scaffold:
    return layout._scaffold(tokenizer, template_key(tokenizer), roles_only(*roles), generation_prompt)


def builds():
    yield from ((name, make()) for name, make in BUILDERS.items())
    yield from ((name, family(name)) for name in FAMILIES)
    yield from ((str(k), smol(template)) for k, template in enumerate((SHIFTED, SPACED, THINK, LAST_SYSTEM)))


def test_what_is_seen_is_what_rendering_every_beginning_gives(monkeypatch):
    proved = set()
    for name, tokenizer in builds():
        for roles in PATTERNS:
            try:
                found = [scaffold(tokenizer, roles, asked) for asked in (False, True)]
            except layout.ModelError:
                continue
            if layout._known_starts(tokenizer, *texts(tokenizer, roles), False):
                proved.add(name)
            with monkeypatch.context() as patch:
                patch.setattr(layout, "_known_starts", lambda *_: {})
                assert found == [scaffold(tokenizer, roles, asked) for asked in (False, True)], (name, roles)
    assert proved >= {"smol", "llama3", "smollm2", "chatml", "0", "1"}
    assert not proved & {"qwen3", "deepseek", "2", "3"}


def texts(tokenizer, roles):
    talk = roles_only(*roles)
    marks = layout.markers(talk)
    return talk, marks, layout.write(tokenizer, talk, marks, False)


@pytest.mark.parametrize("turns", [50, 400])
def test_long_conversations_are_not_rendered_once_a_turn(monkeypatch, turns):
    counted = []
    write = layout.write
    monkeypatch.setattr(layout, "write", lambda *a, **k: (counted.append(len(a[1].roles)), write(*a, **k))[1])
    tokenizer = smol()
    talk = [Message(role=("user", "assistant")[k % 2], content=f"turn {k}") for k in range(turns)]
    rendered = render(tokenizer, talk)
    assert len(rendered.spans) == turns
    assert counted.count(turns) == 4
    assert sum(counted) < 4 * turns + 40  # turns rendered, all renderings together


@pytest.mark.parametrize(
    ("template", "proved"),
    [
        (CHATML, True),
        (LLAMA3, True),
        (SHIFTED, True),
        (SPACED, True),
        (THINK, False),
        (LAST_SYSTEM, False),
        (GEMMA, True),
        ((HERE / "qwen2.5.jinja").read_text(encoding="utf-8"), False),
        ("{% for m in messages %}" + BODY + "{% if loop.last %}!{% endif %}{% endfor %}" + ASKS, False),
        ("{% for m in messages %}" + BODY + "{{ loop.nextitem.role }}{% endfor %}" + ASKS, False),
        ("{% for m in messages %}" + BODY + "{{ loop.previtem.role }}{% endfor %}" + ASKS, True),
        ("{% for m in messages %}" + BODY + "{% if add_generation_prompt %}!{% endif %}{% endfor %}" + ASKS, False),
        ("{{ messages | length }}{% for m in messages %}" + BODY + "{% endfor %}" + ASKS, False),
        ("{{ messages[-1].role }}{% for m in messages %}" + BODY + "{% endfor %}" + ASKS, False),
        ("{{ messages[1].role }}{% for m in messages %}" + BODY + "{% endfor %}" + ASKS, False),
        ("{% set x = messages[-2:] %}{% for m in x %}" + BODY + "{% endfor %}" + ASKS, False),
        ("{% set x = messages %}{{ x | last }}{% for m in messages %}" + BODY + "{% endfor %}" + ASKS, False),
        ("{% for m in messages %}" + BODY + "{% endfor %}end" + ASKS, False),
        ("{% for m in messages %}" + BODY + "{% endfor %}{% if add_generation_prompt %}{{ m }}{% endif %}", False),
        ("{% for m in messages if m.role == 'user' %}" + BODY + "{% endfor %}" + ASKS, False),
        (
            "{% for m in messages %}{% for k in messages %}{{ k.role }}{% endfor %}" + BODY + "{% endfor %}" + ASKS,
            False,
        ),
        ("{% macro f() %}{{ messages }}{% endmacro %}{% for m in messages %}" + BODY + "{{ f() }}{% endfor %}", False),
        ("{% for m in messages", False),
    ],
)
def test_proof_that_later_turns_change_nothing(template, proved):
    assert bool(marked(template)) is proved
