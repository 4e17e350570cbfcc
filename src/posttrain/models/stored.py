"""Models on disk as mappings from names to tensors, each read when it is asked for; an adapter is added to its base on the way."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from posttrain.errors import ConfigError, ModelError
from posttrain.models.load import find_model, model_files

KINDS = {"ForCausalLM": AutoModelForCausalLM, "LMHeadModel": AutoModelForCausalLM}
KINDS |= {"ForSequenceClassification": AutoModelForSequenceClassification}
PLAIN_LORA = {"bias": "none", "use_dora": False, "use_rslora": False, "fan_in_fan_out": False}
"""Settings of a LoRA adapter other than which its delta is not ``alpha / rank B A``, with the values they must have."""


@dataclass(frozen=True)
class Stored(Mapping[str, Tensor]):
    """A model directory, or an adapter and the directory of its base.

    A tensor that another one is tied to is left out. With an adapter every tensor is in fp32: added in bf16, a small delta would
    round away.

    Attributes:
        path: as it was given.
        directory: of the weights, or of the adapter's base.
        adapter: the directory of the adapter, if it is one.
        config: of the network, as in ``config.json``.
        files: the weights file of each tensor.
        low_rank: of each adapted tensor the names of A and B, in the adapter's file.
        scale: ``alpha / rank``.
    """

    path: str
    directory: Path
    adapter: Path | None
    config: Mapping[str, Any]
    files: Mapping[str, Path]
    low_rank: Mapping[str, tuple[str, str]] = field(default_factory=dict[str, tuple[str, str]])
    scale: float = 1.0

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, name: str) -> Tensor:
        tensor = _read(self.files[name], name)
        if self.adapter is None or not tensor.is_floating_point():
            return tensor
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        if name in self.low_rank:
            a, b = (
                _read(self.adapter / "adapter_model.safetensors", key).to(wide.dtype) for key in self.low_rank[name]
            )
            wide = wide + (b @ a) * self.scale
        return wide

    def header(self) -> dict[str, tuple[torch.dtype, list[int]]]:
        """Dtype and shape of every tensor, without reading any."""
        found: dict[str, tuple[torch.dtype, list[int]]] = {}
        for file in dict.fromkeys(self.files.values()):
            with safe_open(file, framework="pt") as tensors:
                for name in (n for n in self.files if self.files[n] == file):
                    part = tensors.get_slice(name)
                    dtype = torch.empty(0, dtype=DTYPES[part.get_dtype()]).dtype
                    if self.adapter is not None and dtype.is_floating_point:
                        dtype = torch.promote_types(dtype, torch.float32)
                    found[name] = dtype, part.get_shape()
        return {name: found[name] for name in self.files}

    @property
    def kind(self) -> Any:
        """The class of transformers that loads it."""
        return _kind(self.config, self.directory)

    @property
    def own(self) -> Path:
        """The directory that a person named: the adapter's, else that of the weights."""
        return self.adapter or self.directory

    def tokenizer(self) -> Path:
        """The directory that holds its tokenizer: the adapter's if it has one.

        Raises:
            ModelError: there is none.
        """
        for place in (self.own, self.directory):
            if (place / "tokenizer_config.json").exists() or (place / "tokenizer.json").exists():
                return place
        raise ModelError(f"'{self.path}' has no tokenizer: can't tell which tokens its rows are; put its files there")

    def sha256(self) -> str:
        """Hash of the weights files' bytes, the adapter's too."""
        digest = hashlib.sha256()
        adapter = [] if self.adapter is None else [self.adapter / "adapter_model.safetensors"]
        for file in [*sorted(set(self.files.values())), *adapter]:
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
        return digest.hexdigest()


DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64,
    "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Dtypes by their names in the safetensors format."""


def open_model(name: str, base: str | None = None) -> Stored:
    """Open a model by name or directory, or an adapter; ``base`` stands in for the base that an adapter names.

    Raises:
        ConfigError: nothing there, or an adapter in the place of a base.
        ModelError: no safetensors, or an adapter that is no plain LoRA.
    """
    place = Path(name)
    if not (place / "adapter_config.json").exists() or (place / "config.json").exists():
        return _open_plain(name)
    config = json.loads((place / "adapter_config.json").read_text())
    start = _open_plain(base or str(config.get("base_model_name_or_path")))
    low_rank, scale = _plain_lora(place, config, start)
    return Stored(name, start.directory, place, start.config, start.files, low_rank, scale)


