"""How both sides time decoding; needs torch and nothing of ours. The peer's script imports this file from its own environment."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from measure import Clock

Generate = Callable[[list[list[int]], int], list[list[int]]]
"""Continue prompts by a number of tokens each, whatever stop tokens are among them."""


def timings(job: dict[str, Any], generate: Generate, clock: Clock) -> dict[str, Any]:
    """Seconds and processor seconds of calls of a few tokens and of many, whose difference is decoding alone.

    For each of ``batches`` the first prompts are continued by ``few`` and by ``many`` tokens, in turn, ``rounds`` times
    after a warm-up. With ``greedy`` the tokens of one call are returned instead.
    """
    prompts = job["prompts"]
    if job["greedy"]:
        return {"ids": generate(prompts, job["many"]), "held": 0}
    calls: list[dict[str, float]] = []
    clock.start()
    for batch in job["batches"]:
        generate(prompts[:batch], job["many"])
        clock.stop()
        for _ in range(job["rounds"]):
            for tokens in (job["few"], job["many"]):
                began, cpu = time.perf_counter(), time.process_time()
                made = generate(prompts[:batch], tokens)
                seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
                assert [len(ids) for ids in made] == [tokens] * batch
                calls.append({"batch": batch, "tokens": tokens, "seconds": seconds, "cpu": cpu})
    return {"calls": calls, "held": 0}
