import importlib.util
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs" / "tables.py"


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
