"""Merging model directories into one: tensor by tensor from disk to disk, kept only if it computes what it should."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as hf_logging

import posttrain
from posttrain.errors import ConfigError, ModelError
from posttrain.models.load import MODEL_FILES
from posttrain.models.merge import checked_weights, merged, merges
from posttrain.models.stored import DTYPES, Stored, network, require_same_network, tokenizer_hash

PROMPTS = 16
"""How many prompts a merge is checked on."""
TOLERANCE = 1e-4
"""Largest difference of a log-probability (nats a token) or a score in fp32, a share of it where it is above 1."""


def merge_models(
    method: str,
    parts: Sequence[Stored],
    out: Path,
    *,
    prompts: Sequence[Sequence[int]],
    base: Stored | None = None,
    weights: Sequence[float] | None = None,
    options: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Merge models into ``out``, a plain model directory with ``merge.json``, and return what that says; or write nothing.

    Parity is checked twice, in fp32, on every token of 16 prompts (a reward model: on its score of each prompt): each part
    as this module reads it against the part as transformers and peft load it, so that a merge of weight 1 is that part; and the
    directory as transformers loads it against the merge in memory.

    Args:
        method: a name in `posttrain.models.merge.merges`.
        parts: the models; the first one's configuration, tokenizer and chat template are taken over.
        out: must not hold a model yet.
        prompts: token ids, at least 16 prompts.
        base: what the parts started from, for methods that need it.
        weights: one a part, of sum 1; None: equal ones.
        options: keyword arguments of the method.

    Raises:
        ConfigError: a method, option, weight or prompt that can't be.
        ModelError: parts that don't fit together, or a check that failed; names the file or tensor.
    """
    shares = _checked(method, parts, out, len(prompts), base, weights, options)
    prompts = [list(prompt) for prompt in prompts[:PROMPTS]]
    misread = [parity(f"'{part.path}' as it was read", _filled(part), _loaded(part), prompts) for part in parts]
    partial = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    partial.mkdir(parents=True)
    try:
        net = network(parts[0].directory)
        tensors = merged(method, parts, base=base, weights=weights, options=options)
        header = _header(parts)
        _write(partial / "model.safetensors", header, _filling(net, tensors))
        _copy_files(parts[0], partial, {dtype for dtype, _ in header.values() if dtype.is_floating_point})
        worst = parity(f"the merge in '{out}'", _from_disk(parts[0].kind, partial), net, prompts)
        record = {
            "method": method,
            "options": dict(options or {}),
            "parts": [_record(part) | {"parity": error} for part, error in zip(parts, misread, strict=True)],
            "base": None if base is None else _record(base),
            "tensors": len(header),
            "dtypes": sorted({str(dtype).removeprefix("torch.") for dtype, _ in header.values()}),
            "parity": {"prompts": len(prompts), "largest": worst, "tolerance": TOLERANCE},
            "posttrain": posttrain.__version__,
        }
        for part, share in zip(record["parts"], shares, strict=True):
            part |= {} if share is None else {"weight": share}
        (partial / "merge.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        _move(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return record


def _checked(
    method: str,
    parts: Sequence[Stored],
    out: Path,
    prompts: int,
    base: Stored | None,
    weights: Sequence[float] | None,
    options: Mapping[str, float] | None,
) -> Sequence[float | None]:
    """The weights, None for each where the method takes none; refuses what can't be before a tensor is read."""
    facts = merges.facts(method)
    merges.bound(method, options or {})
    taken = facts.get("weights", True)
    shares = checked_weights(method, len(parts), weights, taken)
    if base is not None and "base" not in facts.get("needs", ()):
        raise ConfigError(f"'{method}' reads no base, got '{base.path}'; leave it out")
    if (out / "config.json").exists():
        raise ConfigError(f"'{out}' holds a model; choose another directory")
    if prompts < PROMPTS:
        raise ConfigError(f"got {prompts} prompts to check the merge on; expected at least {PROMPTS}")
    require_same_network([*parts, *([] if base is None else [base])])
    return shares if taken else [None] * len(parts)


# ---------------------------------------------------------------------------- parity


def parity(what: str, net: PreTrainedModel, other: PreTrainedModel, prompts: Sequence[list[int]]) -> float:
    """The largest difference between what two networks compute on the prompts.

    Raises:
        ModelError: it is above `TOLERANCE`, or not a number.
    """
    worst = 0.0
    for prompt in prompts:
        one, two = outputs(net, prompt), outputs(other, prompt)
        difference = float(((one - two).abs() / two.abs().clamp(min=1)).max())
        if not difference <= TOLERANCE:
            raise ModelError(
                f"{what} is not what it should compute: a difference of {difference:.2e} on {len(prompts)} prompts "
                f"(limit {TOLERANCE:g}); nothing was written"
            )
        worst = max(worst, difference)
    return worst


def outputs(net: PreTrainedModel, prompt: list[int]) -> Tensor:
    """Log-probabilities of a prompt's tokens after the first, ``[T - 1]`` in nats, or a reward model's score ``[1]``."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        logits = net(input_ids=ids, use_cache=False).logits[0]
    if logits.ndim == 1:
        return logits
    return logits[:-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]


def _filled(part: Stored) -> PreTrainedModel:
    """A network that holds a part's tensors, as this module reads them."""
    net = network(part.directory)
    for _ in _filling(net, iter(part.items())):
        pass
    return net


def _filling(net: PreTrainedModel, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Pass tensors on, and put each into a network.

    Raises:
        ModelError: the network has no such tensor, or one that it has never came.
    """
    state = net.state_dict()
    tied = set(net.all_tied_weights_keys)
    missing = set(state) - tied
    for name, tensor in tensors:
        if name not in state or state[name].shape != tensor.shape:
            has = f"has {tuple(state[name].shape)} there" if name in state else "has no such tensor"
            raise ModelError(f"'{name}' {tuple(tensor.shape)}: a {type(net).__name__} {has}; can't merge its files")
        state[name].copy_(tensor)
        missing.discard(name)
        yield name, tensor
    if missing:
        raise ModelError(f"no file has '{min(missing)}', which a {type(net).__name__} needs; can't merge its files")


def _loaded(part: Stored) -> PreTrainedModel:
    """A part as transformers loads it, its adapter put on by peft and not merged."""
    net = _from_disk(part.kind, part.directory)
    if part.adapter is not None:
        from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

        inject_adapter_in_model(LoraConfig.from_pretrained(str(part.adapter)), net)
        set_peft_model_state_dict(net, load_file(part.adapter / "adapter_model.safetensors"))
    return net


def _from_disk(kind: Any, directory: Path) -> PreTrainedModel:
    """A directory in fp32, as transformers loads it.

    Raises:
        ModelError: it does not.
    """
    hf_logging.disable_progress_bar()
    try:
        return kind.from_pretrained(str(directory), dtype=torch.float32).eval()
    except Exception as error:  # transformers raises many kinds, and each means that the merge is of no use
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"transformers can't load '{directory}' ({reason}); nothing was written") from error


# ---------------------------------------------------------------------------- files


def _header(parts: Sequence[Stored]) -> dict[str, tuple[torch.dtype, list[int]]]:
    """Dtype and shape of every merged tensor: the widest dtype that the parts have it in."""
    headers = [part.header() for part in parts]
    found: dict[str, tuple[torch.dtype, list[int]]] = {}
    for name, (dtype, shape) in headers[0].items():
        for header in headers[1:]:
            if name in header:  # that one has it not is said when tensors are read
                dtype = torch.promote_types(dtype, header[name][0])
        found[name] = dtype, shape
    return found


def _write(
    path: Path, header: Mapping[str, tuple[torch.dtype, list[int]]], tensors: Iterator[tuple[str, Tensor]]
) -> None:
    """Write a safetensors file from tensors that come one at a time, in the header's order.

    The format: a length in 8 bytes, little-endian; JSON with dtype, shape and place of each; their bytes.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in header.items():
        end = offset + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {"dtype": names[dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, tensor), expected in zip(tensors, header, strict=True):
            if name != expected or tensor.dtype != header[name][0]:
                raise ModelError(
                    f"'{name}' came as {tensor.dtype} where '{expected}' {header[expected]} was to be written"
                )
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _copy_files(part: Stored, directory: Path, dtypes: set[torch.dtype]) -> None:
    """Configuration with the merge's dtype, generation settings, tokenizer and chat template of the first part."""
    config = {key: value for key, value in part.config.items() if key != "torch_dtype"}
    widest = max(dtypes, key=lambda dtype: (dtype.itemsize, str(dtype)))
    config["dtype"] = str(widest).removeprefix("torch.")
    weights = (
        "*.safetensors",
        "*.safetensors.index.json",
        "*.bin",
        "*.bin.index.json",
        "config.json",
        "adapter_config.json",
    )
    for place in dict.fromkeys((part.directory, part.tokenizer())):
        for pattern in (p for p in MODEL_FILES if p not in weights):
            for item in place.glob(pattern):
                if item.is_dir():
                    shutil.copytree(item, directory / item.name, dirs_exist_ok=True)
                else:
                    shutil.copyfile(item, directory / item.name)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _record(part: Stored) -> dict[str, Any]:
    """What ``merge.json`` says of a model that went in."""
    dtypes = {str(dtype).removeprefix("torch.") for dtype, _ in part.header().values()}
    adapter = {} if part.adapter is None else {"adapter_on": str(part.directory)}
    about = {"path": part.path, "sha256": part.sha256(), "tokenizer": tokenizer_hash(part), "dtypes": sorted(dtypes)}
    return about | adapter


def _move(partial: Path, out: Path) -> None:
    """Move files to where they belong, ``config.json`` last: without it a directory is no model."""
    out.mkdir(parents=True, exist_ok=True)
    for item in sorted(partial.iterdir(), key=lambda item: item.name == "config.json"):
        os.replace(item, out / item.name)
