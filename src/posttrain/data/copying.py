"""Proof, from a template's syntax, that it only copies contents: then it need not run once a conversation.

Every expression gets a kind: what it can hold of the messages. A template passes if contents are only written (as they
are, trimmed or as JSON), joined to other text, or asked whether they are there or empty. Anything else fails, also what
is merely unusual: a failure costs time, never correctness.
"""

from __future__ import annotations

from functools import lru_cache
from typing import cast

from jinja2 import TemplateSyntaxError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

_PLAIN, _COPY, _JOINED, _TURN, _TURNS, _LOOP = range(6)
"""No content; a content, whole or trimmed; text with contents in it; a message; a list of messages; ``loop``."""

_TEXTS = (_PLAIN, _COPY, _JOINED)
_TYPE_TESTS = frozenset(
    {"defined", "undefined", "none", "string", "mapping", "iterable", "sequence", "number", "boolean"}
)


class _UnprovedError(Exception):
    """The template does something with contents that isn't known to copy them."""


@lru_cache(maxsize=64)
def copies_contents(template: str) -> bool:
    """Whether the template's text around contents can't depend on them, if none is empty or white space only."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    try:
        tree = environment.parse(template)
        kinds: dict[str, int] = {"messages": _TURNS, "loop": _LOOP}
        while True:  # until no name changes its kind; kinds only grow
            before = dict(kinds)
            for statement in tree.body:
                _statement(statement, kinds)
            if kinds == before:
                return True
    except (TemplateSyntaxError, _UnprovedError, RecursionError):
        return False


def _statement(node: nodes.Node, kinds: dict[str, int]) -> None:
    if isinstance(node, nodes.Output):
        for part in node.nodes:
            _one_of(_kind(part, kinds), _TEXTS)
    elif isinstance(node, nodes.If):
        _condition(node.test, kinds)
        known = _known(node.test, kinds)
        taken = [] if known is False else node.body
        for child in [*taken, *([] if known else [*node.elif_, *node.else_])]:
            _statement(child, kinds)
    elif isinstance(node, nodes.For):
        _for(node, kinds)
    elif isinstance(node, nodes.Assign):
        _assign(node.target, _kind(node.node, kinds), kinds)
    elif isinstance(node, nodes.AssignBlock) and node.filter is None:
        for child in node.body:
            _statement(child, kinds)
        _assign(node.target, _JOINED, kinds)
    elif isinstance(node, nodes.Macro):
        inner = {**kinds, **{cast(nodes.Name, a).name: _PLAIN for a in node.args}}
        for child in node.body:
            _statement(child, inner)
        if any(inner.get(n.name, _PLAIN) != _PLAIN for n in node.find_all(nodes.Name)):
            raise _UnprovedError
    elif not isinstance(node, (nodes.Break, nodes.Continue)):
        raise _UnprovedError


def _for(node: nodes.For, kinds: dict[str, int]) -> None:
    if node.recursive:
        raise _UnprovedError
    over = _one_of(_kind(node.iter, kinds), (_TURNS, _PLAIN))
    _assign(node.target, _TURN if over == _TURNS else _PLAIN, kinds)
    if node.test is not None:
        _condition(node.test, kinds)
    for child in [*node.body, *node.else_]:
        _statement(child, kinds)


def _assign(target: nodes.Node, kind: int, kinds: dict[str, int]) -> None:
    if isinstance(target, nodes.Tuple) and kind == _PLAIN:
        for item in target.items:
            _assign(item, kind, kinds)
    elif isinstance(target, (nodes.Name, nodes.NSRef)) and kind != _LOOP:
        name = target.name if isinstance(target, nodes.Name) else f"{target.name}.{target.attr}"
        if name == "loop" or (name == "messages" and kind != _TURNS):
            raise _UnprovedError
        kinds[name] = _join(kinds.get(name, kind), kind)
    else:
        raise _UnprovedError


def _condition(node: nodes.Node, kinds: dict[str, int]) -> None:
    """A test may ask whether a content is empty (none is), not what it says."""
    if isinstance(node, nodes.Not):
        _condition(node.node, kinds)
    elif isinstance(node, (nodes.And, nodes.Or)):
        _condition(node.left, kinds)
        _condition(node.right, kinds)
    else:
        _one_of(_kind(node, kinds), (_PLAIN, _COPY, _TURN, _TURNS))


def _known(node: nodes.Node, kinds: dict[str, int]) -> bool | None:
    """The answer to a question after a message's content's type, which is text; None for any other test."""
    if isinstance(node, nodes.Not):
        known = _known(node.node, kinds)
        return None if known is None else not known
    asked = node.node if isinstance(node, nodes.Test) and node.name in _TYPE_TESTS else None
    if not isinstance(asked, (nodes.Getattr, nodes.Getitem)) or _kind(asked.node, kinds) != _TURN:
        return None
    if _kind(asked, kinds) != _COPY:
        return None
    return cast(nodes.Test, node).name in ("defined", "string", "iterable", "sequence")


def _kind(node: nodes.Node, kinds: dict[str, int]) -> int:
    if isinstance(node, (nodes.Const, nodes.TemplateData)):
        return _PLAIN
    if isinstance(node, nodes.Name):
        if any(name.startswith(f"{node.name}.") for name in kinds):  # a namespace as a whole
            raise _UnprovedError
        return kinds.get(node.name, _PLAIN)
    if isinstance(node, (nodes.Getitem, nodes.Getattr)):
        return _part(node, kinds)
    if isinstance(node, nodes.Filter):
        return _filter(node, kinds)
    if isinstance(node, nodes.Test) and node.name in _TYPE_TESTS and not node.args:
        _kind(node.node, kinds)
        return _PLAIN
    if isinstance(node, nodes.Call):
        return _call(node, kinds)
    if isinstance(node, nodes.CondExpr):
        _condition(node.test, kinds)
        other = _PLAIN if node.expr2 is None else _kind(node.expr2, kinds)
        return _join(_kind(node.expr1, kinds), other)
    if isinstance(node, (nodes.Add, nodes.Concat)):
        parts = node.nodes if isinstance(node, nodes.Concat) else [node.left, node.right]
        found = [_one_of(_kind(part, kinds), _TEXTS) for part in parts]
        return _JOINED if any(found) else _PLAIN
    for child in node.iter_child_nodes():
        _one_of(_kind(child, kinds), (_PLAIN,))
    return _PLAIN


def _part(node: nodes.Getitem | nodes.Getattr, kinds: dict[str, int]) -> int:
    """``a[b]`` or ``a.b``."""
    if isinstance(node, nodes.Getattr):
        key: object = node.attr
    else:
        key = node.arg.value if isinstance(node.arg, nodes.Const) else None
        _one_of(_kind(node.arg, kinds), (_PLAIN,))
    if isinstance(node.node, nodes.Name) and f"{node.node.name}.{key}" in kinds:  # of a namespace
        return kinds[f"{node.node.name}.{key}"]
    if isinstance(node.node, nodes.Name) and any(name.startswith(f"{node.node.name}.") for name in kinds):
        if isinstance(node, nodes.Getattr):
            return _PLAIN  # another attribute of that namespace
        raise _UnprovedError
    whole = _kind(node.node, kinds)
    if whole == _PLAIN:
        return _PLAIN
    if whole == _LOOP and isinstance(key, str):
        return _TURN if key in ("previtem", "nextitem") else _PLAIN
    if whole == _TURN and isinstance(key, str):
        if key in ("get", "items", "values", "keys", "copy"):
            raise _UnprovedError
        return _COPY if key == "content" else _PLAIN
    if whole == _TURNS and isinstance(node, nodes.Getitem):
        return _TURNS if isinstance(node.arg, nodes.Slice) else _TURN
    raise _UnprovedError


def _filter(node: nodes.Filter, kinds: dict[str, int]) -> int:
    if node.node is None:
        raise _UnprovedError
    kind = _kind(node.node, kinds)
    arguments = [*node.args, *(k.value for k in node.kwargs)]
    for argument in arguments:
        _one_of(_kind(argument, kinds), (_PLAIN,))
    if kind == _PLAIN:
        return _PLAIN
    if kind == _COPY and node.name in ("trim", "string") and not arguments:
        return _COPY
    if kind == _COPY and node.name == "tojson" and not arguments:
        return _JOINED  # a plan finds out by its markers that this isn't a copy
    if kind == _TURNS and node.name in ("length", "count"):
        return _PLAIN
    if kind == _TURNS and node.name in ("first", "last", "list"):
        return _TURNS if node.name == "list" else _TURN
    raise _UnprovedError


def _call(node: nodes.Call, kinds: dict[str, int]) -> int:
    arguments = [*node.args, *(k.value for k in node.kwargs)]
    if node.dyn_args is not None or node.dyn_kwargs is not None:
        raise _UnprovedError
    for argument in arguments:
        _one_of(_kind(argument, kinds), (_PLAIN,))
    if isinstance(node.node, nodes.Getattr):
        kind = _kind(node.node.node, kinds)
        if kind == _COPY and node.node.attr in ("strip", "lstrip", "rstrip") and not arguments:
            return _COPY
        return _one_of(kind, (_PLAIN,))
    return _one_of(_kind(node.node, kinds), (_PLAIN,))


def _one_of(kind: int, allowed: tuple[int, ...]) -> int:
    if kind not in allowed:
        raise _UnprovedError
    return kind


def _join(a: int, b: int) -> int:
    """The kind of what may be either."""
    if a != b and (a not in _TEXTS or b not in _TEXTS):
        raise _UnprovedError
    return max(a, b)
