"""Proof, from a template's syntax, that what it has written of some turns stays as it is whatever turns follow.

Then where each turn's sampling starts is seen in one rendering, in which the template marks where turns begin, instead of
a rendering of every beginning of the conversation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

from jinja2 import TemplateSyntaxError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

NEAR = 4
"""A proved template may depend on turns before this one (from 0) however many follow, if only on whether they are there."""

MARK = "Zq-x7Turn-x7qZ"
"""What `marked` templates write before each turn."""

_LOOP = re.compile(r"\{%[-+]?\s*for\s+\w+\s+in\s+\w+\s*[-+]?%\}\n?")
_BEHIND = frozenset({"first", "index", "index0", "previtem"})  # of ``loop``, what doesn't depend on what follows


@lru_cache(maxsize=64)
def marked(template: str) -> tuple[str, ...]:
    """Return ways to write the template such that it writes `MARK` before each turn; none without the proof.

    They differ in white space around the mark; one that without marks writes what the template does is right. A proved
    template is a loop over the turns, of which the rest sees those before `NEAR` only, and then at most a generation
    prompt that is the same after any turn.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    try:
        tree = environment.parse(template)
    except (TemplateSyntaxError, RecursionError):
        return ()
    tags = [found for found in _LOOP.finditer(template) if _over_turns(found[0], tree)]
    if len(tags) != 1 or not _causal(tree):
        return ()
    before, after = template[: tags[0].end()], template[tags[0].end() :]
    return tuple(f"{before}{{{{ '{MARK}' {end}}}}}{after}" for end in ("", "-"))


def _over_turns(tag: str, tree: nodes.Template) -> bool:
    return re.split(r"\W+", tag.partition(" in ")[2].strip())[0] in _turn_lists(tree)


def _turn_lists(tree: nodes.Template) -> set[str]:
    """Names for the turns, or for all but the first."""
    found = {"messages"}
    for node in tree.find_all(nodes.Assign):
        source = node.node.node if isinstance(node.node, nodes.Getitem) else node.node
        if isinstance(node.target, nodes.Name) and isinstance(source, nodes.Name) and source.name == "messages":
            found.add(node.target.name)
    return found


def _causal(tree: nodes.Template) -> bool:
    lists = _turn_lists(tree)
    loops = [i for i, node in enumerate(tree.body) if isinstance(node, nodes.For) and _named(node.iter, lists)]
    if len(loops) != 1:
        return False
    loop, rest = tree.body[loops[0]], tree.body[loops[0] + 1 :]
    assert isinstance(loop, nodes.For)
    if loop.test is not None or loop.else_ or loop.recursive or not all(map(_generation_prompt, rest)):
        return False
    asked = sum(_named(node, {"add_generation_prompt"}) for node in tree.find_all(nodes.Name))
    allowed: set[int] = {id(loop.iter)}
    for node, parent in _with_parents(tree):
        if isinstance(parent, nodes.Getitem) and parent.node is node and _starts_at_front(parent.arg):
            allowed.add(id(node))
        if isinstance(parent, nodes.Assign) and (node is parent.target or _named(node, {"messages"})):
            allowed.add(id(node))
        if isinstance(parent, nodes.Getattr) and _named(node, {"loop"}) and parent.attr in _BEHIND:
            allowed.add(id(node))
    used = [node for node in tree.find_all(nodes.Name) if node.name in lists | {"loop"}]
    slices = sum(1 for _ in tree.find_all(nodes.Slice))
    elsewhere = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends, nodes.Block, nodes.CallBlock)
    odd = slices >= NEAR - 1 or any(True for _ in tree.find_all(elsewhere))
    return asked == len(rest) and not odd and all(id(node) in allowed for node in used)


def _generation_prompt(node: nodes.Node) -> bool:
    """Whether a statement writes text that is always the same, where a generation prompt is asked for."""
    if not isinstance(node, nodes.If) or not _named(node.test, {"add_generation_prompt"}) or node.elif_ or node.else_:
        return False
    return all(isinstance(child, nodes.Output) for child in node.body) and not any(
        isinstance(part, (nodes.Name, nodes.Call)) for child in node.body for part in child.find_all(nodes.Node)
    )


def _named(node: nodes.Node, names: set[str]) -> bool:
    return isinstance(node, nodes.Name) and node.name in names


def _starts_at_front(key: nodes.Node) -> bool:
    """Whether ``[key]`` is the first entry, or all from a place near the front on."""
    if isinstance(key, nodes.Slice):
        return (
            isinstance(key.start, nodes.Const) and key.start.value in (0, 1) and key.stop is None and key.step is None
        )
    return isinstance(key, nodes.Const) and key.value == 0


def _with_parents(node: nodes.Node) -> Iterator[tuple[nodes.Node, nodes.Node]]:
    for child in node.iter_child_nodes():
        yield child, node
        yield from _with_parents(child)
