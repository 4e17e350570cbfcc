"""Environments of peers: made on request, beside nothing of ours, at fixed versions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = {"trl": ["torch==2.13.0", "trl==1.16"]}
"""What is installed, one call of pip each: torch first, so that its build is the index's own choice for this machine."""
HOSTS = {"hf": "trl"}
"""Peers that live in another's environment."""


def python_of(peer: str) -> Path:
    """The Python of a peer's environment, which is made if it is not there.

    Raises:
        SystemExit: pip failed; its log is named.
    """
    peer = HOSTS.get(peer, peer)
    folder = ROOT / ".peers" / peer
    python, stamp, log = folder / "bin" / "python", folder / "installed.txt", folder.with_suffix(".log")
    wanted = "\n".join(PACKAGES[peer])
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"making the environment of {peer} in {folder}", flush=True)
    folder.parent.mkdir(exist_ok=True)
    with log.open("w") as out:
        calls = [[sys.executable, "-m", "venv", "--clear", str(folder)]]
        calls += [[str(python), "-m", "pip", "install", package] for package in PACKAGES[peer]]
        for call in calls:
            if subprocess.run(call, stdout=out, stderr=out).returncode:
                raise SystemExit(f"'{' '.join(call)}' failed; see {log}")
    stamp.write_text(wanted)
    return python
