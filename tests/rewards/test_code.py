"""Code against tests: what passes, what only pretends to, and real tasks with their own solutions."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from posttrain.data import read
from posttrain.rewards.base import Completion
from posttrain.rewards.code import code_tests, count_passed, program_of
from posttrain.rewards.sandbox import Limits, find_means
from posttrain.types import Example, Message, Target

pytestmark = pytest.mark.skipif(find_means() is None, reason="programs can't be confined on this machine")
TESTS = ["assert f(2) == 4", "assert f([1, 'a']) == [1, 'a', 1, 'a']", "import math\nassert math.isclose(f(0.5), 1.0)"]


def completion(text, tests=TESTS):
    target = Target(kind="code", tests=tuple(tests)) if tests else None
    example = Example(prompt=(Message(role="user", content="double it"),), target=target)
    return Completion(example=example, text=text, prompt_ids=(1,), ids=(2,), truncated=False, group=0)


def test_scores_are_shares_of_tests():
    right = "Here it is:\n```python\ndef f(x):\n    return x * 2\n```\nDone."
    half = "def f(x):\n    if isinstance(x, list):\n        raise KeyError('no')\n    return x + x"
    rows = [completion(right), completion(half), completion("sorry"), completion(right, None)]
    assert [s.value for s in code_tests()(rows)] == [1.0, 0.0, 0.0, None]
    assert [s.value for s in code_tests(share=True)(rows)] == [1.0, pytest.approx(2 / 3), 0.0, None]


PRETENDERS = {
    "ends early": "import os\nos._exit(0)",
    "exits": "import sys\nsys.exit(0)",
    "prints a verdict": "print('0 passed\\n1 passed\\n2 passed', flush=True)",
    "writes a verdict to every handle": "V = b'0 passed\\n1 passed\\n2 passed\\n'\n"
    "import os\nfor h in range(64):\n    try: os.write(h, V)\n    except OSError: pass",
    "ends within": "def f(x):\n    import os\n    os.write(1, b'0 passed\\n')\n    os._exit(0)",
    "equals everything": "class E:\n    def __eq__(self, other):\n        return True\ndef f(x):\n    return E()",
    "equals everything by kind": "class L(list):\n    def __eq__(self, other):\n        return True\ndef f(x):\n    return L()",
    "patches the comparison": "import builtins\nbuiltins.compile = lambda *a, **k: None\ndef f(x):\n    return 0",
    "raises at exit": "import atexit, os\natexit.register(lambda: os._exit(0))\ndef f(x):\n    return None",
    "kills its judge": "import os, signal\nfor p in range(1, 20):\n    try: os.kill(p, signal.SIGKILL)\n    except OSError: pass",
    "recurses in its answer": "def f(x):\n    a = []\n    for _ in range(10**5): a = [a]\n    return a",
}


@pytest.mark.parametrize("name", PRETENDERS)
def test_nobody_passes_by_pretending(name):
    assert count_passed(PRETENDERS[name], TESTS) == 0


def test_tests_before_an_endless_one_count():
    program = "def f(x):\n    while isinstance(x, list): pass\n    return x * 2"
    begin = time.monotonic()
    assert count_passed(program, TESTS, Limits(seconds=2.0)) == 1
    assert time.monotonic() - begin < 3.0


def test_the_last_fence_is_the_program():
    assert program_of("```\na\n```\nor rather\n```python\nb = 1\n```") == "b = 1\n"
    assert program_of("```py\nunfinished") == "unfinished"
    assert program_of("x = 1") == "x = 1"


@pytest.mark.real_data
def test_solutions_of_real_tasks_pass():
    folder = os.environ.get("POSTTRAIN_REAL_DATA")
    if not folder:
        pytest.skip("POSTTRAIN_REAL_DATA is not set")
    examples = read(Path(folder) / "verifiable__mbpp-sanitized__all.jsonl.gz")[:40]
    rows = [completion(e.responses[0].text, e.target.tests) for e in examples]
    scores = [s.value for s in code_tests(limits=Limits(seconds=20))(rows)]
    assert sum(scores) >= 38
