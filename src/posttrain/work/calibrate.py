"""Keeping a temperature that was fitted: from then on a reward model's scores are divided by it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.errors import ConfigError
from posttrain.rewards.trained import RECORD
from posttrain.train.checkpoint import write_json

_CHANCE = 1e3  # temperatures from here on say that the order is a guess, those below its inverse that nothing is wrong
_UNFIT = {"steps": "chances of steps", "verdicts": "a verdict's expected value"}


def save_temperatures(paths: Sequence[str], files: Sequence[str], results: Mapping[str, Any]) -> Iterator[str]:
    """Write the temperatures of `posttrain.work.reward_bench.evaluate`'s results, in its order, and say each in a line.

    A model that has a temperature gets the product: the one that was fitted is of scores already divided. It was fitted on half of the
    prompts, so that the error that was measured on the others is that of these very scores.

    Raises:
        ConfigError: scores that are no log-odds, or data that tells no temperature.
    """
    measured = [m for m in results["models"].values() if not m.get("baseline")]
    for path, model in zip(paths, measured, strict=True):
        place, found = Path(path) / RECORD, model.get("calibration")
        record = json.loads(place.read_text()) if place.exists() else {}
        if record.get("form") in _UNFIT:
            raise ConfigError(f"'{path}' scores by {_UNFIT[record['form']]}, which no temperature makes a probability")
        if found is None or not 1 / _CHANCE < found["temperature"] < _CHANCE:
            said = "pairs of too few prompts" if found is None else f"a temperature of {found['temperature']:.3g}"
            raise ConfigError(f"'{path}' can't be calibrated: {said}; give pairs that it orders better than chance")
        temperature = record.get("temperature", 1.0) * found["temperature"]
        names = ", ".join(Path(file).name for file in files)
        about = {"pairs": found["fitted_on"], "data": names, "ece": found["after"]["ece"]}
        write_json(place, {**record, "temperature": temperature, "calibration": about})
        yield (
            f"{place}: temperature {temperature:.3g}, fitted on {found['fitted_on']} pairs; on {found['pairs']} others the "
            f"calibration error goes from {found['before']['ece']:.3f} to {found['after']['ece']:.3f}"
        )
