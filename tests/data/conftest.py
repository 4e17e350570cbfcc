"""Small tokenizers with the chat templates in common use; nothing is downloaded."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face.",
    "system user assistant model tool",
    "What is the sum of two and three? The sum is five.",
    "[INST] Hello there [/INST] General greeting, hello to you too!",
    "Name a colour. Red. Name another one. Blue, like the sky in the morning.",
] * 4

CHATML = (
    "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM<|im_end|>\n' }}"
    "{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
THINK = (
    "{% for m in messages %}{% set c = m['content'] %}"
    "{% if m['role'] == 'assistant' and '</think>' in c %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ c + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LAST_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST]' }}"
    "{% if loop.last or loop.index0 == messages | length - 2 %}{% if messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] + '\n\n' }}{% endif %}{% endif %}{{ m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)


def byte_level(special: list[str], template: str | None, plain: tuple[str, ...] = (), **names: str):
    """A byte-level BPE tokenizer (GPT-2, Llama 3, Qwen, SmolLM) of about 400 entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS,
        BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in plain])
    return wrap(tokenizer, template, **names)


def sentence_piece(special: list[AddedToken | str], template: str, prefix: str, plain=(), **names: str):
    """A BPE tokenizer on ``▁`` for spaces, as converted sentencepiece models have it.

    ``prefix``: 'prepend' (Llama 2: a normalizer), 'first' or 'always' (Metaspace) or 'never' (Gemma).
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # no merge across words
    alphabet = [chr(c) for c in range(33, 127)] + ["\n", "▁"]
    named = [t if isinstance(t, str) else t.content for t in special]
    tokenizer.train_from_iterator(
        CORPUS,
        BpeTrainer(
            vocab_size=400,
            special_tokens=["<unk>", *named],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    tokenizer.pre_tokenizer = None
    if prefix == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    tokenizer.add_special_tokens([t if isinstance(t, AddedToken) else AddedToken(t, normalized=False) for t in special])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in plain])
    return wrap(tokenizer, template, unk_token="<unk>", **names)


def wrap(tokenizer: Tokenizer, template: str | None, **names: str) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    wrapped.chat_template = template
    return wrapped


def smol(template: str | None = CHATML, **names: str):
    """SmolLM2's shape: BOS opens turns, EOS ends them and is the padding too."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]
    named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", **names}
    return byte_level(special, template, plain=("<tool_call>", "<think>", "</think>"), **named)


def llama3():
    special = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ]
    return byte_level(special, LLAMA3, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")


def gemma():
    """Turn markers that aren't flagged special, line breaks as added tokens, no space prefix."""
    plain = ("<start_of_turn>", "<end_of_turn>", "\n", "\n\n")
    return sentence_piece(["<bos>", "<eos>"], GEMMA, "never", plain, bos_token="<bos>", eos_token="<eos>")


def mistral(prefix: str = "prepend"):
    return sentence_piece(["<s>", "</s>"], MISTRAL, prefix, bos_token="<s>", eos_token="</s>")


def phi3():
    """Control tokens that swallow the white space after them."""
    special = [AddedToken(f"<|{n}|>", rstrip=True, normalized=False) for n in ("system", "user", "assistant", "end")]
    special += ["<s>", "<|endoftext|>"]
    return sentence_piece(special, PHI3, "first", bos_token="<s>", eos_token="<|endoftext|>")


def word_level():
    """A vocabulary that reaches its control tokens as plain words."""
    words = ["<unk>", "<user>", "<assistant>", "<end>", "hello", "there", "friend"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(words[1:4])
    template = (
        "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' <end>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
    )
    return wrap(tokenizer, template, eos_token="<end>", unk_token="<unk>")


BUILDERS = {
    "smol": smol,
    "llama3": llama3,
    "gemma": gemma,
    "mistral": mistral,
    "mistral-first": lambda: mistral("first"),
    "mistral-always": lambda: mistral("always"),
    "phi3": phi3,
    "words": word_level,
}


@pytest.fixture(scope="session")
def tokenizers_by_name():
    return {name: build() for name, build in BUILDERS.items()}


@pytest.fixture(params=list(BUILDERS))
def any_tokenizer(request, tokenizers_by_name):
    return tokenizers_by_name[request.param]


@pytest.fixture(scope="session")
def smol_tokenizer(tokenizers_by_name):
    return tokenizers_by_name["smol"]


@pytest.fixture(scope="session")
def llama3_tokenizer(tokenizers_by_name):
    return tokenizers_by_name["llama3"]
