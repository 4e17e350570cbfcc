from __future__ import annotations

import pytest
import torch

from posttrain.data.smallworld import pretraining_text, transcripts
from posttrain.errors import ConfigError, ModelError
from posttrain.models import small

TEXTS = [r["text"] for r in pretraining_text(2000)]
TEXTS += [m["content"] for r in transcripts(2000) for m in r["messages"]]
TOKENIZER = small.train_tokenizer(TEXTS)


def test_shape_and_size():
    model = small.new_small(0)
    config = model.config
    assert sum(p.numel() for p in model.parameters()) == 1_771_200
    assert config.num_key_value_heads < config.num_attention_heads
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 5)
    assert small.small_config(2048).vocab_size == 2048


def test_weights_depend_on_the_seed_only():
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    first = small.new_small(7).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(12)
    again, other = small.new_small(7).state_dict(), small.new_small(8).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_vocabulary_is_the_same_twice():
    again = small.train_tokenizer(TEXTS)
    assert again.get_vocab() == TOKENIZER.get_vocab()
    assert again.backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()
    assert len(TOKENIZER) == small.VOCAB_SIZE == 1024
    assert TOKENIZER.convert_tokens_to_ids(list(small.SPECIAL_TOKENS)) == [0, 1, 2, 3, 4, 5]
    assert (TOKENIZER.pad_token, TOKENIZER.bos_token, TOKENIZER.eos_token) == (
        "<|pad|>",
        "<|bos|>",
        "<|end|>",
    )


@pytest.mark.parametrize(
    "text", ["", " ", "sure, lamp red.", "Ünïcode\t日本\n\n  x ", "\U0001f600 \x00 a , b", "it 's ."]
)
def test_any_text_encodes_and_decodes_to_itself(text):
    assert TOKENIZER.decode(TOKENIZER(text).input_ids) == text


def test_words_of_the_language_are_single_tokens():
    prompts = " copy these words the apple is red and small in the garden could you please give me kite"
    assert len(TOKENIZER(prompts).input_ids) == len(prompts.split())


def test_chat_template():
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "add one and two"}]
    text = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|bos|><|system|>be kind<|end|><|user|>add one and two<|end|><|assistant|>"
    answered = [*messages, {"role": "assistant", "content": "three."}]
    whole = TOKENIZER.apply_chat_template(answered, tokenize=False)
    assert whole == text + "three.<|end|>"
    ids = TOKENIZER(whole, add_special_tokens=False).input_ids
    assert [i for i in ids if i < 6] == [1, 4, 5, 2, 5, 3, 5]
    with pytest.raises(Exception, match="role 'tool' is not system, user or assistant"):
        TOKENIZER.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_tokenizer_and_model_load_from_a_directory(tmp_path):
    model = small.new_small(0)
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, loaded = (
        AutoTokenizer.from_pretrained(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path),
    )
    assert tokenizer.chat_template == small.CHAT_TEMPLATE
    assert tokenizer("sure, lamp red.").input_ids == TOKENIZER("sure, lamp red.").input_ids
    assert tokenizer.eos_token_id == loaded.config.eos_token_id == loaded.generation_config.eos_token_id == 5
    ids = torch.tensor([tokenizer("<|bos|>sure, lamp").input_ids])
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_too_little_text_is_refused():
    with pytest.raises(ModelError, match="expected 1024"):
        small.train_tokenizer(["one two three"])


def test_small_path_names_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(small, "__file__", str(tmp_path / "small.py"))
    with pytest.raises(ModelError, match="run `make small`"):
        small.small_path("base")
    folder = tmp_path / "weights" / "small-base"
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).touch()
    assert small.small_path("base") == folder
    with pytest.raises(ConfigError, match="expected 'base' or 'instruct'"):
        small.small_path("chat")
