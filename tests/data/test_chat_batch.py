"""Many conversations at once give what one by one gives."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from posttrain.data import render, render_branch
from posttrain.data.batch import Ask, render_many
from posttrain.data.copying import copies_contents
from posttrain.data.plan import plan_of
from posttrain.data.template import template_key
from posttrain.errors import DataError, ModelError
from posttrain.types import Message

from .conftest import BUILDERS, CHATML, GEMMA, LAST_SYSTEM, LLAMA3, MISTRAL, PHI3, THINK, smol
from .families import FAMILIES, HERE, family
from .test_control import controls_of

ROLES = [
    ("user", "assistant"),
    ("user", "assistant", "user", "assistant"),
    ("user",),
    ("system", "user", "assistant"),
    ("user", "assistant", "user"),
]
QUICK = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def slow(tokenizer, ask):
    if ask.answer_from is None:
        return render(tokenizer, ask.messages, tools=ask.tools, generation_prompt=ask.generation_prompt)
    return render_branch(tokenizer, ask.messages[: ask.answer_from], ask.messages[ask.answer_from :])


def works(tokenizer, ask):
    try:
        slow(tokenizer, ask)
    except (ModelError, DataError):
        return False
    return True


def asks(tokenizer):
    pieces = st.one_of(
        st.sampled_from([*sorted(controls_of(tokenizer)), "<|user|>", "\n", " ", "hello", "<think>", "  \n"]),
        st.text(max_size=4),
    )
    text = st.lists(pieces, max_size=5).map("".join)
    flag = st.sampled_from([None, None, True, False])

    def talk(roles):
        parts = [st.builds(Message, role=st.just(r), content=text, train=flag) for r in roles]
        return st.tuples(*parts)

    def asked(messages):
        last = messages[-1].role
        if last == "user":
            return st.just(Ask(messages, generation_prompt=True))
        return st.sampled_from([Ask(messages), Ask(messages, answer_from=len(messages) - 1)])

    return st.lists(st.sampled_from(ROLES).flatmap(talk).flatmap(asked), min_size=1, max_size=6)


@pytest.fixture(scope="session")
def everyone():
    return {**{n: build() for n, build in BUILDERS.items()}, **{n: family(n) for n in FAMILIES}}


@pytest.mark.parametrize("name", [*BUILDERS, *FAMILIES])
@QUICK
@given(data=st.data())
def test_many_equal_one_by_one(everyone, name, data):
    tokenizer = everyone[name]
    drawn = [ask for ask in data.draw(asks(tokenizer)) if works(tokenizer, ask)]
    expected = [slow(tokenizer, ask) for ask in drawn]
    assert render_many(tokenizer, drawn) == expected
    assert render_many(tokenizer, drawn, spans=False) == [r._replace(spans=[]) for r in expected]


FAST = {"llama3", "qwen2.5", "gemma2", "phi3", "smollm2", "chatml", "zephyr"}


@pytest.mark.parametrize("name", FAMILIES)
def test_which_templates_run_once_a_role_pattern(name):
    """Qwen3's and DeepSeek's look for thinking in contents; Mistral's asks whether there is system text."""
    assert copies_contents((HERE / f"{name}.jinja").read_text(encoding="utf-8")) == (name in FAST | {"mistral"})
    if name in FAST:
        tokenizer = family(name)
        assert plan_of(tokenizer, template_key(tokenizer), ("user", "assistant"), False) is not None


@pytest.mark.parametrize(
    ("template", "proved"),
    [
        (CHATML, True),
        (LLAMA3, True),
        (GEMMA, True),
        (MISTRAL, True),
        (PHI3, True),
        (LAST_SYSTEM, True),
        (THINK, False),
        (CHATML.replace("m['content']", "m['content'] | upper"), False),
        (CHATML.replace("m['content']", "m['content'][1:]"), False),
        (CHATML.replace("m['content']", "(m | string)"), False),
        (CHATML.replace("m['content']", "m.get('content')"), False),
        (CHATML.replace("m['content']", "m['con' ~ 'tent']"), False),
        (CHATML.replace("m['content']", "(m['content'] ~ '\n') | trim"), False),
        (CHATML.replace("m['content']", "m['content'].strip()"), True),
        (CHATML.replace("m['content']", "m['content'].strip('x')"), False),
        (CHATML.replace("m['content']", "m['content'] if m['content'] is string else m['content'][0]['text']"), False),
        ("{% for m in messages %}{% if m.content == 'x' %}a{% endif %}{{ m.content }}{% endfor %}", False),
        ("{% for m in messages %}{% if 'x' in m.content %}a{% endif %}{{ m.content }}{% endfor %}", False),
        ("{% for m in messages %}{% if m.content %}{{ m.content }}{% endif %}{% endfor %}", True),
        ("{% for m in messages %}{% if m.content | length > 3 %}{{ m.content }}{% endif %}{% endfor %}", False),
        ("{% for m in messages %}{% set c = m.content | trim %}{{ c }}{% if c > 'x' %}!{% endif %}{% endfor %}", False),
        ("{% for m in messages %}{{ m.role + m.content if not loop.last else '' }}{% endfor %}", True),
        ("{% for m in messages %}{{ loop.previtem.content | upper }}{% endfor %}", False),
        ("{% set ns = namespace(x='') %}{% for m in messages %}{% set ns.x = m.content %}{% endfor %}{{ ns.x }}", True),
        ("{% set ns = namespace(x='') %}{% for m in messages %}{% set ns.x = m.content %}{% endfor %}{{ ns }}", False),
        ("{{ messages | tojson }}", False),
        ("{% macro f(m) %}{{ m.content | upper }}{% endmacro %}{{ f(messages[0]) }}", False),
        ("{% macro f(r) %}{{ messages[0].content }}{% endmacro %}{{ f('a') }}", False),
        ("{% macro f(r) %}{{ r }}{% endmacro %}{{ f('a') + messages[0].content }}", True),
        (
            "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
            "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}",
            True,
        ),
        ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", False),
        ("{% filter upper %}{{ messages[0].content }}{% endfilter %}", False),
    ],
)
def test_proof_that_contents_are_copied(template, proved):
    assert copies_contents(template) is proved


def test_faults_are_the_same():
    tokenizer = smol()
    good = Ask([Message(role="user", content="a"), Message(role="assistant", content="b")])
    bad = Ask([Message(role="user", content="\ud800"), Message(role="assistant", content="b")])
    with pytest.raises(DataError, match=r"message 0 \(user\) has half of a surrogate pair"):
        render_many(tokenizer, [good, bad])
    unknown = Ask([Message(role="usr", content="a")])
    with pytest.raises(DataError, match="unknown role 'usr'"):
        render_many(tokenizer, [good, unknown])
    with pytest.raises(ModelError, match="no chat template"):
        render_many(smol(None), [good])
    doubled = smol(CHATML.replace("<|im_start|>system", "<|im_start|><|im_start|>system"))
    with pytest.raises(ModelError, match="twice"):
        render_many(doubled, [good])
    unstopped = smol(CHATML.replace("'<|im_end|>' + '\n'", "'\n'"))
    with pytest.raises(ModelError, match="expected a stop token"):
        render_many(unstopped, [good])
    assert render_many(tokenizer, []) == []