def _open_plain(name: str) -> Stored:
    """A directory of weights in safetensors, one file or several."""
    if (Path(name) / "adapter_config.json").exists() and not (Path(name) / "config.json").exists():
        raise ConfigError(f"'{name}' is an adapter; expected a model directory that adapters can be added to")
    files = model_files(find_model(name).path)
    directory = next(file.parent for file in files if file.name == "config.json")
    weights = [file for file in files if file.suffix == ".safetensors" and not file.name.startswith("adapter_")]
    if not weights:
        raise ModelError(f"'{name}' has no safetensors; load it in transformers and save it with save_pretrained")
    config = json.loads((directory / "config.json").read_text())
    tied = network(directory, "meta").all_tied_weights_keys
    found: dict[str, Path] = {}
    for file in weights:
        with safe_open(file, framework="pt") as tensors:
            found |= dict.fromkeys((key for key in tensors.keys() if key not in tied), file)  # noqa: SIM118
    return Stored(name, directory, None, config, found)


def _plain_lora(place: Path, config: Mapping[str, Any], base: Stored) -> tuple[dict[str, tuple[str, str]], float]:
    """Of each adapted tensor the names of A and B, and ``alpha / rank``.

    Raises:
        ModelError: the adapter is of another kind, or of another network.
    """
    odd = [f"{key}={config[key]!r}" for key, value in PLAIN_LORA.items() if key in config and config[key] != value]
    odd += [key for key in ("rank_pattern", "alpha_pattern", "modules_to_save") if config.get(key)]
    odd += [f"peft_type={config.get('peft_type')!r}"] if config.get("peft_type") != "LORA" else []
    if odd:
        raise ModelError(
            f"adapter '{place}' is no plain LoRA ({', '.join(odd)}); merge it with peft, then give the directory"
        )
    file = place / "adapter_model.safetensors"
    if not file.exists():
        raise ModelError(f"adapter '{place}' has no adapter_model.safetensors; save it with safe_serialization=True")
    with safe_open(file, framework="pt") as tensors:
        names = set(tensors.keys())
    found = {}
    for a in sorted(name for name in names if name.endswith(".lora_A.weight")):
        stem = a.removesuffix(".lora_A.weight")
        found[stem.removeprefix("base_model.model.") + ".weight"] = (a, f"{stem}.lora_B.weight")
    left = sorted(names - {name for pair in found.values() for name in pair}) + sorted(found.keys() - base.files.keys())
    if left or not found:
        raise ModelError(f"adapter '{place}': '{(left or ['lora_A'])[0]}' does not fit the base '{base.path}'")
    return found, float(config["lora_alpha"]) / int(config["r"])


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name)


def _kind(config: Mapping[str, Any], directory: Path) -> Any:
    name = (config.get("architectures") or ["none"])[0]
    for ending, kind in KINDS.items():
        if name.endswith(ending):
            return kind
    raise ModelError(f"'{directory}' is a {name}; expected a model whose class ends in {', '.join(KINDS)}")


def network(directory: Path, device: str = "cpu") -> PreTrainedModel:
    """The network of a model directory in fp32, its weights not read."""
    config = AutoConfig.from_pretrained(directory)
    kind = _kind(json.loads((directory / "config.json").read_text()), directory)
    with torch.random.fork_rng(devices=[]), torch.device(device):
        return kind.from_config(config, dtype=torch.float32).eval().requires_grad_(False)


def tokenizer_hash(model: Stored) -> str:
    """Hash of which id is which token: of ``tokenizer.json`` without padding and truncation, else of the vocabulary's files."""
    place = model.tokenizer()
    whole = place / "tokenizer.json"
    if whole.exists():
        content = json.loads(whole.read_text(encoding="utf-8"))
        kept = {key: value for key, value in content.items() if key not in ("padding", "truncation")}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    digest = hashlib.sha256()
    for pattern in ("vocab.*", "merges.txt", "*.model", "added_tokens.json"):
        for file in sorted(place.glob(pattern)):
            digest.update(file.read_bytes())
    return digest.hexdigest()


IGNORED = ("transformers_version", "dtype", "torch_dtype", "use_cache", "bos_token_id", "eos_token_id")
"""Fields of a configuration that don't change what the network computes."""


def require_same_network(models: Sequence[Stored]) -> None:
    """Check that models can be merged: one architecture, one configuration, one tokenizer.

    Raises:
        ModelError: names the file and the field that differ.
    """
    first = models[0]
    ignored = {*IGNORED, *(() if first.kind is AutoModelForSequenceClassification else ("pad_token_id",))}
    for other in models[1:]:
        for key in sorted((first.config.keys() | other.config.keys()) - ignored):
            if key.endswith("name_or_path"):  # where a model came from
                continue
            if first.config.get(key) != other.config.get(key):
                got = f"{first.config.get(key)!r} in '{first.path}', {other.config.get(key)!r} in '{other.path}'"
                raise ModelError(f"config.json, field '{key}': {got}; only models of one shape can be merged")
        if tokenizer_hash(first) != tokenizer_hash(other):
            raise ModelError(
                f"the tokenizers of '{first.tokenizer()}' and '{other.tokenizer()}' differ: equal ids are other tokens; "
                "only models of one tokenizer can be merged"
            )
