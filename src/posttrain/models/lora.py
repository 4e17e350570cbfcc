"""LoRA adapters as roles on one base in memory: switched per forward pass, saved in peft's own format."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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
        layer.forward = partial(_forward, layer)
        for part in (layer.lora_A, layer.lora_B):
            if name in part:
                part[name].to(dtype)


class _Adapted(torch.autograd.Function):
    """``x W' + b + scale (x A') B'`` of a frozen layer ``[N, in] -> [N, out]``.

    The low-rank product is added while it is made; as separate operations its two passes over ``[N, out]``, and those of
    their gradients, cost as much as the product.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        inner = rows @ a.t()
        out = nn.functional.linear(rows, weight, bias).addmm_(inner, b.t(), alpha=scale)
        ctx.save_for_backward(rows, inner, weight, a, b)
        ctx.scale = scale
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, inner, weight, a, b = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        inner_grad = (flat @ b).mul_(ctx.scale)
        d_rows = None
        if ctx.needs_input_grad[0]:
            d_rows = (flat @ weight).addmm_(inner_grad, a).view(*grad.shape[:-1], weight.shape[1])
        d_b = (flat.t() @ inner).mul_(ctx.scale)
        return d_rows, None, None, inner_grad.t() @ rows, d_b, None


def _forward(layer: Any, x: Tensor) -> Tensor:
    """What an adapted layer computes: its base alone, or with the adapter that is on."""
    base = layer.get_base_layer()
    names = [] if layer._disable_adapters else [n for n in layer._active_adapter if n in layer.lora_A]
    if not names:
        return base(x)
    (name,) = names
    apply: Any = _Adapted.apply  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return apply(x, base.weight, base.bias, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])


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
