"""Rewards that hang, raise and lie: what becomes of their samples, from any thread, and by when."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from posttrain.errors import ConfigError, RewardError
from posttrain.rewards.base import Completion
from posttrain.rewards.workers import killable, scored
from posttrain.types import Example, Message

SECONDS = 3.0


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def said(text, group=0):
    return Completion(
        example=Example(prompt=(Message(role="user", content="?"),)),
        text=text,
        prompt_ids=(1,),
        ids=(2,),
        truncated=False,
        group=group,
    )


def in_thread(call):
    """What a call gives in a thread that is not the main one."""
    out = []
    thread = threading.Thread(target=lambda: out.append(call()))
    thread.start()
    thread.join()
    return out[0]


def test_each_fault_is_an_abstention_of_its_own_sample():
    bad = ["sleep", "raise", "nan", "infinite", "text", "list", "empty", "end"]
    texts = [f"ok {'x' * i}" for i in range(64 - len(bad) - 3)] + ["write"] + ["none", "parts", *bad]
    reward = killable("hung:by_word", seconds=SECONDS, workers=2)
    reward([said("warm"), said("up")])  # both processes are there
    begin = time.monotonic()
    scores = in_thread(lambda: reward([said(t) for t in texts]))
    assert time.monotonic() - begin < SECONDS + 1 + 2 * 2.0  # two processes are started again, one after another
    assert [s.value for s in scores[:54]] == [float(len(t)) for t in texts[:54]]
    assert [s.value for s in scores[54:]] == [None, 2.0] + [None] * len(bad)
    assert scores[55].parts == {"words": 3.0} and scores[54].parts == {}
    kinds = ["hung", "raised", "value", "value", "value", "value", "value", "died"]
    assert [list(s.parts) for s in scores[56:]] == [[f"fault/{k}"] for k in kinds]
    assert reward.faults == {"hung": 1, "raised": 1, "value": 5, "died": 1}
    reward.close()
    assert not any(b"a child of a hung reward" in _line(p) for p in Path("/proc").glob("[0-9]*/cmdline"))


def _line(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_past_a_share_of_faults_it_is_an_error():
    reward = killable("hung:by_word", workers=1, most_abstained=0.25)
    assert reward([said("ok"), said("ok"), said("ok"), said("raise")])[3].value is None
    with pytest.raises(RewardError, match=r"no score for 2 of 4.*2 raised \(ValueError: no such thing\)"):
        reward([said("ok"), said("ok"), said("raise"), said("raise")])


def test_lists_and_their_lengths():
    reward = killable("hung:whole", workers=1, together="group")
    scores = reward([said("a"), said("short", 1), said("bb"), said("c", 1)])
    assert [s.value for s in scores] == [1.0, None, 2.0, None]
    assert reward.faults == {"count": 2}


def test_what_cannot_be_loaded():
    with pytest.raises(ConfigError, match=r"can't be loaded: ConfigError: .*no 'nothing'"):
        killable("hung:nothing", workers=1)([said("a")])
    with pytest.raises(ConfigError, match=r"'completion' \(one text\) or 'completions'; this has \['text'\]"):
        killable("hung:odd", workers=1)([said("a")])
    with pytest.raises(ConfigError, match="move it to the top of a module"):
        killable(lambda completion: 0.0)
    with pytest.raises(ConfigError, match=r"package\.module:function"):
        killable("hung")


def test_parts_add_up_where_no_value_is_given():
    assert (scored({"a": 1.0, "b": 0.5}).value, scored(2.0).parts) == (1.5, {})
