"""One token a row through a decoder of the Llama kind, written out: fused and packed weights, few operations a layer.

The network's own modules cost as much as its products when only a few tokens are fed. What is written here is used for
a network only after it gave the same states as that network's own forward pass; every other network decodes by its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn.functional import linear, rms_norm

from posttrain.models.policy import Model
from posttrain.models.slots import SlotLayout

Product = Callable[[Tensor], Tensor]
Norm = tuple[Tensor, float]
Call = tuple[float, float | None, int | None]
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.01}
"""Largest difference from the network's own states, of their norm."""

_calls: WeakKeyDictionary[Any, list[Call] | None] = WeakKeyDictionary()


@dataclass(frozen=True)
class _Layer:
    """One layer: norms (weight, epsilon), products, and what its attention is called with (scaling, soft-cap, window)."""

    before: Norm
    after: Norm
    of_query: Norm | None
    of_key: Norm | None
    kv_heads: int
    qkv: Product
    out: Product
    gate_up: Product
    down: Product
    act: Product
    call: Call


class Decoder:
    """The trunk and the output layer of a role, with the weights they have when it is made.

    Attributes:
        head: from states ``[S, d]`` to the output layer's product ``[S, V]``, in the network's dtype.
    """

    def __init__(self, model: Model, calls: Sequence[Call]) -> None:
        trunk, head = model.trunk, model.head
        self.embed, self.rotary, self.final = trunk.embed_tokens, trunk.rotary_emb, _norm(trunk.norm)
        self.width: int = trunk.layers[0].self_attn.head_dim
        self.layers = [_layer(layer, call, self.width) for layer, call in zip(trunk.layers, calls, strict=True)]
        self.head = _product([head.weight], [head.bias])

    def states(self, ids: Tensor, positions: Tensor, layout: SlotLayout) -> Tensor:
        """Final states ``[S, d]`` of one token a slot, ids ``[S]`` at ``positions`` ``[S]``."""
        x = self.embed(ids)
        cos, sin = (part[0, :, None] for part in self.rotary(x[None], positions[None]))
        half = self.width // 2
        sin = torch.cat(
            [-sin[..., :half], sin[..., half:]], -1
        )  # a turn by half the width then needs no change of sign
        for index, layer in enumerate(self.layers):
            qkv = layer.qkv(_rms(x, layer.before)).view(len(ids), -1, self.width)
            queries = qkv.shape[1] - 2 * layer.kv_heads
            qk, value = qkv[:, : -layer.kv_heads], qkv[:, -layer.kv_heads :]
            if layer.of_query is not None and layer.of_key is not None:
                qk = torch.cat([_rms(qk[:, :queries], layer.of_query), _rms(qk[:, queries:], layer.of_key)], 1)
            qk = (qk * cos).add_(qk.roll(half, -1).mul_(sin))[:, :, None]
            seen = layout.attend(index, qk[:, :queries], qk[:, queries:], value[:, :, None], *layer.call)
            x = x + layer.out(seen.view(len(ids), -1))
            gate, up = layer.gate_up(_rms(x, layer.after)).chunk(2, -1)
            x = x + layer.down(layer.act(gate) * up)
        return _rms(x, self.final)


def _rms(x: Tensor, norm: Norm) -> Tensor:
    """An RMS norm over the last dimension; in bf16 rounded where transformers rounds it, in half the passes of torch's own."""
    weight, epsilon = norm
    if x.dtype != torch.bfloat16:
        return rms_norm(x, x.shape[-1:], weight, epsilon)
    wide = x.float()
    size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return (wide * size.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()).to(x.dtype) * weight


def _norm(module: Any) -> Norm:
    """Weight and epsilon of an RMS norm, which has no bias."""
    return module.weight, getattr(module, "variance_epsilon", None) or module.eps


