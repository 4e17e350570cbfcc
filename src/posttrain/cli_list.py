"""``posttrain list``: recipes, methods, algorithms, builders, losses and objectives, as their registries hold them."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from posttrain.errors import ConfigError, suggest
from posttrain.registry import METHODS, RECIPES, Registry

if TYPE_CHECKING:
    from posttrain.evals.grids import Grid


def list_names(kind: str = "all", /) -> None:
    """List recipes, methods, algorithms, kinds of reward models, losses and objectives; KIND is one of these words.

    Of a loss it says what it needs beside the policy's own log-probabilities ("whole step": its value depends on the other
    rows), what data it learns from, the formula and the paper. Pairs are rows of prompt, chosen and rejected, or rankings
    (prompt and completions, best first); lists are rankings; scores stand beside answers, or come of `posttrain label`.
    """
    if kind not in (*KINDS, "all"):
        raise ConfigError(f"unknown kind '{kind}'; {suggest(kind, KINDS)}")
    from rich.console import Console

    from posttrain.evals.tables import rich_grid

    console = Console()
    for name, grids in KINDS.items():
        if kind in (name, "all"):
            for grid in grids():
                console.print(rich_grid(grid))


def recipe_grids() -> Iterator[Grid]:
    """Yield the table of what ``posttrain run`` takes."""
    yield _function_grid("Recipes: posttrain run RECIPE", "recipe", RECIPES)


def method_grids() -> Iterator[Grid]:
    """Yield the table of what ``posttrain train`` takes."""
    yield _function_grid("Methods: posttrain train METHOD", "method", METHODS)


def _function_grid(title: str, kind: str, registry: Registry) -> Grid:
    from posttrain.evals.grids import Grid

    rows = []
    for name in sorted(registry):
        try:
            about = summary(registry[name])
        except ConfigError as error:  # one that can't be imported must not hide the others
            about = f"(can't be used: {error})"
        rows.append((name, about))
    return Grid(title=title, header=(kind, "what it is"), rows=tuple(rows), left=(0, 1))


def loss_grids() -> Iterator[Grid]:
    """Yield a table for each registry of losses: name, what it needs and learns from, formula and paper."""
    from posttrain.evals.grids import Grid

    for registry in loss_registries():
        rows = []
        for name in sorted(registry):
            facts = registry.facts(name)
            cell = "\n".join(filter(None, (", ".join(needed(facts)) or "–", learns_from(registry, name))))
            paper = facts.get("paper") or source(registry[name])
            rows.append((name, cell, "\n".join(filter(None, (summary(registry[name]), paper)))))
        learns = "\nlearns from" if registry.data else ""
        header = ("loss", f"needs{learns}", "formula and paper")
        yield Grid(title=plural(registry.kind), header=header, rows=tuple(rows), left=(0, 1, 2))


WORDS = {
    "written": "format mask",
    "kl": "each token's KL to the reference",
    "kl_to_other": "the reference's distribution",
    "sum_p2": "each token's distribution",
    "ref_entropy": "the reference's entropy",
    "value": "value network",
}
"""What a loss needs, where its name would not say it."""


def needed(facts: Mapping[str, Any]) -> list[str]:
    """What a loss needs beside the policy's own log-probabilities, in words, of its facts."""
    names = [*facts.get("needs", ()), *facts.get("reads", ())]
    return [*(str(WORDS.get(name, name)) for name in names), *(["whole step"] if facts.get("coupled") else [])]


def learns_from(registry: Registry, name: str) -> str:
    """The shape of the data that a loss learns from; nothing where its registry has none."""
    scores = registry.facts(name).get("scores", "rank")
    return registry.data + (f" with {scores}s" if scores != "rank" and registry.data else "")


def plural(kind: str) -> str:
    """A kind as the title of a table, in the plural: "KL penalties"."""
    ending = {"s": "es", "y": "ies"}.get(kind[-1], "s")
    return kind[0].upper() + (kind[:-1] if ending == "ies" else kind)[1:] + ending


