"""The sandbox: nothing gets out, everything ends, and what a program says is kept."""

from __future__ import annotations

import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import posttrain
from posttrain.errors import ConfigError
from posttrain.rewards import sandbox
from posttrain.rewards.sandbox import Limits, Outcome, find_means, run_confined
from rewards.payloads import HEAD, PAYLOADS

needs_means = pytest.mark.skipif(find_means() is None, reason="programs can't be confined on this machine")


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    """Every payload's outcome, two at a time; the host's secret, port and mark are real."""
    folder = tmp_path_factory.mktemp("host")
    (folder / "secret").write_text("the host's")
    for place in (folder, *list(folder.parents)[:3]):
        place.chmod(0o755)
    server = socket.create_server(("127.0.0.1", 0))
    names = {
        "secret": str(folder / "secret"),
        "mark": str(folder / "mark"),
        "port": server.getsockname()[1],
        "src": str(Path(posttrain.__file__).parents[1]),
    }
    os.environ["POSTTRAIN_SECRET"] = "1"
    ok = "def ok(f):\n    try:\n        os.fstat(f); return True\n    except OSError: return False\n"

    def run(body: str) -> Outcome:
        return run_confined(HEAD + ok + body.format(**names), Limits(seconds=20))

    with ThreadPoolExecutor(2) as pool, server:
        found = dict(zip(PAYLOADS, pool.map(run, PAYLOADS.values()), strict=True))
    del os.environ["POSTTRAIN_SECRET"]
    assert not (folder / "mark").exists() and (folder / "secret").read_text() == "the host's"
    return found


@needs_means
def test_no_payload_gets_out(tried):
    assert len(tried) >= 60
    assert [name for name, ended in tried.items() if "ESCAPED" in ended.output] == []


@needs_means
def test_payloads_were_tried(tried):
    faulty = [n for n, e in tried.items() if "SyntaxError" in e.errors or "NameError" in e.errors or e.status == 125]
    assert faulty == []


@needs_means
def test_a_program_that_does_no_harm_runs():
    ended = run_confined("import json, math, random, re\nprint(json.dumps({'a': math.factorial(20)}))")
    assert (ended.status, ended.output, ended.errors) == (0, '{"a": 2432902008176640000}\n', "")
    assert run_confined("raise SystemExit(3)").status == 3
    assert "ValueError: no" in run_confined("raise ValueError('no')").errors


@needs_means
@pytest.mark.parametrize(
    "body",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import signal, time\nfor s in range(1, 32):\n    try: signal.signal(s, 1)\n    except Exception: pass\ntime.sleep(60)",
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)\ntime.sleep(60)",
    ],
)
def test_what_never_ends_is_killed_in_time(body):
    begin = time.monotonic()
    ended = run_confined(body, Limits(seconds=1.0))
    assert ended.status != 0 and time.monotonic() - begin < 2.0


@needs_means
def test_what_a_program_leaves_running_dies_with_it():
    mark = f"leftover-{os.getpid()}"
    run_confined(f"import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(600)  # {mark}\n")
    time.sleep(0.2)
    lines = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if _readable(p)]
    assert not any(b"/tmp/program.py" in line for line in lines)


def _readable(path: Path) -> bool:
    try:
        return bool(path.read_bytes())
    except OSError:
        return False


@needs_means
def test_endless_output_is_cut():
    ended = run_confined("while True: print('x' * 1000)", Limits(seconds=10.0))
    assert len(ended.output) == 1 << 16 and ended.status != 0 and ended.seconds < 9


def test_without_confinement_it_refuses_unless_told(monkeypatch):
    monkeypatch.setattr(sandbox, "find_means", lambda: None)
    with pytest.raises(ConfigError, match=r"can't be confined.*install\s+bubblewrap"):
        run_confined("print(1)")
    assert run_confined("print(1)", unconfined=True).output == "1\n"
