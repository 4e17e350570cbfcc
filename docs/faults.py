"""Write ``docs/faults.md`` and the golden messages from runs with every fault injected: ``python docs/faults.py``."""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "faults.md"
GOLDEN = ROOT / "tests" / "golden" / "faults.json"


def main() -> None:
    """Inject, record, write."""
    sys.path.insert(0, str(ROOT / "tests"))
    faults = importlib.import_module("train.faults")
    messages = {}
    for fault in faults.FAULTS:
        with tempfile.TemporaryDirectory() as directory:
            messages[fault.name] = fault.message(Path(directory))
        print(f"{fault.name}: {messages[fault.name]}")
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(messages, indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(faults.table(messages))


if __name__ == "__main__":
    main()
