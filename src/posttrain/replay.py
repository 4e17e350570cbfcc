"""Compute again a step that was skipped, with the roles, objective and reward of the stage it happened in."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

from rich.console import Console

from posttrain.errors import ConfigError
from posttrain.graph import read_json
from posttrain.rerun import read_record, rebuild
from posttrain.stages import Context


def replay_dump(dump: Path) -> str:
    """Build the stage of ``RUN/STAGE/faults/step-N`` as its run did and compute the dumped step; nothing in the run is touched.

    Returns:
        The first thing that is not finite, and whether it is what was found then.

    Raises:
        ConfigError: it is not in a run, or the stage did not come to its training.
    """
    from posttrain.train.guard import Replayed, replaying

    dump = dump.resolve()
    stage_dir = dump.parents[1]
    run, name = stage_dir.parent, stage_dir.name
    record = read_record(run)
    recipe = rebuild(record)
    if dump.parent.name != "faults" or name not in recipe.stages:
        raise ConfigError(
            f"{dump} is not in a run; expected RUN/STAGE/faults/step-N with the stage in {run / 'run.json'}"
        )
    inputs = {
        field: run / other for field, other in (read_json(stage_dir / "stage.json") or {}).get("inputs", {}).items()
    }
    with tempfile.TemporaryDirectory(prefix="posttrain-replay-") as scratch:
        directory = Path(scratch) / name
        directory.mkdir()
        ctx = Context(
            dir=directory,
            inputs=inputs,
            console=Console(file=io.StringIO()),
            seed=record["seed"],
            tiny=record["tiny"],
            typed=recipe.typed.get(name, frozenset()),
        )
        try:
            with replaying(dump):
                recipe.stages[name].run(ctx)
        except Replayed as done:
            return str(done)
    raise ConfigError(f"stage '{name}' ended without training; {dump} can't be replayed")
