"""What is saved opens in plain transformers and computes the same."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

from data.conftest import byte_level, llama3, phi3, sentence_piece, smol
from posttrain.data.chat import render_prompt, render_response
from posttrain.errors import ConfigError
from posttrain.forest import Branch, Row, build_forest
from posttrain.models.load import load_policy, load_reward, model_files, new_reward, save_merged, value_role
from posttrain.models.lora import Lora
from posttrain.models.policy import Model, hidden_states
from posttrain.rewards.model import score_rows
from posttrain.types import Message
from tiny import plain_net

from .test_lora import logits, stir

TALKS = [
    ("Name a colour.", "Red."),
    ("What is the sum of two and three?", "The sum is five, hello to you too!"),
    ("Hello there", "General greeting, hello"),
]
GEMMA_LIKE = "{% for m in messages %}{{ '<bos>' + m['role'] + m['content'] + '<eos>' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ '<bos>assistant' }}{% endif %}"
)
CLEAN = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TOKENIZERS = {
    "pad==eos, newline after the stop": lambda: smol(unk_token="<|endoftext|>"),
    "pad of its own, nothing after the stop": lambda: byte_level(
        ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"], CLEAN, pad_token="<|pad|>", eos_token="<|end|>"
    ),
    "no pad": lambda: sentence_piece(["<bos>", "<eos>"], GEMMA_LIKE, "never", eos_token="<eos>", bos_token="<bos>"),
}


@pytest.fixture(params=["llama", "gemma2"])
def base(request, tmp_path):
    """A saved language model in fp32 with a vocabulary that fits the tokenizers."""
    net = plain_net(request.param, dtype=torch.float32, vocab_size=512, pad_token_id=9)  # no tokenizer's
    net.generation_config = GenerationConfig(eos_token_id=[2, 7], pad_token_id=0, bos_token_id=1)
    net.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def trained(model: Model, seed=0) -> Model:
    """Stand in for training: move every trained tensor."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    return model


@pytest.mark.parametrize("lora", [None, Lora(rank=4, alpha=8)])
def test_merged_policy(base, tmp_path, lora):
    model = load_policy(base, dtype=torch.float32, lora=lora, train=True)
    before = logits(model, [5, 6, 7, 8])
    trained(model)
    mine = logits(model, [5, 6, 7, 8])
    assert (mine - before).abs().max() > 0.01
    save_merged(model, base, tmp_path / "out", smol())
    net = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    with torch.no_grad():
        torch.testing.assert_close(net(torch.tensor([[5, 6, 7, 8]])).logits[0], mine, atol=1e-5, rtol=0)
    assert net.dtype == torch.float32 and net.generation_config.eos_token_id == [2, 7]
    assert "posttrain" not in (tmp_path / "out" / "config.json").read_text()
    assert not list((tmp_path / "out").glob("adapter*"))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == smol().chat_template


def test_a_small_delta_on_a_bf16_network_is_not_rounded_away(base, tmp_path):
    model = load_policy(base, dtype=torch.bfloat16, lora=Lora(rank=4, alpha=8), train=True)
    stir(model.net, "policy")
    for parameter in model.parameters().values():
        parameter.data *= 0.05
    save_merged(model, base, tmp_path / "out", smol())
    old = AutoModelForCausalLM.from_pretrained(base).state_dict()
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    moved = [k for k in old if not torch.equal(old[k], new[k])]
    assert len(moved) == 14 and all("_proj" in k for k in moved)
    for k in moved:  # smaller than half a step of bf16 in most entries
        assert ((new[k] - old[k]).abs() < old[k].abs() * 2**-9).float().mean() > 0.5


