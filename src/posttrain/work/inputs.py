"""What stages read: models by name or input, data by name, dtypes, and where tokens come from."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from posttrain.data import ReadReport, read, resolve_data, stop_ids
from posttrain.errors import ConfigError, suggest
from posttrain.models.load import Found, cache_dir, find_model, load_generation_config, load_tokenizer
from posttrain.stages import Context, Stage, stage_model
from posttrain.types import Example


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


def choose_dtype(name: str, path: str) -> torch.dtype:
    """``auto`` is bf16 where the processor has bf16 products (AVX512-BF16 or AMX), else fp32.

    Networks narrower than 256 stay in fp32: they gain no speed from bf16.
    """
    config = Path(path) / "config.json"
    if name == "auto" and config.exists() and json.loads(config.read_text()).get("hidden_size", 256) < 256:
        return torch.float32
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    cpu: Any = torch.cpu
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    fast = any(getattr(cpu, probe, lambda: False)() for probe in probes)
    return torch.bfloat16 if fast else torch.float32


def data_files(name: str, model: str | None) -> dict[str, Path]:
    """Files of a data set by name.

    ``smallworld:N`` is generated, with N demonstrations; ``default`` becomes the small world's where the shipped small
    model stands in, which could not read anything else.
    """
    if name == "default" and model is not None and "small-" in Path(find_model(model).path).name:
        name = "smallworld"
    if name.partition(":")[0] != "smallworld":
        return resolve_data(name)
    from posttrain.data import smallworld

    count = int(size) if (size := name.partition(":")[2]) else 96
    directory = cache_dir() / f"smallworld-1-{count}"
    if not (directory / "heldout_prompts.jsonl").exists():
        partial = directory.with_name(f"{directory.name}.{os.getpid()}.tmp")
        partial.mkdir(parents=True)
        smallworld.write(partial, n_demonstrations=count)
        if not directory.exists():
            partial.rename(directory)
    return resolve_data(str(directory))


def load_examples(stage: Any, ctx: Context, part: str) -> list[Example]:
    """Read one part of a stage's data (demonstrations, rankings, prompts ...), cut to its ``limit``.

    Raises:
        ConfigError: the data has no such part.
    """
    files = data_files(stage.data, _root_model(stage))
    if part not in files:
        raise ConfigError(
            f"data '{stage.data}' has no {part}; {suggest(part, files)}; expected a file such as {part}.jsonl"
        )
    return read_part(files[part], ctx, getattr(stage, "limit", None), getattr(stage, "skip_bad", 0))


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
    for field in ("model", "sft", "policy"):
        if isinstance(earlier := getattr(stage, field, None), Stage):
            return _root_model(earlier)
    return None


def stage_files(stage: Any) -> list[Path]:
    """Data files and local weights a stage reads, in a stable order; finding them is also the check that they exist."""
    out: list[Path] = []
    if stage.DATA:
        files = data_files(stage.data, _root_model(stage))
        missing = [part for part in stage.DATA if part not in files]
        if missing and stage.DATA[0] in missing:
            raise ConfigError(f"data '{stage.data}' has no {missing[0]}; {suggest(missing[0], files)}")
        out += [files[part] for part in stage.DATA if part in files]
    if test := getattr(stage, "test", None):
        held = data_files(test, _root_model(stage))
        out.append(held.get("heldout_rankings") or held["rankings"])
    if (name := stage_model(stage)) is not None:
        found: Found = find_model(name)
        weights = Path(found.path) / "model.safetensors"
        out += [weights] if weights.exists() else []
    return out
