import importlib.util
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs" / "tables.py"


def test_the_readme_has_the_tables_of_the_registries():
    spec = importlib.util.spec_from_file_location("tables", DOCS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = module.README.read_text()
    assert module.written(text) == text, "run: python docs/tables.py"
    assert "| `instructgpt` |" in text
    assert "| `ppo_clip` |" in text