def loss_registries() -> list[Registry]:
    """Return the registries that the files of ``posttrain.losses`` define, by their kind."""
    import posttrain.losses

    names = [item.name for item in pkgutil.iter_modules(posttrain.losses.__path__, "posttrain.losses.")]
    items = [item for name in names for item in vars(importlib.import_module(name)).values()]
    found = {id(item): item for item in items if isinstance(item, Registry)}
    return sorted(found.values(), key=lambda registry: registry.kind)


def objective_grids() -> Iterator[Grid]:
    """Yield the table of objectives: what a batch carries for each beside its tokens, and the losses it can be given."""
    from posttrain.evals.grids import Grid
    from posttrain.train.objectives import objectives

    rows = []
    for name in sorted(objectives):
        facts = objectives.facts(name)
        losses = f"takes any {facts['losses'].kind}" if "losses" in facts else ""
        about = "\n".join(filter(None, (summary(objectives[name]), losses)))
        rows.append((name, "\n".join(facts.get("columns", ())) or "–", about))
    header = ("objective", "batches carry", "what it minimises")
    yield Grid(title="Objectives", header=header, rows=tuple(rows), left=(0, 1, 2))


def summary(item: object) -> str:
    """Return the first line of a docstring, without the marks of code."""
    return (inspect.getdoc(item) or "").partition("\n")[0].replace("`", "")


def source(item: object) -> str:
    """Return what a docstring names after ``Source:``, to the end of the line; nothing if it names none."""
    return (inspect.getdoc(item) or "").partition("Source: ")[2].partition("\n")[0].replace("`", "")


def algorithm_grids() -> Iterator[Grid]:
    """Yield the table of policy-gradient algorithms: advantage, ratio, loss, KL penalty, aggregation, needs, paper."""
    from posttrain.evals.grids import Grid
    from posttrain.train.algorithms import ALGORITHMS

    rows = [
        (
            name,
            row.advantage,
            row.ratio,
            row.loss,
            row.penalty,
            row.aggregation,
            ", ".join(sorted(row.needs)) or "–",
            f"{row.summary}\n{row.paper}",
        )
        for name, row in sorted(ALGORITHMS.items())
    ]
    header = ("algorithm", "advantage", "ratio", "loss", "KL", "aggregation", "needs", "what it is")
    yield Grid(title="Algorithms: posttrain train ALGORITHM", header=header, rows=tuple(rows), left=tuple(range(8)))


def kind_grids() -> Iterator[Grid]:
    """Yield the table of kinds of reward models."""
    from posttrain.evals.grids import Grid
    from posttrain.rewards.kinds import KINDS as KINDS_OF_REWARDS

    rows = tuple((name, kind.loss or "its own", kind.data, kind.summary) for name, kind in KINDS_OF_REWARDS.items())
    header = ("kind", "loss of pairs", "answers need", "what it is")
    yield Grid(title="Reward models: posttrain train reward --kind KIND", header=header, rows=rows, left=(0, 1, 2, 3))


def builder_grids() -> Iterator[Grid]:
    """Yield the table of builders: what each makes of scored answers, and its paper."""
    from posttrain.evals.grids import Grid
    from posttrain.rewards.builders import builders

    rows = [
        (
            name,
            builders.facts(name)["makes"],
            "\n".join(filter(None, (summary(builders[name]), builders.facts(name).get("paper")))),
        )
        for name in sorted(builders)
    ]
    header = ("builder", "makes", "what of, and paper")
    yield Grid(title="Builders: posttrain select DATA --builder NAME", header=header, rows=tuple(rows), left=(0, 1, 2))


def named_grids() -> Iterator[Grid]:
    """Yield the tables of what options name: rewards, data, environments."""
    from posttrain.rewards.named import REWARDS
    from posttrain.rollout.environment import ENVIRONMENTS
    from posttrain.work.generated import DATA

    yield _function_grid("Rewards: --reward NAME, or module:function", "reward", REWARDS)
    yield _function_grid("Data: --data NAME, or a file", "data", DATA)
    yield _function_grid("Environments: --environment NAME, or module:object", "environment", ENVIRONMENTS)


KINDS: dict[str, Callable[[], Iterator[Grid]]] = {
    "recipes": recipe_grids,
    "methods": method_grids,
    "algorithms": algorithm_grids,
    "builders": builder_grids,
    "names": named_grids,
    "kinds": kind_grids,
    "losses": loss_grids,
    "objectives": objective_grids,
}