@pytest.mark.parametrize("lora", [None, Lora(rank=4, alpha=8)])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_reward_model_scores_the_same_in_plain_transformers(base, tmp_path, kind, lora):
    tokenizer = TOKENIZERS[kind]()
    model = trained(new_reward(base, dtype=torch.float32, seed=1, lora=lora))
    rows = []
    for prompt, answer in TALKS:
        said, reply = [Message(role="user", content=prompt)], [Message(role="assistant", content=answer)]
        ids = render_response(tokenizer, said, reply)
        rows.append(Row(render_prompt(tokenizer, said), [Branch(ids, {})]))
    mine = torch.tensor([s for (s,) in score_rows(model, rows)])
    assert mine.std() > 0.01
    save_merged(model, base, tmp_path / "out", tokenizer)
    assert "posttrain" not in (tmp_path / "out" / "config.json").read_text()

    net = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    whole = [[*r.prompt, *r.branches[0].ids] for r in rows]
    talks = [[{"role": "user", "content": p}, {"role": "assistant", "content": a}] for p, a in TALKS]
    rendered = [theirs.apply_chat_template(t, return_dict=False) for t in talks]
    assert rendered == whole
    assert theirs.pad_token_id not in {ids[-1] for ids in whole} and len({len(ids) for ids in whole}) == 3
    padded = theirs.pad({"input_ids": whole}, return_tensors="pt", padding_side="right")
    batched = theirs.apply_chat_template(talks, padding=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        singles = torch.cat([net(torch.tensor([ids])).logits[:, 0] for ids in whole])
        together = net(**padded).logits[:, 0]
        from_text = net(**batched).logits[:, 0]
    for name, got in (("single", singles), ("padded", together), ("template", from_text)):
        torch.testing.assert_close(got, mine, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")

    again = load_reward(str(tmp_path / "out"), dtype=torch.float32)
    torch.testing.assert_close(torch.tensor([s for (s,) in score_rows(again, rows)]), mine, atol=1e-5, rtol=0)


def test_a_new_scalar_head_is_of_the_documented_size(base):
    weight = new_reward(base, dtype=torch.bfloat16, seed=3, lora=Lora()).scalar.weight
    again = new_reward(base, dtype=torch.float32, seed=3).scalar.weight
    assert weight.dtype == torch.float32 and torch.equal(weight, again)
    assert weight.std().item() * 33**0.5 == pytest.approx(1, abs=0.35)


@pytest.mark.parametrize("head_only", [True, False])
def test_training_the_critic_leaves_the_reward_alone(base, tmp_path, head_only):
    reward = new_reward(base, dtype=torch.float32, seed=1)
    save_merged(reward, base, tmp_path / "rm", smol(unk_token="<|endoftext|>"))
    reward = load_reward(str(tmp_path / "rm"), dtype=torch.float32)
    rows = [Row([5, 6, 7], [Branch([8, 9], {}), Branch([10], {})])]
    before = score_rows(reward, rows)
    value = value_role(reward, lora=Lora(rank=4), seed=0, head_only=head_only)
    (now,) = score_rows(value, rows)
    assert now == ([0.0, 0.0] if head_only else pytest.approx(before[0], abs=1e-5))  # where a critic starts
    names = set(value.parameters())
    assert (names == {"scalar.weight"}) if head_only else len(names) == 1 + 2 * 14
    trained(value)
    assert score_rows(reward, rows) == before
    assert abs(score_rows(value, rows)[0][0] - before[0][0]) > 1e-3
    assert reward.parameters() == {}


def test_reward_template_that_ends_conversations_with_eos(base, tmp_path):
    tokenizer = phi3()
    save_merged(new_reward(base, dtype=torch.float32), base, tmp_path / "out", tokenizer)
    said, reply = [Message(role="user", content="Hello")], [Message(role="assistant", content="there")]
    talk = [{"role": m.role, "content": m.content} for m in said + reply]
    rendered = AutoTokenizer.from_pretrained(tmp_path / "out").apply_chat_template(talk, return_dict=False)
    assert rendered == [*render_prompt(tokenizer, said), *render_response(tokenizer, said, reply)]


def test_reward_tokenizer_without_pad_takes_any_special_token_it_has(base, tmp_path):
    tokenizer = llama3()
    save_merged(new_reward(base, dtype=torch.float32), base, tmp_path / "out", tokenizer)


DECISIVE = [
    "additional_chat_templates", "chat_template.jinja", "config.json", "generation_config.json", "merges.txt",
    "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "vocab.json",
]  # fmt: skip


def fill(directory):
    directory.mkdir(parents=True)
    for name in [*DECISIVE, "stage.json", "metrics.jsonl", "README.md"]:
        (directory / name).write_text("{}")


def test_every_file_that_decides_a_models_numbers_is_known(tmp_path):
    fill(tmp_path / "model")
    assert [path.name for path in model_files(str(tmp_path / "model"))] == DECISIVE


def test_so_are_those_of_a_model_in_the_hubs_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cache = tmp_path / "models--someone--model"
    fill(cache / "snapshots" / "c0ffee")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("c0ffee")
    assert [path.name for path in model_files("someone/model")] == DECISIVE
    with pytest.raises(
        ConfigError, match=r"model 'someone/other' can't be fetched from the hub \(.*\); give a directory"
    ):
        model_files("someone/other")


def test_a_pad_token_that_is_the_stop_token_gets_its_gradient(tmp_path):
    """torch gives the row of ``padding_idx`` none."""
    net = plain_net("llama")
    net.config.pad_token_id = net.config.eos_token_id = 5
    net.save_pretrained(tmp_path)
    smol().save_pretrained(tmp_path)
    row = Row([3, 5, 4], [Branch([6, 5], {"loss": [True, True]})])
    gradients = []
    for load in (load_policy, new_reward):
        model = load(str(tmp_path), dtype=torch.float64, **({"train": True} if load is load_policy else {}))
        states = hidden_states(model, build_forest([row]))
        states.square().sum().backward()
        gradients.append(model.net.get_input_embeddings().weight.grad[5])
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    embedded = reference.get_input_embeddings().weight.detach()[[3, 5, 4, 6, 5]].clone().requires_grad_()
    reference.model(inputs_embeds=embedded[None]).last_hidden_state.square().sum().backward()
    expected = embedded.grad[1] + embedded.grad[4]
    for found in gradients:
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12) and found.abs().max() > 0
