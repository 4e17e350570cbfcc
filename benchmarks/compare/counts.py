"""Counted work: multiplications and bytes that follow from a batch's own token counts, and the bounds between two sides.

A pass over tokens costs 1 forward, 2 backward, and 1 more for the trunk where activations are recomputed. The output
layer is recomputed in its backward on both sides. Attention counts the causal half. Operations are two a product.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Item = dict[str, Any]


class Shape(NamedTuple):
    """What of a model decides its cost: products a token in the trunk, in the head, and a pair of tokens in attention."""

    trunk: float
    head: float
    pair: float
    parameters: float


def shape_of(model: str) -> Shape:
    """Read a Llama-like configuration."""
    c = json.loads((Path(model) / "config.json").read_text())
    width, layers, heads = c["hidden_size"], c["num_hidden_layers"], c["num_attention_heads"]
    size = c.get("head_dim") or width // heads
    attention = width * size * (2 * heads + 2 * c.get("num_key_value_heads", heads))
    trunk = layers * (attention + 3 * width * c["intermediate_size"])
    head = width * c["vocab_size"]
    tied = 1 if c.get("tie_word_embeddings") else 2
    return Shape(trunk, head, 2 * layers * heads * size, trunk + tied * head)


class Pass(NamedTuple):
    """One forward pass: tokens through the trunk, positions through the head, pairs of tokens in attention."""

    tokens: float
    scored: float
    pairs: float


def packed(items: Sequence[Item], *, scored: bool = True) -> Pass:
    """Each prompt once, then its responses, given as lengths; only predicted positions scored."""
    tokens = scores = pairs = 0.0
    for item in items:
        p, lengths = item["prompt"], item["branches"]
        tokens += p + sum(lengths)
        scores += sum(lengths) if scored else 0
        pairs += p * p / 2 + sum(n * p + n * n / 2 for n in lengths)
    return Pass(tokens, scores, pairs)


def padded(shapes: Iterable[Sequence[int]], *, scored: bool = True) -> Pass:
    """Rectangles ``(rows, width)`` as a peer forwards them, every position scored."""
    shapes = list(shapes)
    tokens = sum(rows * width for rows, width in shapes)
    return Pass(tokens, tokens if scored else 0, sum(rows * width**2 / 2 for rows, width in shapes))


def flops(shape: Shape, work: Pass, *, train: bool, recomputed: bool = False) -> float:
    """Operations of a pass: forward only, or forward and backward with the trunk recomputed or not."""
    trunk = shape.trunk * work.tokens + shape.pair * work.pairs
    head = shape.head * work.scored
    return 2 * (trunk * (3 + recomputed) + 4 * head if train else trunk + head)


def optimiser_bytes(shape: Shape, dtype: str) -> float:
    """Bytes that clipping and AdamW move: fp32 gradient, weight and moments read, all but the gradient written."""
    return shape.parameters * 4 * 7 + (shape.parameters * 8 if dtype == "bf16" else 0)


def kept_bytes(model: str, dtype: str) -> float:
    """Bytes a token that the layers of a Llama-like model keep for their backward pass, attention's scores left out.

    A layer keeps, of each of two norms, its input and normalised input in fp32 or as computed, and its output; of attention
    the queries, keys and values, widened to fp32 for short rows, and its output twice; of the MLP four products.
    """
    c = json.loads((Path(model) / "config.json").read_text())
    size = 2 if dtype == "bf16" else 4
    width, heads = c["hidden_size"], c["num_attention_heads"]
    head = c.get("head_dim") or width // heads
    queries, keys = heads * head, c.get("num_key_value_heads", heads) * head
    norms = 2 * width * (4 + 2 * size)
    return c["num_hidden_layers"] * (norms + queries * (8 + size) + 8 * keys + 4 * size * c["intermediate_size"])


def step_bytes(shape: Shape, kept: float, tokens: float, logits: float, dtype: str) -> float:
    """Bytes above weights, masters and moments that a step must hold: ``tokens`` and ``logits`` are of its largest pass.

    The larger of what layers keep with a chunk of logits, its gradient and the gradient of the output layer in fp32, and of
    all gradients beside those of the fp32 masters.
    """
    gradients = shape.parameters * (6 if dtype == "bf16" else 4)
    return max(kept * tokens + 2 * min(64 * 2**20, 4 * logits) + 4 * shape.head, gradients)
