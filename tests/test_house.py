"""Rules of the house, read from the source: imports run downward, files stay small, nothing is unpickled."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import posttrain

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "posttrain"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}

# Lower floors first. Names in one set may import each other; sets on one floor may not.
FLOORS = [
    [{"types", "errors", "registry"}, {"machine"}],
    [{"forest"}, {"ops"}],
    [{"losses"}],
    [{"models"}, {"data"}],
    [{"rollout"}],
    [{"rewards"}],
    [{"train"}, {"evals"}],
    [{"stages", "work"}, {"feedback"}],
    [
        {
            "runner",
            "forecast",
            "graph",
            "doctor",
            "manifest",
            "run_numbers",
            "run_diff",
            "rerun",
            "sweep",
            "replay",
            "ranks",
        }
    ],
    [
        {"recipes"},
        {
            "__main__",
            "cli",
            "cli_data",
            "cli_help",
            "cli_list",
            "cli_merge",
            "cli_making",
            "cli_compare",
            "cli_reward",
            "cli_runs",
            "arguments",
        },
    ],
]
PLACE = {name: (floor, group) for floor, sets in enumerate(FLOORS) for group in sets for name in group}

ALGORITHMS = set(
    "ppo grpo dpo kto ipo rloo reinforce orpo simpo cpo sppo remax raft slic rrhf gspo dapo bco aot nca exo "  # noqa: SIM905
    "sft lipo dro alignprop xpo vdpo tdpo gae".split()
)


def part(path: Path) -> str:
    """The package or module directly under ``posttrain`` that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Every posttrain module a file imports, anywhere in it: line, dotted name after ``posttrain.``."""
    package = ["posttrain", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(TREES[path]):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "posttrain":  # a module, or a public name that another module defines
                table = posttrain._PUBLIC
                names = [table.get(alias.name, f"posttrain.{alias.name}") for alias in node.names]
            else:
                names = [module]
        for name in names:
            if name.startswith("posttrain.") and not name.endswith("__"):
                yield node.lineno, name.removeprefix("posttrain.")  # type: ignore[attr-defined]


def test_every_module_has_a_floor():
    assert {part(path) for path in FILES} - {"__init__"} <= set(PLACE)


def test_imports_run_downward_only():
    wrong = []
    for path in FILES:
        if part(path) == "__init__":
            continue
        floor, group = PLACE[part(path)]
        for line, name in imported(path):
            other = name.partition(".")[0]
            below, _ = PLACE[other]
            if below >= floor and other not in group:
                wrong.append(f"{path.relative_to(ROOT)}:{line} (floor {floor}) imports {name} (floor {below})")
    assert not wrong, "\n".join(wrong)


def test_the_walk_sees_imports_however_they_are_written(monkeypatch: pytest.MonkeyPatch):
    source = """
from posttrain import runner, Stage, __version__
from . import log
from ..data.load import read
import posttrain.evals.report as r
def f():
    from posttrain.cli import main
"""
    path = PACKAGE / "train" / "imagined.py"
    monkeypatch.setitem(TREES, path, ast.parse(source))
    found = [name for _, name in imported(path)]
    assert found == ["runner", "stages", "train", "data.load", "evals.report", "cli"]


def test_nothing_is_unpickled_or_evaluated():
    modules = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    wrong = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            bad = ""
            if isinstance(node, ast.Import):
                bad = next((item.name for item in node.names if item.name.split(".")[0] in modules), "")
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in modules:
                bad = node.module or ""
            elif isinstance(node, ast.Name) and node.id in ("eval", "exec", "compile", "__import__"):
                bad = node.id
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                dotted = f"{node.value.id}.{node.attr}"
                bad = dotted if dotted in ("torch.load", "torch.save", "builtins.eval", "builtins.exec") else ""
            elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                bad = "" if isinstance(node.value, ast.Constant) and node.value.value is False else "allow_pickle"
            if bad and path.name != "harness.py":  # which runs in the sandbox and nowhere else
                wrong.append(f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)} {bad}")
    assert not wrong, "\n".join(wrong)


def test_files_stay_small():
    limits = {path: 60 if part(path) == "recipes" else 400 for path in FILES}
    limits[PACKAGE / "train" / "loop.py"] = 200
    lengths = {path: len(path.read_text().splitlines()) for path in FILES}
    wrong = [f"{path.relative_to(ROOT)}: {n} > {limits[path]}" for path, n in lengths.items() if n > limits[path]]
    assert not wrong, "\n".join(wrong)


def test_at_most_three_functions_are_long():
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (node.end_lineno or node.lineno) - node.lineno + 1 > 60
    ]
    assert len(long) <= 3, "\n".join(long)


def words(text: str) -> set[str]:
    """Lower-case words of a source text; ``fooBarLoss``, ``foo_bar_loss`` and ``FOOLoss`` fall apart."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", text)}


def test_the_training_loop_names_no_algorithm():
    assert {"ppo", "loss", "dpo"} <= words("PPOLoss(dpo_beta)")
    loop = PACKAGE / "train" / "loop.py"
    assert not words(loop.read_text()) & ALGORITHMS


@pytest.mark.parametrize("module", ["posttrain", "posttrain.cli"])
def test_importing_loads_neither_torch_nor_transformers(module: str):
    code = f"import sys, {module}; print({{'torch', 'transformers', 'matplotlib'}} & set(sys.modules) or 'none')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "none"


def test_public_names_are_those_recorded_and_load():
    recorded = (ROOT / "tests" / "public_names.txt").read_text().split()
    assert sorted(posttrain.__all__) == recorded, "a public name came or went: say so in CHANGELOG.md, then record it"
    assert all(getattr(posttrain, name) is not None for name in recorded)
    assert set(dir(posttrain)) >= set(recorded)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = posttrain.nothing


def test_the_version_is_that_of_the_project_file():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert posttrain.__version__ == project["version"]


def test_help_of_the_installed_command():
    for args in (["--help"], ["run", "--help"], ["--version"]):
        done = subprocess.run([sys.executable, "-m", "posttrain.cli", *args], capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == "" and "posttrain" in done.stdout
