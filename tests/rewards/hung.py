"""Reward functions with every fault, for the process that imports them."""

from __future__ import annotations

import os
import subprocess
import sys
import time


def by_word(completion, target=None):
    """What a completion asks for, by its first word."""
    word = completion.split()[0]
    if word == "sleep":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)  # a child of a hung reward"])
        time.sleep(300)
    if word == "raise":
        raise ValueError("no such thing")
    if word == "end":
        os._exit(3)
    if word == "write":
        os.write(1, b"not an answer\n")
        print("nor is this")
    strange = {"nan": float("nan"), "infinite": float("inf"), "text": "1", "list": [1], "none": None, "empty": {}}
    if word in strange:
        return strange[word]
    return {"value": 2.0, "words": 3.0} if word == "parts" else float(len(completion))


def whole(prompts, completions, **columns):
    """One value too few where a completion says so."""
    assert set(columns) == {"truncated", "group", "target", "meta", "turns"} and len(prompts) == len(completions)
    return [float(len(c)) for c in completions][: -1 if "short" in completions else None]


def odd(text):
    """No parameter that is known."""
