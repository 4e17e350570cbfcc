"""What a network's output layer really computes."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from posttrain.errors import ModelError
from posttrain.ops.token_stats import Head


def read_head(net: PreTrainedModel) -> Head:
    """Read weight, bias, logit scale and final soft-cap of a causal language model, tied or not.

    Raises:
        ModelError: a network without an output layer, or with an adapter on it.
    """
    layer: Any = net.get_output_embeddings()
    if layer is None:
        raise ModelError(f"{type(net).__name__} has no output layer; expected a causal language model")
    if isinstance(layer, LoraLayer):
        raise ModelError("an adapter on the output layer is not supported; adapt the trunk's linear layers only")
    config: Any = net.config
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return Head(layer.weight, getattr(layer, "bias", None), scale, None if cap is None else float(cap))
