"""What stages read: models by name or input, data by name, dtypes, and where tokens come from."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from posttrain.data import ReadReport, read, resolve_data, stop_ids
from posttrain.data.views import best_and_worst
from posttrain.errors import ConfigError, DataError, suggest
from posttrain.machine import fast_bf16
from posttrain.models.load import find_model, load_generation_config, load_tokenizer, model_files
from posttrain.registry import load_object
from posttrain.rewards.named import REWARDS
from posttrain.rewards.panel import panel_files
from posttrain.stages import Context, Stage, stage_model
from posttrain.types import Example
from posttrain.work.generated import DATA

_OF_LABELS = {
    "demonstrations": "keep the rows to imitate (label true) without the column 'label' or 'score'",
    "rankings": "give a good and a bad answer to the same prompt as 'chosen' and 'rejected' of one row",
    "prompts": "keep the column 'prompt' alone",
}


@dataclass(frozen=True)
class Start:
    """The model a stage starts from: its directory, its label for tables, and its tokenizer."""

    path: str
    label: str
    tokenizer: Any

    @property
    def stop_ids(self) -> frozenset[int]:
        """Every id that ends a response."""
        return stop_ids(self.tokenizer, load_generation_config(self.path))

    def decode(self, ids: Sequence[int]) -> str:
        """A response as text, without control tokens; for display and text rewards only."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


def start_from(model: str | Stage, ctx: Context, field: str = "model") -> Start:
    """Resolve a model field: an earlier stage's directory, or a name, whose stand-in is announced."""
    if isinstance(model, Stage):
        path = str(ctx.inputs[field])
        return Start(path, Path(path).name, load_tokenizer(path))
    found = find_model(model)
    if found.note:
        ctx.console.print(f"[yellow]{found.note}[/]")
    return Start(found.path, found.label, load_tokenizer(found.path))


def stage_dir(value: str | Stage, ctx: Context, field: str) -> Path:
    """The directory that an earlier stage wrote, which a field refers to or names."""
    return ctx.inputs[field] if isinstance(value, Stage) else Path(value)


def row_weights(examples: Sequence[Example], ctx: Context) -> list[float]:
    """Each row's weight in the loss; that rows of weight 0 are not visited is said."""
    unused = sum(e.weight == 0 for e in examples)
    if unused:
        ctx.console.print(f"{unused} of {len(examples)} rows have weight 0 and are not trained on", highlight=False)
    return [e.weight for e in examples]


def refuse_weights(examples: Sequence[Example], stage: str) -> None:
    """Raise where a row's weight would have no effect.

    Raises:
        DataError: a weight other than 1.
    """
    for example in examples:
        if example.weight != 1.0:
            raise DataError.at(
                example.file,
                example.row,
                "weight",
                f"{stage} gives every prompt the same weight, got {example.weight}",
                "remove the weight, or repeat the row",
            )


def choose_dtype(name: str, path: str) -> torch.dtype:
    """``auto`` is bf16 where the processor has bf16 products (AVX512-BF16 or AMX), else fp32.

    Networks narrower than 256 stay in fp32: they gain no speed from bf16.
    """
    config = Path(path) / "config.json"
    if name == "auto" and config.exists() and json.loads(config.read_text()).get("hidden_size", 256) < 256:
        return torch.float32
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    return torch.bfloat16 if fast_bf16() else torch.float32


def data_files(name: str, model: str | None) -> dict[str, Path]:
    """Files of a data set by name: one of `posttrain.work.generated`, a path, or the directory of a stage which made data.

    ``default`` becomes the small world's where the shipped small model stands in, which could not read anything else.
    """
    if name == "default" and model is not None and "small-" in Path(find_model(model).path).name:
        name = "smallworld"
    kind, _, more = name.partition(":")
    if kind in DATA and not Path(name).exists():
        return DATA[kind](more)
    return made_files(Path(name)) or resolve_data(name)


def load_examples(stage: Any, ctx: Context, part: str) -> list[Example]:
    """Read one part of a stage's data (demonstrations, rankings, prompts ...), cut to its ``limit``.

    Raises:
        ConfigError: the data has no such part.
    """
    made = isinstance(stage.data, Stage)
    files = with_tasks(made_files(ctx.inputs["data"]) if made else data_files(stage.data, _root_model(stage)))
    if part == "labelled" and part not in files and "rankings" in files:
        found = best_and_worst(load_examples(stage, ctx, "rankings"))
        ctx.console.print(
            f"rankings: of each row the best answer as a good one, the worst as a bad one: {len(found)} answers"
        )
        return found
    if part not in files:
        raise _lacks(ctx.inputs["data"].name if made else stage.data, part, files)
    examples = read_part(files[part], ctx, getattr(stage, "limit", None), getattr(stage, "skip_bad", 0))
    if part == "prompts" and any(e.responses for e in examples):  # a right answer beside a task is no sample
        return [replace(e, responses=(), preferences=()) for e in examples]
    return examples


