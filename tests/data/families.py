"""Ten families' tokenizers in small: our templates in ``templates/``, their control tokens, BOS and EOS ids, prefix rules."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from .conftest import byte_level, sentence_piece

HERE = Path(__file__).parent / "templates"


class Family(NamedTuple):
    """``control`` and ``plain`` are added tokens, flagged special or not, with their ids; None: the next free one.

    ``prefix``: '' for byte-level BPE, else as in `sentence_piece`. ``strips``: control tokens swallow what follows.
    """

    prefix: str
    control: dict[str, int | None]
    plain: dict[str, int | None] = {}  # noqa: RUF012
    names: dict[str, str] = {}  # noqa: RUF012
    strips: bool = False


def _free(*tokens: str) -> dict[str, int | None]:
    return dict.fromkeys(tokens)


QWEN = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
QWEN_NAMES = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
CALLS = {"<tool_call>": 151657, "</tool_call>": 151658}
THOUGHTS = {"<tool_response>": 151665, "</tool_response>": 151666, "<think>": 151667, "</think>": 151668}
S = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
FAMILIES: dict[str, Family] = {
    "llama3": Family(
        "",
        {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001}
        | {"<|start_header_id|>": 128006, "<|end_header_id|>": 128007, "<|eom_id|>": 128008}
        | {"<|eot_id|>": 128009, "<|python_tag|>": 128010},
        names={"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    ),
    "qwen2.5": Family("", QWEN, CALLS, QWEN_NAMES),
    "qwen3": Family("", QWEN, CALLS | THOUGHTS, QWEN_NAMES),
    "mistral": Family(
        "first",
        {"<s>": 1, "</s>": 2, "[INST]": 3, "[/INST]": 4, "[TOOL_CALLS]": 5}
        | {"[AVAILABLE_TOOLS]": 6, "[/AVAILABLE_TOOLS]": 7, "[TOOL_RESULTS]": 8, "[/TOOL_RESULTS]": 9},
        names=S,
    ),
    "gemma2": Family(
        "never",
        {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<start_of_turn>": 106, "<end_of_turn>": 107},
        {"\n": 108, "\n\n": 109},
        {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
    ),
    "phi3": Family(
        "prepend",
        {"<s>": 1, "</s>": 2, "<|endoftext|>": 32000, "<|assistant|>": 32001}
        | {"<|system|>": 32006, "<|end|>": 32007, "<|user|>": 32010},
        names={"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        strips=True,
    ),
    "smollm2": Family(
        "",
        {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "<repo_name>": 3},
        names={"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
    ),
    "chatml": Family("", _free("<|im_start|>", "<|im_end|>"), names={"eos_token": "<|im_end|>"}),
    "zephyr": Family("prepend", {"<s>": 1, "</s>": 2}, names={**S, "pad_token": "</s>"}),
    "deepseek": Family(
        "",
        {"<｜begin▁of▁sentence｜>": 0, "<｜end▁of▁sentence｜>": 1}
        | _free("<｜User｜>", "<｜Assistant｜>", "<｜tool▁sep｜>")
        | _free("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>")
        | _free(
            "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"
        ),
        names={"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"},
    ),
}


@cache
def family(name: str) -> PreTrainedTokenizerFast:
    """The family's tokenizer with its template."""
    wanted = FAMILIES[name]
    spec = json.loads(_base(wanted.prefix))
    placed = {"<unk>": 3 if name == "gemma2" else 0} if wanted.prefix else {}
    placed |= {t: i for t, i in (wanted.control | wanted.plain).items() if i is not None}
    words = sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].__getitem__)
    if wanted.prefix:
        words += [f"<0x{b:02X}>" for b in range(256)]
    words += [t for t, i in (wanted.control | wanted.plain).items() if i is None]
    taken, at, vocab = set(placed.values()), 0, dict(placed)
    for word in words:
        if word not in vocab:
            while at in taken:
                at += 1
            vocab[word] = at
            at += 1
    taken = set(vocab.values())  # a real vocabulary has no holes
    vocab |= {f"<fill_{i}>": i for i in range(max(taken)) if i not in taken}
    spec["model"].update(vocab=vocab, byte_fallback=bool(wanted.prefix), fuse_unk=bool(wanted.prefix))
    spec["added_tokens"] = [
        {"id": vocab[t], "content": t, "single_word": False, "lstrip": False, "normalized": False}
        | {"rstrip": wanted.strips and t.startswith("<|"), "special": t in wanted.control}
        for t in sorted(wanted.control | wanted.plain, key=vocab.__getitem__)
    ]
    if wanted.prefix:
        steps = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}]
        spec["decoder"] = {"type": "Sequence", "decoders": [*steps, {"type": "Fuse"}]}
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), **wanted.names)
    made.chat_template = (HERE / f"{name}.jinja").read_text(encoding="utf-8")
    return made


@cache
def _base(prefix: str) -> str:
    """A trained tokenizer without control tokens."""
    made = sentence_piece([], "", prefix) if prefix else byte_level([], None)
    spec = json.loads(made.backend_tokenizer.to_str())
    spec["added_tokens"] = []
    return json.dumps(spec)
