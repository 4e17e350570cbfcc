"""LoRA adapters as roles on one base in memory: switched per forward pass, saved in peft's own format."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from posttrain.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters on every linear layer of the trunk: ``W x + (alpha / rank) B A x``, no dropout.

    Source: Hu et al. 2021; all-linear placement as in Dettmers et al. 2023.
    """

    rank: int = 16
    alpha: int = 32


def add_adapter(net: nn.Module, trunk: nn.Module, name: str, lora: Lora, seed: int) -> None:
    """Put a fresh adapter (B = 0, so the function is unchanged) on every linear layer of the trunk, in place."""
    targets = sorted(
        {path.split(".")[-1] for path, m in trunk.named_modules() if _is_linear(m) and "lora_" not in path}
    )
    targets = sorted({t for t in targets if t != "base_layer"} or {"linear"})
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, lora_dropout=0.0, bias="none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, net, adapter_name=name)
    dtype = next(trunk.parameters()).dtype
    for layer in layers(net).values():
        for part in (layer.lora_A, layer.lora_B):
            if name in part:
                part[name].to(dtype)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, LoraLayer))


def layers(net: nn.Module) -> dict[str, Any]:
    """Every layer that carries adapters, by its path in ``net``."""
    return {path: m for path, m in net.named_modules() if isinstance(m, LoraLayer)}


@contextmanager
def active(net: nn.Module, name: str | None) -> Iterator[None]:
    """Run with the named adapter on, or with all adapters off for None.

    peft's own switches also change ``requires_grad``, which would cut gradients of a graph built before the switch.
    """
    for layer in layers(net).values():
        layer._disable_adapters = name is None
        if name is not None:
            layer._active_adapter = [name]
    yield


def parameters(net: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The adapter's trainable tensors by path."""
    return {path: p for path, p in net.named_parameters() if f".lora_A.{name}." in path or f".lora_B.{name}." in path}


def deltas(net: nn.Module, name: str) -> dict[str, Tensor]:
    """``(alpha / rank) B A`` of each adapted weight, in fp32 at least, keyed by the plain model's parameter name."""
    out: dict[str, Tensor] = {}
    for path, layer in layers(net).items():
        if name in layer.lora_A:
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            wide = torch.promote_types(a.dtype, torch.float32)
            out[f"{path}.weight"] = (b.to(wide) @ a.to(wide)) * layer.scaling[name]
    return out


@contextmanager
def merged(net: nn.Module, name: str | None) -> Iterator[None]:
    """Run with the adapter added to the weights themselves, without gradient; afterwards they are the bits they were.

    Decoding feeds few tokens a step, so that an adapter's small products cost more than the layer's own.
    """
    if name is None or not any(name in layer.lora_A for layer in layers(net).values()):
        with active(net, name):
            yield
        return
    found = {path: layer for path, layer in layers(net).items() if name in layer.lora_A}
    kept = {path: layer.get_base_layer().weight.detach().clone() for path, layer in found.items()}
    try:
        with torch.no_grad(), active(net, None):
            for path, delta in deltas(net, name).items():
                weight = found[path.removesuffix(".weight")].get_base_layer().weight
                weight.copy_(weight.to(delta.dtype) + delta)
            yield
    finally:
        with torch.no_grad():
            for path, layer in found.items():
                layer.get_base_layer().weight.copy_(kept[path])


def save_adapter(net: nn.Module, name: str, directory: Path, base: str, lora: Lora) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json`` that plain ``peft`` loads onto ``base``."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"base_model.model.{path.replace(f'.{name}.', '.')}": p.detach().contiguous().cpu()
        for path, p in parameters(net, name).items()
    }
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({path.split(".")[-1] for path in layers(net)})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": targets,
        "inference_mode": True,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_adapter(net: nn.Module, trunk: nn.Module, name: str, directory: Path) -> None:
    """Put an adapter that `save_adapter` wrote onto a network, frozen.

    Raises:
        ModelError: the file has other tensors than the network takes.
    """
    config = json.loads((directory / "adapter_config.json").read_text())
    add_adapter(net, trunk, name, Lora(rank=config["r"], alpha=config["lora_alpha"]), seed=0)
    tensors = load_file(directory / "adapter_model.safetensors")
    own = {f"base_model.model.{path.replace(f'.{name}.', '.')}": p for path, p in parameters(net, name).items()}
    if own.keys() != tensors.keys():
        odd = sorted(own.keys() ^ tensors.keys())[:3]
        raise ModelError(f"adapter '{directory}' does not fit this network: {odd} are on one side only")
    for key, parameter in own.items():
        parameter.data.copy_(tensors[key])
        parameter.requires_grad_(False)
