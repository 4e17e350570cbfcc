"""Every number of a run under a name of its own, so that runs can be compared and a sweep can choose one.

Names are paths into ``results.json`` (``policies/ppo/reward``, ``reward_accuracy/reward``); the last value of a
training metric is ``STAGE:METRIC`` (``sft:loss/nll``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from posttrain.errors import ConfigError, suggest
from posttrain.evals.run_view import RunView
from posttrain.train.log import METRICS

TIMES = ("machine", "stages", "seconds")
"""Parts of ``results.json`` that measure time, or what it was measured on: they differ between equal runs."""

_TEXTS = ("samples", "worst", "rows")  # answers with their scores; numbers by prompt


def numbers(view: RunView) -> dict[str, float]:
    """Return every number a run closed with: those of its results, then the last of each training metric."""
    found = dict(_walk(view.results or {}, ""))
    for stage, rows in view.logs.items():
        last = {key: value for row in rows for key, value in row.items() if key != "step" and not wall_clock(key)}
        found |= {f"{stage}:{key}": float(value) for key, value in last.items() if _is_number(value)}
    return found


def headlines(found: Mapping[str, float]) -> dict[str, float]:
    """Leave out what follows from other numbers (differences, comparisons) and accuracies by kind of failure."""
    derived = ("differences/", "reward_comparisons/")
    return {name: value for name, value in found.items() if "/by_failure/" not in name and not name.startswith(derived)}


def default_metric(found: Mapping[str, float]) -> str:
    """Choose the number a sweep compares when none is named.

    The first of these that a run has: the last policy's score under the reward model that training never saw
    (``reward_unseen``), its first score, the first reward model's accuracy, the first number of the results, the last
    stage's last loss, its first metric.

    Raises:
        ConfigError: the run measured nothing.
    """
    policies = [name for name in found if name.startswith("policies/")]
    last = [name for name in policies if name.split("/")[1] == policies[-1].split("/")[1]]
    training = [name for name in found if ":" in name]
    stage = [name for name in training if name.partition(":")[0] == training[-1].partition(":")[0]]
    wanted = [
        *(name for name in last if name.endswith("/reward_unseen")),
        *last,
        *(name for name in found if name.startswith("reward_accuracy/")),
        *(name for name in found if ":" not in name),
        *(name for name in stage if ":loss/" in name),
        *stage,
    ]
    if not wanted:
        raise ConfigError("the run measured nothing to compare: no results.json and no metrics.jsonl in any stage")
    return wanted[0]


def choose_metric(asked: str | None, found: Mapping[str, float]) -> str:
    """Return the number that a name means: the whole name, or an ending that only one name has.

    Raises:
        ConfigError: no number of that name, or several; all names are listed.
    """
    if asked is None:
        return default_metric(found)
    ending = [name for name in found if name == asked or name.endswith((f"/{asked}", f":{asked}"))]
    if asked in ending or len(ending) == 1:
        return asked if asked in ending else ending[0]
    if ending:
        raise ConfigError(f"metric '{asked}' may be {' or '.join(ending)}; give the whole name")
    close = suggest(asked, found)
    known = "" if close.startswith("known") else f" known: {', '.join(sorted(found)) or 'none'}"
    raise ConfigError(f"unknown metric '{asked}'; {close}{known}")


def rows_of(view: RunView, metric: str) -> list[float] | None:
    """Return a number's values by held-out prompt or ranking, in the order of the data; None if the results lack them."""
    results = view.results or {}
    section, _, model = metric.partition("/")
    if section == "reward_accuracy":
        return results.get(section, {}).get(model, {}).get("by_ranking")
    return results.get("rows", {}).get(metric)


def wall_clock(key: str) -> bool:
    """Say whether a training metric measures time or memory, and so differs between equal runs."""
    return key in METRICS and METRICS[key].wall_clock


def without_times(results: Any) -> Any:
    """Return results without what measures time, for a comparison to the bit."""
    if isinstance(results, Mapping):
        return {key: without_times(value) for key, value in results.items() if key not in TIMES}
    return [without_times(item) for item in results] if isinstance(results, list) else results


def _walk(value: Any, path: str) -> Iterator[tuple[str, float]]:
    """Yield names and numbers below a part of the results: a mean or an accuracy stands for all of its entry."""
    if isinstance(value, Mapping):
        centre = next((value[key] for key in ("mean", "accuracy") if _is_number(value.get(key))), None)
        if centre is not None:
            yield path, float(centre)
        for key, item in value.items():
            below = f"{path}/{key}".removeprefix("/")
            if key in (*TIMES, *_TEXTS):
                continue
            if isinstance(item, Mapping | list):
                yield from _walk(item, below)
            elif path and centre is None and _is_number(item):
                yield below, float(item)
    elif isinstance(value, list):
        for item in value:
            if isinstance(item, Mapping) and "name" in item:
                parts = [str(item["name"]), *([str(item["scorer"])] if "scorer" in item else [])]
                yield from _walk(item, "/".join([path, *parts]))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
