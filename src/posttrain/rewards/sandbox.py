"""Run a Python program that a model wrote: no network, no files but read-only system ones, little memory, and a deadline.

Linux only: bubblewrap where it is installed, else namespaces of its own (as root, or where users may make them).
Where neither works it refuses, unless told to run unconfined.
"""

from __future__ import annotations

import functools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from posttrain.errors import ConfigError

Means = Literal["bubblewrap", "namespaces", "unconfined"]
_SCRIPT = Path(__file__).with_name("confine.py")
_OUTPUT = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Limits:
    """``seconds`` by the clock, bytes of ``memory`` (address space) and of ``disk`` (what it may write)."""

    seconds: float = 5.0
    memory: int = 512 << 20
    disk: int = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a program ended: its status (None = killed at the deadline), the first 64 KiB of each output, seconds."""

    status: int | None
    output: str
    errors: str
    seconds: float


def run_confined(program: str, limits: Limits | None = None, *, unconfined: bool = False) -> Outcome:
    """Run a program in a sandbox and wait for its end, or kill it.

    Raises:
        ConfigError: no means of confinement here, and ``unconfined`` is off.
    """
    limits = limits or Limits()
    means = find_means()
    if means is None and not unconfined:
        raise ConfigError(
            "code can't be confined on this machine: bubblewrap isn't installed and namespaces can't be made; install "
            "bubblewrap, allow user namespaces, or accept the risk with unconfined=True"
        )
    return _run(program, limits, means or "unconfined")


@functools.cache
def find_means() -> Means | None:
    """The first means that runs a program here and keeps it from a file it must not see; None if none does."""
    probe = f"import os, sys; sys.exit(7 if not os.path.exists({str(_SCRIPT)!r}) and os.getpid() < 10 else 8)"
    for means in ("bubblewrap", "namespaces"):
        if means == "bubblewrap" and not shutil.which("bwrap"):
            continue
        if sys.platform == "linux" and _run(probe, Limits(seconds=20), means).status == 7:
            return means
    return None


def _run(program: str, limits: Limits, means: Means) -> Outcome:
    """Start, feed, read and kill."""
    began = time.monotonic()
    process = subprocess.Popen(
        _call(limits, means),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
    )
    try:
        text, over = _converse(process, program.encode("utf-8", "surrogatepass"), began + limits.seconds)
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, began + limits.seconds - time.monotonic()) if over else 0)
        status = process.poll()
    finally:
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
    output, errors = (part[:_OUTPUT].decode("utf-8", "backslashreplace") for part in text)
    return Outcome(status=status, output=output, errors=errors, seconds=time.monotonic() - began)


def _call(limits: Limits, means: Means) -> list[str]:
    """The command that confines and runs what it reads."""
    python = os.path.realpath(sys.executable)
    if means == "unconfined":
        return [python, "-I", "-S", "-B", "-"]
    visible = visible_paths(python)
    settings = {**vars(limits), "python": python, "visible": visible, "enter": means == "namespaces"}
    call = [python, "-I", "-S", "-B", str(_SCRIPT), json.dumps(settings)]
    if means == "namespaces":
        return call
    shown = [word for path in visible for word in _shown(path)]
    call[4] = "/confine.py"
    return [
        "bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--clearenv", *shown, "--dev", "/dev",
        "--size", str(limits.disk), "--tmpfs", "/tmp", "--ro-bind", str(_SCRIPT), "/confine.py", *call,
    ]  # fmt: skip


def _shown(path: str) -> list[str]:
    """A path as bubblewrap shows it: links as links, all else read-only."""
    return ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]


def visible_paths(python: str) -> list[str]:
    """What a program may read: system libraries and the interpreter's own; no home, no configuration."""
    system = ["/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/alternatives"]
    prefix = sysconfig.get_config_var("installed_base") or str(Path(python).parent.parent)
    paths = [p for p in system if os.path.lexists(p)]
    return paths if Path(prefix).is_relative_to("/usr") else [*paths, os.path.realpath(prefix)]


def _converse(process: subprocess.Popen[bytes], program: bytes, end: float) -> tuple[list[bytes], bool]:
    """Write the program and read both outputs until they close (then True), are too long, or the time is over."""
    assert process.stdin and process.stdout and process.stderr
    feed, kept = process.stdin, {process.stdout: b"", process.stderr: b""}
    os.set_blocking(feed.fileno(), False)
    writing, reading = [feed], list(kept)
    while reading and (left := end - time.monotonic()) > 0 and max(map(len, kept.values())) <= _OUTPUT:
        ready, free, _ = select.select(reading, writing, [], left)
        if free:
            try:
                program = program[os.write(feed.fileno(), program) :] if program else b""
            except BrokenPipeError:
                program = b""
            if not program:
                writing = []
                with suppress(OSError):
                    feed.close()
        for pipe in ready:
            if more := os.read(pipe.fileno(), 1 << 14):
                kept[pipe] += more
            else:
                reading.remove(pipe)
    return list(kept.values()), not reading
