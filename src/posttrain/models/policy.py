"""A role of a network: the trunk's states over a forest, token statistics from its head, scores from its scalar head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from posttrain.forest import Branch, Forest, Row, build_forest
from posttrain.models import lora as adapters
from posttrain.models.attention import forest_layout
from posttrain.models.encoder import encoder_scores
from posttrain.models.head import read_head
from posttrain.models.recompute import recomputed
from posttrain.models.scores import SCORES, score_stats
from posttrain.ops.token_stats import Head, token_stats


@dataclass(frozen=True)
class Model:
    """One role (policy, reference, reward, value) on a network that other roles may share.

    Attributes:
        net: a transformers model whose attention is ours.
        adapter: the LoRA adapter that is on in this role; None = the base alone.
        scalar: the head of a reward or value role, ``[d] -> 1``, or ``-> k`` of one that scores k attributes.
        trained: whether the role's own parameters are optimised (all of the network if ``adapter`` is None).
        head_only: of the role's parameters only those of ``scalar`` are optimised (only those of ``gate`` if there is one).
        plain: compute every row by itself, for networks where shared prompts were found not to be exact.
        checkpointing: keep each layer's input only, and compute the layer again in the backward pass: less memory for a
            third more time, and the same numbers.
        gate: weights of the head's k outputs, from the state where the prompt ends.
        encoder: an answer's score is the network's own output for prompt and answer, which see each other.
        outputs: how many tokens this role can write, the first rows of its output layer; None = all of them.
        unseen: how many tokens at the beginning of each prompt are for other roles: this one reads the prompt without them.
    """

    net: PreTrainedModel
    adapter: str | None = None
    scalar: nn.Linear | None = None
    trained: bool = False
    head_only: bool = False
    plain: bool = False
    checkpointing: bool = False
    gate: nn.Module | None = None
    encoder: bool = False
    outputs: int | None = None
    unseen: int = 0

    @property
    def trunk(self) -> Any:
        """The network without its output layer."""
        return self.net.base_model

    @property
    def head(self) -> Head:
        """The output layer of a language-model role."""
        head = read_head(self.net)
        if self.outputs is None:
            return head
        bias = None if head.bias is None else head.bias[: self.outputs]
        return Head(head.weight[: self.outputs], bias, head.scale, head.soft_cap)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Trained tensors by name; empty if the role is not trained."""
        if not self.trained:
            return {}
        scalar = {f"scalar.{k}": p for k, p in self.scalar.named_parameters()} if self.scalar is not None else {}
        if self.gate is not None:
            scalar = {f"gate.{k}": p for k, p in self.gate.named_parameters()} | ({} if self.head_only else scalar)
        if self.head_only:
            return scalar
        own = adapters.parameters(self.net, self.adapter) if self.adapter else _trunk_and_head(self)
        return own | scalar


def _trunk_and_head(model: Model) -> dict[str, nn.Parameter]:
    """All parameters of a fully trained network; a scalar head is named by the role, not by the network."""
    skip = {id(p) for p in model.scalar.parameters()} if model.scalar is not None else set[int]()
    return {k: p for k, p in model.net.named_parameters() if id(p) not in skip}


def hidden_states(model: Model, forest: Forest) -> Tensor:
    """Final states ``[N, d]`` of the trunk over a forest; each prompt is computed once. Those of unseen tokens are 0."""
    if model.unseen:
        return _shortened(model, forest)
    state = partial(_switched, model)
    with state(), recomputed(model.trunk, state) if model.checkpointing else nullcontext():
        if model.plain:
            return _own_rows(model, forest)
        layout = forest_layout(forest)
        out = model.trunk(
            input_ids=forest.ids[None], position_ids=forest.positions[None], use_cache=False, layout=layout
        )
        return out.last_hidden_state[0]


def _shortened(model: Model, forest: Forest) -> Tensor:
    """The same states where prompts lack the tokens at their beginning that the role does not read."""
    seen = torch.ones_like(forest.ids, dtype=torch.bool)
    rows: list[Row] = []
    for tree in forest.trees:
        (start, end) = tree.prompt
        seen[start : start + model.unseen] = False
        branches = [Branch(forest.ids[a:b].tolist(), {}) for a, b in tree.branches]
        rows.append(Row(forest.ids[start + model.unseen : end].tolist(), branches))
    states = hidden_states(replace(model, unseen=0), build_forest(rows).to(forest.ids.device))
    return states.new_zeros(len(seen), states.shape[1]).index_put((seen.nonzero()[:, 0],), states)


@contextmanager
def _switched(model: Model) -> Iterator[None]:
    """Run with the shared network as this role has it: its adapter on, and for plain rows the network's own attention."""
    with adapters.active(model.net, model.adapter):
        if not model.plain:
            yield
            return
        ours: Any = model.net.config._attn_implementation
        model.net.set_attn_implementation("eager")  # what every network has, windows and soft-caps included
        try:
            yield
        finally:
            model.net.set_attn_implementation(ours)


def _own_rows(model: Model, forest: Forest) -> Tensor:
    """The same states from one ordinary row for each branch, by transformers' own attention; the prompt's from its first branch."""
    parts: list[Tensor] = []
    for tree in forest.trees:
        (start, end) = tree.prompt
        for k, (begin, stop) in enumerate(tree.branches):
            ids = torch.cat([forest.ids[start:end], forest.ids[begin:stop]])
            states = model.trunk(input_ids=ids[None], use_cache=False).last_hidden_state[0]
            parts.append(states if k == 0 else states[end - start :])
    return torch.cat(parts)


def forward_stats(
    model: Model,
    forest: Forest,
    want: frozenset[str],
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    other: Model | None = None,
) -> dict[str, Tensor]:
    """Statistics a loss may read, from one pass over the forest.

    Scores need a scalar head (`posttrain.models.scores.score_stats`);
    token statistics (`posttrain.ops.token_stats`) are ``[M]``, computed only where ``mask`` is true and 0 elsewhere.
    Those of two distributions (``kl_from_other`` ...) need the ``other`` model, which is computed without gradient.
    """
    if model.encoder:
        scores = encoder_scores(model.net, forest)
        return {name: scores if name == "scores" else scores[:, 0] for name in want & {"score", "scores"}}
    states = hidden_states(model, forest)
    out: dict[str, Tensor] = {}
    if model.scalar is not None:
        out |= score_stats(model.scalar, model.gate, states, forest, want, mask)
    token_wants = want - SCORES
    if token_wants:
        keep = torch.arange(len(forest.target)) if mask is None else mask.nonzero()[:, 0]
        beside = None
        if other is not None and any("other" in name for name in token_wants):
            with torch.no_grad():
                beside = hidden_states(other, forest).index_select(0, forest.source[keep]), other.head
        stats = token_stats(
            states.index_select(0, forest.source[keep]),
            model.head,
            forest.target[keep],
            token_wants,
            temperature=temperature,
            other=beside,
        )
        full = len(keep) == len(forest.target)
        for name, x in stats.items():
            out[name] = x if full else x.new_zeros(len(forest.target)).index_put((keep,), x)
    return out