def with_tasks(files: dict[str, Path]) -> dict[str, Path]:
    """Files by part, where the only one also has prompts if its rows say what a right answer is."""
    if len(files) != 1 or "prompts" in files:
        return files
    (path,) = files.values()
    first = next(iter(read(path, limit=1, skip_bad=100)), None)
    return files | {"prompts": path} if first is not None and first.target is not None else files


def made_files(directory: Path) -> dict[str, Path]:
    """Files of data by part that a stage wrote (`posttrain.stages.making`); none where it made no data."""
    return {path.stem: path for path in sorted((directory / "data").glob("*.jsonl"))}


def load_any(stage: Any, ctx: Context) -> list[Example]:
    """Read all of a stage's data: of several stages one after the other; of a name its ``part``, or the only one there is.

    Raises:
        ConfigError: several parts of which none is named, or not the one named.
    """
    places = [place for name, place in ctx.inputs.items() if name.partition(".")[0] == "data"]
    sets = [made_files(place) for place in places] or [data_files(stage.data, None)]
    found: list[Example] = []
    for files, name in zip(sets, [p.name for p in places] or [stage.data], strict=True):
        part = stage.part or (next(iter(files)) if len(files) == 1 else "")
        if part not in files:
            raise _lacks(name, part or "single part (name one with part)", files)
        found += read_part(files[part], ctx, stage.limit, stage.skip_bad)
    return found


def _lacks(data: str, part: str, files: Iterable[str]) -> ConfigError:
    """The error of data without the part that a stage reads; of labelled answers it says how to make that of them."""
    if "labelled" not in files or part not in _OF_LABELS:
        return ConfigError(f"data '{data}' has no {part}; {suggest(part, files)}; expected a file such as {part}.jsonl")
    return ConfigError(f"data '{data}' has no {part}, but answers with a label or score each; {_OF_LABELS[part]}")


def test_file(stage: Any) -> Path:
    """The held-out rankings of a stage's ``test`` data, else its rankings.

    Raises:
        ConfigError: it has neither.
    """
    files = data_files(stage.test, _root_model(stage))
    found = files.get("heldout_rankings") or files.get("rankings")
    if found is None:
        raise ConfigError(
            f"test data '{stage.test}' has no rankings; it has {', '.join(files)}; give pairs or rankings"
        )
    return found


def read_part(file: Path, ctx: Context, limit: int | None, skip_bad: int = 0) -> list[Example]:
    """Read a source; what is left out (rows that teach nothing, up to ``skip_bad`` faulty ones) is printed by reason.

    Raises:
        DataError: more faulty rows than ``skip_bad``.
    """
    report = ReadReport()
    examples = read(file, limit=limit, skip_bad=skip_bad, report=report)
    if report.useless or report.bad:
        ctx.console.print(f"{file.name}: {report}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    return examples


def _root_model(stage: Stage) -> str | None:
    """The model name at the root of a stage's inputs, following ``model``, ``sft`` and ``policy``."""
    name = stage_model(stage)
    if name is not None:
        return name
    for field in ("model", "sft", "reference", "policy"):
        if isinstance(earlier := getattr(stage, field, None), Stage):
            return _root_model(earlier)
    return None


def stage_files(stage: Any) -> list[Path]:
    """Data files and local weights a stage reads, in a stable order; finding them is also the check that they exist."""
    out: list[Path] = []
    if isinstance(getattr(stage, "data", None), str):
        files = data_files(stage.data, _root_model(stage))
        files = with_tasks(files) if "prompts" in stage.DATA else files
        parts = (stage.part,) if getattr(stage, "part", None) else stage.DATA or tuple(files)
        if parts == ("labelled",) and "labelled" not in files and "rankings" in files:
            parts = ("rankings",)
        missing = [part for part in parts if part not in files]
        if missing and parts[0] in missing:
            raise _lacks(stage.data, missing[0], files)
        out += [files[part] for part in parts if part in files]
    if isinstance(reward := getattr(stage, "reward", None), str):
        out += reward_files(reward, functions=getattr(stage, "FUNCTIONS", False))
    if getattr(stage, "test", None):
        out.append(test_file(stage))
    if isinstance(merging := getattr(stage, "merging_base", None), str):
        out += model_files(find_model(merging).path)
    if (name := stage_model(stage)) is not None:
        out += model_files(find_model(name).path)
    return out


def reward_files(reward: str, *, functions: bool) -> list[Path]:
    """Files that decide what a reward gives: of a reward stage's directory, or where allowed the module of a function.

    Raises:
        ConfigError: neither, nor the name of a reward.
    """
    if functions and reward in REWARDS:
        return []
    if functions and ":" in reward:
        load_object(reward)
        origin = getattr(sys.modules[reward.partition(":")[0]], "__file__", None)
        return [Path(origin)] if origin else []
    if not (Path(reward) / "reward.json").exists():
        other = f", module:function, or one of {', '.join(REWARDS)}" if functions else ""
        raise ConfigError(
            f"no reward model in '{reward}' (no reward.json); give the directory of a reward stage{other}"
        )
    return panel_files(reward)
