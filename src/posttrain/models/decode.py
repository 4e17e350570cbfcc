"""One token a row through a decoder of the Llama kind, written out: fused and packed weights, few operations a layer.

The network's own modules cost as much as its products when only a few tokens are fed. What is written here is used for
a network only after it gave the same states as that network's own forward pass; every other network decodes by its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn.functional import linear, rms_norm

from posttrain.models.policy import Model
from posttrain.models.slots import SlotLayout
from posttrain.ops.recorded import recorded

Call = tuple[float, float | None, int | None]
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.01}
"""Largest difference from the network's own states, of their norm."""

_calls: WeakKeyDictionary[Any, list[Call] | None] = WeakKeyDictionary()


_acts: dict[str, Any] = {}  # one for all layers, so that layers of one form are known as such


class _Product(NamedTuple):
    """``times(x, *weights)`` is x by the weights and ``onto(x, base, *weights)`` that and ``base``."""

    times: Callable[..., Tensor]
    onto: Callable[..., Tensor]
    weights: tuple[Tensor, ...]


@dataclass(frozen=True)
class _Form:
    """What layers of one form share: functions of their tensors, epsilons of their norms, sizes of heads."""

    width: int
    kv_heads: int
    before: float
    after: float
    of_heads: tuple[float, float] | None
    qkv: Callable[..., Tensor]
    out: Callable[..., Tensor]
    of_out: int  # tensors of the output product, which stand first among those of `_after`
    gate_up: Callable[..., Tensor]
    of_gate_up: int
    down: Callable[..., Tensor]
    act: Any


@dataclass(frozen=True)
class _Layer:
    """One layer: its form, the tensors of what comes before its attention and after, what its attention is called with."""

    form: _Form
    before: tuple[Tensor, ...]
    after: tuple[Tensor, ...]
    call: Call


class Decoder:
    """The trunk and the output layer of a role, with the weights they have when it is made."""

    def __init__(self, model: Model, calls: Sequence[Call]) -> None:
        trunk, head = model.trunk, model.head
        self.embed, self.rotary, self.final = trunk.embed_tokens, trunk.rotary_emb, _norm(trunk.norm)
        self.width: int = trunk.layers[0].self_attn.head_dim
        self.layers = [_layer(layer, call, self.width) for layer, call in zip(trunk.layers, calls, strict=True)]
        self.output = _product([head.weight], [head.bias])

    def head(self, states: Tensor) -> Tensor:
        """From states ``[S, d]`` to the output layer's product ``[S, V]``, in the network's dtype."""
        return self.output.times(states, *self.output.weights)

    def states(self, ids: Tensor, positions: Tensor, layout: SlotLayout) -> Tensor:
        """Final states ``[S, d]`` of one token a slot, ids ``[S]`` at ``positions`` ``[S]``."""
        x = self.embed(ids)
        cos, sin = (part[0, :, None] for part in self.rotary(x[None], positions[None]))
        half = self.width // 2
        sin = torch.cat(
            [-sin[..., :half], sin[..., half:]], -1
        )  # a turn by half the width then needs no change of sign
        for index, layer in enumerate(self.layers):
            heads = recorded(_before, x, cos, sin, *layer.before, form=layer.form)
            seen = layout.attend(index, *heads, *layer.call)
            x = recorded(_after, x, seen, *layer.after, form=layer.form)
        return _rms(x, *self.final)