def _layer(layer: Any, call: Call, width: int) -> _Layer:
    """Read a transformers layer; other attributes than those of Llama's, Mistral's or Qwen's raise AttributeError."""
    attention, mlp = layer.self_attn, layer.mlp
    extra = {name for name, _ in layer.named_children()} - {
        "self_attn",
        "mlp",
        "input_layernorm",
        "post_attention_layernorm",
    }
    if extra:
        raise AttributeError(f"a layer with {sorted(extra)}")
    q, k, v = (_plain(getattr(attention, f"{x}_proj")) for x in "qkv")
    gate, up = _plain(mlp.gate_proj), _plain(mlp.up_proj)
    out, down = _plain(attention.o_proj), _plain(mlp.down_proj)
    normed = hasattr(attention, "q_norm")
    return _Layer(
        before=_norm(layer.input_layernorm),
        after=_norm(layer.post_attention_layernorm),
        of_query=_norm(attention.q_norm) if normed else None,
        of_key=_norm(attention.k_norm) if normed else None,
        kv_heads=len(k.weight) // width,
        qkv=_product([q.weight, k.weight, v.weight], [q.bias, k.bias, v.bias]),
        out=_product([out.weight], [out.bias]),
        gate_up=_product([gate.weight, up.weight], [gate.bias, up.bias]),
        down=_product([down.weight], [down.bias]),
        act=mlp.act_fn,
        call=call,
    )


def _plain(module: Any) -> Any:
    """The linear layer itself; adapters are merged into it while we decode."""
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def _product(weights: list[Tensor], biases: list[Any]) -> Product:
    """``x -> x [W1; W2; ...]' + b``, weights ``[out, in]``.

    bf16 weights are copied into the processor library's own order, in which it need not sort them at every call; others are
    read where they are.
    """
    bias = None if biases[0] is None else torch.cat(biases)
    if weights[0].dtype == torch.bfloat16 and weights[0].device.type == "cpu" and _packs():
        packed = torch.ops.mkldnn._reorder_linear_weight(torch.cat(weights).detach())
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    if len(weights) == 1:
        return lambda x: linear(x, weights[0], bias)
    return lambda x: torch.cat([linear(x, w, b) for w, b in zip(weights, biases, strict=True)], -1)


def _packs() -> bool:
    """Whether torch was built with the library, and that has bf16 for this processor."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def decoder_of(model: Model) -> Decoder | None:
    """A decoder of the role's present weights, or None where ours does not give the network's own states.

    A network is asked once, by four steps of three sequences through both. Adapters are off, or merged into the weights.
    """
    with torch.no_grad():
        if model.net not in _calls:
            _calls[model.net] = _checked_calls(model)
        calls = _calls[model.net]
        try:
            return None if calls is None else Decoder(model, calls)
        except AttributeError:  # a layer was put in the place of one since
            return None


class _Listening(SlotLayout):
    """Keeps what each layer calls attention with."""

    def __init__(self, slots: int, device: torch.device) -> None:
        super().__init__(slots, device)
        self.calls: dict[int, Call] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *call: Any) -> Tensor:
        self.calls[layer] = call
        return super().attend(layer, query, key, value, *call)


def _checked_calls(model: Model) -> list[Call] | None:
    """What the layers call attention with if our states are the network's own, else None."""
    device, vocabulary = model.head.weight.device, min(1000, len(model.head.weight))
    tokens = torch.randint(0, vocabulary, (4, 3), generator=torch.Generator().manual_seed(0)).to(device)
    theirs, ours = _Listening(3, device), SlotLayout(3, device)
    rows: list[Tensor] = []
    for layout in (theirs, ours):
        layout.position -= 1
    for ids in tokens:
        own = model.trunk(
            input_ids=ids[:, None], position_ids=theirs.advance(3)[:, None], use_cache=False, layout=theirs
        )
        rows.append(own.last_hidden_state[:, 0])
    calls = [theirs.calls[i] for i in range(len(theirs.calls))]
    if any(softcap is not None for _, softcap, _ in calls):
        return None
    try:
        decoder = Decoder(model, calls)
        got = torch.cat([decoder.states(ids, ours.advance(3), ours) for ids in tokens]).double()
    except (AttributeError, TypeError, ValueError, RuntimeError):  # other modules, shapes or arguments than Llama's
        return None
    wanted = torch.cat(rows).double()
    error = float((got - wanted).norm() / wanted.norm())
    return calls if error <= TOLERANCE[model.net.dtype] else None
