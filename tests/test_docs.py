import importlib.util
import re
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs" / "tables.py"
ROOT = Path(__file__).parents[1]


def script(path: Path):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where a dataclass looks for its own
    spec.loader.exec_module(module)
    return module


def test_each_loss_has_its_place_on_a_page_made_of_its_docstring():
    module = script(ROOT / "docs" / "loss_pages.py")
    found = module.pages()
    assert {path.name for path in found} == {path.name for path in module.FOLDER.iterdir()}
    for path, text in found.items():
        assert path.read_text() == text, "run: python docs/loss_pages.py"
    simpo = found[module.FOLDER / "reference-free.md"].partition("## `simpo`")[2].partition("\n## ")[0]
    assert "SimPO: `-log sigmoid(beta (log pi(y_w) / |y_w| - log pi(y_l) / |y_l|) - gamma)`." in simpo
    assert "- learns from pairs; needs nothing else\n- options: `beta` 2, `gamma` 1\n" in simpo
    assert "- `posttrain train simpo --data pairs.jsonl`" in simpo


def test_links_of_the_pages_of_losses_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs" / "losses").glob("*.md")]:
        for target, place in re.findall(r"\]\(([^)#\s:]+)#?([^)]*)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
            if place and target.endswith(".md") and page.parent.name == "losses":
                assert f"\n## `{place}`\n" in (page.parent / target).read_text(), (
                    f"{page.name} links to {target}#{place}"
                )


@pytest.mark.parametrize(
    ("page", "rows"),
    [("README", ["| `instructgpt` |", "| `ppo_clip` |"]), ("DATA", ["| `pair` |", "| `oasst_tree` |", "| `gsm8k` |"])],
)
def test_pages_have_the_tables_of_the_registries(page, rows):
    spec = importlib.util.spec_from_file_location("tables", DOCS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    path = getattr(module, page)
    text = path.read_text()
    assert module.written(path) == text, "run: python docs/tables.py"
    assert all(row in text for row in rows)