def _before(x: Tensor, cos: Tensor, sin: Tensor, norm: Tensor, *rest: Tensor, form: _Form) -> tuple[Tensor, ...]:
    """Query ``[S, H, 1, D]``, key and value ``[S, Hk, 1, D]`` from a layer's input ``[S, d]``."""
    normed = 2 if form.of_heads is not None else 0
    qkv = form.qkv(_rms(x, norm, form.before), *rest[normed:]).view(x.shape[0], -1, form.width)
    qk, value = qkv[:, : -form.kv_heads], qkv[:, -form.kv_heads :]
    if form.of_heads is not None:
        parts = (qk[:, : -form.kv_heads], qk[:, -form.kv_heads :])
        qk = torch.cat([_rms(p, w, e) for p, w, e in zip(parts, rest[:2], form.of_heads, strict=True)], 1)
    qk = (qk * cos).add_(qk.roll(form.width // 2, -1).mul_(sin))[:, :, None]
    return qk[:, : -form.kv_heads], qk[:, -form.kv_heads :], value[:, :, None]


def _after(x: Tensor, seen: Tensor, norm: Tensor, *weights: Tensor, form: _Form) -> Tensor:
    """A layer's output ``[S, d]`` from its input and what its attention saw, ``[S, 1, H, D]``."""
    last = form.of_out + form.of_gate_up
    out, gate_up, down = weights[: form.of_out], weights[form.of_out : last], weights[last:]
    x = form.out(seen.flatten(1), x, *out)
    gate, up = form.gate_up(_rms(x, norm, form.after), *gate_up).chunk(2, -1)
    return form.down(form.act(gate) * up, x, *down)


def _rms(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """An RMS norm over the last dimension; in bf16 rounded where transformers rounds it, in half the passes of torch's own."""
    if x.dtype != torch.bfloat16:
        return rms_norm(x, x.shape[-1:], weight, epsilon)
    wide = x.float()
    size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return (wide * size.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()).to(x.dtype) * weight


def _norm(module: Any) -> tuple[Tensor, float]:
    """Weight and epsilon of an RMS norm, which has no bias."""
    return module.weight, getattr(module, "variance_epsilon", None) or module.eps


def _layer(layer: Any, call: Call, width: int) -> _Layer:
    """Read a transformers layer; other attributes than those of Llama's, Mistral's or Qwen's raise AttributeError."""
    attention, mlp = layer.self_attn, layer.mlp
    known = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
    if extra := {name for name, _ in layer.named_children()} - known:
        raise AttributeError(f"a layer with {sorted(extra)}")
    q, k, v = (_plain(getattr(attention, f"{x}_proj")) for x in "qkv")
    gate, up = _plain(mlp.gate_proj), _plain(mlp.up_proj)
    before, after = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
    heads = [_norm(attention.q_norm), _norm(attention.k_norm)] if hasattr(attention, "q_norm") else []
    qkv = _product([q.weight, k.weight, v.weight], [q.bias, k.bias, v.bias])
    gate_up = _product([gate.weight, up.weight], [gate.bias, up.bias])
    out, down = (_product([m.weight], [m.bias]) for m in (_plain(attention.o_proj), _plain(mlp.down_proj)))
    form = _Form(
        width=width,
        kv_heads=len(k.weight) // width,
        before=before[1],
        after=after[1],
        of_heads=(heads[0][1], heads[1][1]) if heads else None,
        qkv=qkv.times,
        out=out.onto,
        of_out=len(out.weights),
        gate_up=gate_up.times,
        of_gate_up=len(gate_up.weights),
        down=down.onto,
        act=_acts.setdefault(repr(mlp.act_fn), mlp.act_fn),
    )
    first = (before[0], *(weight for weight, _ in heads), *qkv.weights)
    return _Layer(form, first, (after[0], *out.weights, *gate_up.weights, *down.weights), call)


def _plain(module: Any) -> Any:
    """The linear layer itself; adapters are merged into it while we decode."""
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def _product(weights: list[Tensor], biases: list[Any]) -> _Product:
    """``x -> x [W1; W2; ...]' + b``, weights ``[out, in]``.

    bf16 weights are copied into the processor library's own order, in which it need not sort them at every call; others are
    read where they are.
    """
    if weights[0].dtype == torch.bfloat16 and weights[0].device.type == "cpu" and _packs():
        bias = () if biases[0] is None else (torch.cat(biases).detach(),)
        packed = torch.ops.mkldnn._reorder_linear_weight(torch.cat(weights).detach())
        return _Product(_packed, _packed_onto, (packed, *bias))
    kept = [x.detach() for x in (*weights, *(b for b in biases if b is not None))]
    return _Product(_joined, _joined_onto, tuple(kept))


def _joined(x: Tensor, *weights: Tensor) -> Tensor:
    """The products with weights that are read where they are, side by side; matrices first, then the biases if there are any."""
    matrices = [w for w in weights if w.dim() == 2]
    biases = [w for w in weights if w.dim() == 1] or [None] * len(matrices)
    parts = [linear(x, w, b) for w, b in zip(matrices, biases, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _joined_onto(x: Tensor, base: Tensor, *weights: Tensor) -> Tensor:
    return base + _joined(x, *weights)


def _packed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product with packed weights; recorded it is added to zeros, for there is no record of the other one's arguments."""
    if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return _packed_onto(x, x.new_zeros((x.shape[0], weight.shape[0])), weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _packed_onto(x: Tensor, base: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.binary(x, base, weight, bias, "add")


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
