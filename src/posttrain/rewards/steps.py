"""Labels of steps without people: a solution is completed many times after each step, and the right results are counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from posttrain.data.judged_rows import steps_of
from posttrain.errors import ConfigError
from posttrain.types import Example

Complete = Callable[[Example, str, int], Sequence[bool]]
"""``(example, solution so far, how many) -> whether each completion's result is right``."""


def monte_carlo_steps(
    examples: Sequence[Example], complete: Complete, *, samples: int = 8, separator: str = "\n"
) -> list[Example]:
    """Return the examples with an estimate for each step: the share of ``samples`` completions after it that come out right.

    The share stands in the response's ``meta["step_values"]``, which training reads as soft labels; the step's own label is
    the hard one, 1 if any completion was right, else -1. After a last step nothing is left to complete: its result is asked
    once.

    Raises:
        ConfigError: ``complete`` gave another number of verdicts than asked for.

    Source: Wang et al. 2024, Math-Shepherd, arXiv 2312.08935, section 3.2.
    """
    if samples < 1:
        raise ConfigError(f"got samples={samples}; expected at least 1")
    out: list[Example] = []
    for example in examples:
        responses = []
        for response in example.responses:
            steps, said, values = steps_of(response, separator), "", list[float]()
            for k, step in enumerate(steps):
                said += step.text
                wanted = 1 if k == len(steps) - 1 else samples
                found = list(complete(example, said, wanted))
                if len(found) != wanted:
                    raise ConfigError(f"got {len(found)} verdicts on completions, asked for {wanted}")
                values.append(sum(found) / wanted)
            labelled = tuple(replace(s, label=1 if v > 0 else -1) for s, v in zip(steps, values, strict=True))
            responses.append(replace(response, steps=labelled, meta={**response.meta, "step_values": values}))
        out.append(replace(example, responses=tuple(responses)))
    return out
