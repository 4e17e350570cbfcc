"""Encoders as reward models: each answer a row of its own, scored by the network's own head on its first token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from posttrain.forest import Forest

TEMPLATE = (
    "{{ cls_token }}{% for m in messages %}{{ m['role'] + ':\\n' + m['content'] + sep_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)
"""Turns between separators, for an encoder whose tokenizer has no chat template."""


def is_encoder(net: PreTrainedModel) -> bool:
    """Whether a ``ForSequenceClassification`` reads its first token by a head of its own, as BERT's kin do."""
    return not hasattr(net, "score") and hasattr(net, "classifier")


def encoder_scores(net: Any, forest: Forest) -> Tensor:
    """``[B, k]`` outputs for each branch after its prompt, all rows in one padded pass."""
    rows = [
        torch.cat([forest.ids[slice(*tree.prompt)], forest.ids[slice(*span)]])
        for tree in forest.trees
        for span in tree.branches
    ]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=net.config.pad_token_id or 0)
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
    return net(input_ids=ids, attention_mask=mask).logits.to(torch.promote_types(net.dtype, torch.float32))


def with_template(tokenizer: Any) -> Any:
    """The tokenizer of an encoder; one without chat template gets `TEMPLATE`, turns ending at its separator."""
    if not tokenizer.chat_template and tokenizer.cls_token and tokenizer.sep_token:
        tokenizer.chat_template = TEMPLATE
        tokenizer.eos_token = tokenizer.eos_token or tokenizer.sep_token
    return tokenizer
