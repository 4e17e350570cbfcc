"""Caches of a test's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.models.load import find_model


def own_cache(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Keep generated data in a folder, with the user's SmolLM2 in it where there is one: converting it again takes 20 seconds."""
    found = Path(find_model("smollm2").path)
    patch.setenv("POSTTRAIN_CACHE", str(folder))
    if found.name.startswith("SmolLM2") and found.is_dir():
        folder.mkdir(parents=True)
        (folder / found.name).symlink_to(found)
