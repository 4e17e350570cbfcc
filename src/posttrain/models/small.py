"""The small model: its shape, its tokenizer, and where its weights lie. ``make small`` trains them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from posttrain.errors import ConfigError, ModelError

VOCAB_SIZE = 1024
PAD, BOS, USER, ASSISTANT, SYSTEM, END = SPECIAL_TOKENS = (
    "<|pad|>",
    "<|bos|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
)
CHAT_TEMPLATE = (
    "<|bos|>"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception(\"role '\" ~ message['role'] ~ \"' is not system, user or assistant\") }}"
    "{% endif %}"
    "{{ '<|' ~ message['role'] ~ '|>' ~ message['content'] ~ '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def small_config(vocab_size: int = VOCAB_SIZE) -> LlamaConfig:
    """Return the shape: 4 layers, width 192, 6 query and 2 key-value heads, tied output, 1.8M parameters."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.04,
        pad_token_id=SPECIAL_TOKENS.index(PAD),
        bos_token_id=SPECIAL_TOKENS.index(BOS),
        eos_token_id=SPECIAL_TOKENS.index(END),
    )


def new_small(seed: int) -> LlamaForCausalLM:
    """Return an untrained small model in fp32; its weights depend on ``seed`` only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(small_config())
    return model.float().eval()


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE of `VOCAB_SIZE` entries; any text encodes, and decodes to itself.

    Args:
        texts: documents and turns as the model will see them, without special tokens; the same texts give the
            same vocabulary.

    Raises:
        ModelError: too little text for a full vocabulary (the model's shape depends on its size).
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ModelError(
            f"got {tokenizer.get_vocab_size()} vocabulary entries, expected {VOCAB_SIZE}; train on more text"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT, SYSTEM],
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def small_path(form: Literal["base", "instruct"] = "instruct") -> Path:
    """Return the directory of the trained small model, which ``from_pretrained`` loads with its tokenizer.

    Raises:
        ConfigError: a form other than base or instruct.
        ModelError: the weights are not there.
    """
    if form not in ("base", "instruct"):
        raise ConfigError(f"got form '{form}'; expected 'base' or 'instruct'")
    path = Path(__file__).parent / "weights" / f"small-{form}"
    missing = [name for name in ("config.json", "model.safetensors", "tokenizer.json") if not (path / name).is_file()]
    if missing:
        raise ModelError(f"the small {form} model lacks {', '.join(missing)} in {path}; run `make small` to train it")
    return path
