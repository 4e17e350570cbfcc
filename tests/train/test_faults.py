"""No fault passes in silence: each has a message of its own, and the page that lists them is what runs say today."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from . import faults
from .faults import FAULTS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def messages(tmp_path_factory):
    """What every fault says in a run of its own."""
    return {f.name: f.message(tmp_path_factory.mktemp("fault")) for f in FAULTS}


def test_every_fault_says_what_is_recorded(messages):
    golden = json.loads((ROOT / "tests" / "golden" / "faults.json").read_text())
    assert messages == golden


def test_every_fault_has_a_message_of_its_own(messages):
    assert len(FAULTS) >= 14 and len(set(messages.values())) == len(FAULTS)


def test_the_page_of_faults_is_current(messages):
    spec = importlib.util.spec_from_file_location("faults_page", ROOT / "docs" / "faults.py")
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    assert page.PAGE.read_text() == faults.table(messages), "run: python docs/faults.py"
