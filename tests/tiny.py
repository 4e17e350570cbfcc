"""Random decoders of two layers, small enough to compare with the original implementation in float64."""

from __future__ import annotations

import copy
import random

import torch
from torch import nn
from transformers import (
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from posttrain.forest import Branch, Forest, Row, build_forest
from posttrain.models.load import _prepare

VOCAB = 97
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.15,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"head_dim": 8}),
    "mistral": (MistralConfig, {"sliding_window": 8}),
    "gemma2": (
        Gemma2Config,
        {
            "head_dim": 8,
            "sliding_window": 8,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 3.0,
        },
    ),
    "phi3": (Phi3Config, {}),
}


class ExactNorm(nn.Module):
    """An RMS norm in the dtype it is given; those of transformers compute in fp32 whatever they are given."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight = norm.weight
        self.offset = 1.0 if type(norm).__name__.startswith("Gemma") else 0.0
        self.eps = getattr(norm, "variance_epsilon", None) or norm.eps

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (self.offset + self.weight)


def plain_net(
    family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float64, **changes
) -> PreTrainedModel:
    """The original implementation with eager attention; every parameter is random, biases and norms too."""
    kind, special = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = AutoModelForCausalLM.from_config(kind(**(SHAPE | special | changes)), attn_implementation="eager")
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    if dtype == torch.float64:
        for parent in list(net.modules()):
            for name, child in list(parent.named_children()):
                if type(child).__name__.endswith("RMSNorm"):
                    setattr(parent, name, ExactNorm(child))
    return net.to(dtype).eval().requires_grad_(False)


def ours(net: PreTrainedModel) -> PreTrainedModel:
    """A separate copy of a network, prepared as the library loads it."""
    return _prepare(copy.deepcopy(net))


def random_rows(seed: int, rows: int = 4, vocab: int = VOCAB) -> list[Row]:
    """Prompts of 1 to 20 tokens, the extremes among them, with 1 to 4 branches of 1 to 15 tokens."""
    draw = random.Random(seed)
    tokens = lambda n: [draw.randrange(3, vocab) for _ in range(n)]  # noqa: E731
    out = []
    for i in range(rows):
        prompt = tokens((1, 20)[i] if i < 2 else draw.randint(1, 20))
        lengths = [1, 15][: draw.randint(1, 2)] if i < 2 else [draw.randint(1, 15) for _ in range(draw.randint(1, 4))]
        out.append(Row(prompt, [Branch(tokens(n), {}) for n in lengths]))
    return out


def random_forest(seed: int, rows: int = 4) -> Forest:
    return build_forest(random_rows(seed, rows))
