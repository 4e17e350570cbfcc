from __future__ import annotations

import os
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from posttrain.errors import ConfigError, ModelError
from posttrain.feedback.chat import chat, find_trained
from posttrain.models.small import CHAT_TEMPLATE, SPECIAL_TOKENS

ESCAPE, MARKUP = "Ġ[31mĠ".replace("Ġ", chr(0x1B + 256)), "[bold]x[/bold]"  # as byte-level BPE spells them


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One entry a byte, two longer ones, and the small model's control tokens."""
    entries = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), ESCAPE, MARKUP]
    tokenizer = Tokenizer(models.BPE({entry: i for i, entry in enumerate(entries)}, []))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    named = {"pad_token": "<|pad|>", "bos_token": "<|bos|>", "eos_token": "<|end|>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, **named)


TOKENIZER = byte_tokenizer()


def save(path: Path, kind=LlamaForCausalLM, window: int = 512, seed: int = 0, only: tuple[str, ...] = ()) -> Path:
    """A tiny random model; with ``only``, one that answers nothing but these tokens, equally often."""
    config = LlamaConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=window,
        initializer_range=0.5,
        num_labels=1,
        pad_token_id=TOKENIZER.pad_token_id,
        eos_token_id=TOKENIZER.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        net = kind(config)
        if only:
            for parameter in net.model.layers.parameters():
                parameter.zero_()
            net.model.embed_tokens.weight.fill_(1)
            net.lm_head.weight.zero_()
            net.lm_head.weight[TOKENIZER.convert_tokens_to_ids(list(only))] = 10
    net.save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path


def talk(path: Path, *lines: str | BaseException) -> list[str]:
    """What is printed after each line, the greeting first."""
    out, told = StringIO(), []
    script = iter(lines)

    def ask(prompt: str) -> str:
        told.append(out.getvalue())
        out.seek(out.truncate(0))
        line = next(script, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    chat(path, Console(file=out, width=100), ask=ask)
    return [*told, out.getvalue()]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("chat") / "model", window=4096)


def test_the_model_answers_and_the_end_of_input_leaves(model):
    greeting, answer, end = talk(model, "Hello")
    assert str(model) in greeting.replace("\n", "") and "/help" in greeting
    assert len(answer) > 20
    assert end == "\n"


@pytest.mark.parametrize("leave", ["/quit", KeyboardInterrupt(), EOFError()])
def test_leaving(model, leave):
    assert len(talk(model, leave, "never read")) == 2


def test_answers_depend_on_the_conversation_until_it_is_reset(model):
    followed = talk(model, "Hello", "Why?")
    assert talk(model, "Hello", "Why?") == followed
    assert talk(model, "Hallo", "Why?")[2] != followed[2]
    first, second = (talk(model, line, "/reset", "Why?") for line in ("Hello", "Hallo"))
    assert first[1] != second[1] and first[2] == "forgotten\n"
    assert first[3] == second[3] != followed[2]


def test_commands(model):
    _, shown, unknown, blank, _ = talk(model, "/help", "/rest", "   ")
    assert [line.split()[0] for line in shown.splitlines()] == ["/reset", "/help", "/quit"]
    assert unknown == "unknown command '/rest'; did you mean '/reset'?\n"
    assert blank == ""


def test_the_models_text_is_shown_as_text(tmp_path):
    directory = save(tmp_path / "model", only=(ESCAPE, MARKUP))
    answer = talk(directory, "Hello")[1]
    assert "\x1b" not in answer
    assert "\\x1b[31m\\x1b" in answer.replace("\n", "") and MARKUP in answer.replace("\n", "")
    assert answer.endswith("(cut at 256 tokens)\n")


def test_a_stop_token_ends_an_answer_and_is_not_shown(tmp_path):
    assert talk(save(tmp_path / "model", only=("<|end|>",)), "Hello")[1] == "(an empty answer)\n"


def test_what_no_longer_fits_is_said(tmp_path):
    directory = save(tmp_path / "model", window=64, only=("a",))
    _, first, second, long, third, _ = talk(directory, "b" * 20, "c" * 20, "d" * 30, "e")
    assert first == "a" * 32 + "\n(cut at 32 tokens)\n"
    assert second.endswith("(forgot your oldest lines, 1 of them: the model reads 64 tokens)\n")
    assert "got 34 tokens, room for 32" in long
    assert "1 of them" in third  # the line that was too long is no part of the conversation


def test_a_line_that_is_no_text_is_refused_and_the_talk_goes_on(model):
    _, refused, answer, _ = talk(model, "a\udcffb", "Hello")
    assert refused.startswith("not answered: 'utf-8' codec can't encode")
    assert answer and "not answered" not in answer


def run_directory(path: Path, *stages: str) -> Path:
    """A run whose stages were written one after the other, each of its own kind."""
    for age, name in enumerate(stages):
        directory = path / name
        kind = LlamaForSequenceClassification if name == "reward" else LlamaForCausalLM
        save(directory, kind)
        (directory / "stage.json").write_text("{}")
        (directory / "done.json").write_text("{}")
        os.utime(directory / "config.json", (1000 + age, 1000 + age))
    (path / "run.json").write_text("{}")
    return path


def test_which_model_of_a_run(tmp_path):
    run = run_directory(tmp_path / "run", "first", "model", "second", "reward")
    assert find_trained(run) == run / "model"
    (run / "model" / "done.json").unlink()  # cut off while it was written
    assert find_trained(run) == run / "second"
    (run / "second" / "config.json").unlink()
    assert find_trained(run) == run / "first" == find_trained(run / "first")
    assert "> " not in talk(run)[0] and "first" in talk(run)[0]


def test_no_model_to_talk_to(tmp_path):
    run = run_directory(tmp_path / "run", "reward")
    with pytest.raises(ConfigError, match=r"no trained language model in .*run'; expected a run"):
        chat(run, Console(file=StringIO()))
    with pytest.raises(ConfigError, match="no language model but LlamaForSequenceClassification"):
        chat(run / "reward", Console(file=StringIO()))
    with pytest.raises(ConfigError, match="no trained language model"):
        chat(tmp_path / "nowhere", Console(file=StringIO()))
    (run / "reward" / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="can't be read"):
        find_trained(run)


def test_a_model_that_cannot_chat_is_refused_before_the_first_line(tmp_path):
    directory = save(tmp_path / "model")
    (directory / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        talk(directory, "Hello")
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="can't be loaded"):
        talk(directory, "Hello")
