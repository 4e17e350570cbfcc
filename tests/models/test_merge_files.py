"""Merging model directories: what comes out loads in plain transformers and computes what went in, or nothing is written."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

from data.conftest import smol
from posttrain.errors import ConfigError, ModelError
from posttrain.models import merge_files
from posttrain.models.load import load_policy, new_reward, save_merged
from posttrain.models.lora import Lora, save_adapter
from posttrain.models.merge import merge_states
from posttrain.models.merge_files import merge_models, outputs
from posttrain.models.stored import open_model, tokenizer_hash
from tiny import plain_net

from .test_lora import stir
from .test_save import trained

PROMPTS = [torch.randint(3, 512, (4 + k,), generator=torch.Generator().manual_seed(k)).tolist() for k in range(16)]


def saved(directory, seed, *, tied=False, dtype=torch.float32, tokenizer=None, **changes):
    net = plain_net("llama", seed=seed, dtype=torch.float32, vocab_size=512, tie_word_embeddings=tied, **changes).to(
        dtype
    )
    net.generation_config = GenerationConfig(eos_token_id=[2, 7])
    net.save_pretrained(directory)
    (tokenizer or smol()).save_pretrained(directory)
    return str(directory)


@pytest.fixture
def two(tmp_path):
    return [saved(tmp_path / name, seed) for seed, name in enumerate("ab")]


def merge(method, paths, out, **given):
    base = open_model(given.pop("base")) if "base" in given else None
    return merge_models(method, [open_model(p) for p in paths], out, prompts=PROMPTS, base=base, **given)


def plain(path, kind=AutoModelForCausalLM):
    return kind.from_pretrained(path, attn_implementation="eager").eval()


def test_a_merged_directory_opens_in_transformers(two, tmp_path):
    record = merge("average", two, tmp_path / "out", weights=(0.25, 0.75))
    states = [plain(p).state_dict() for p in two]
    expected = merge_states("average", states, weights=(0.25, 0.75))
    found = plain(tmp_path / "out")
    assert all(torch.equal(v, expected[k]) for k, v in found.state_dict().items())
    assert found.generation_config.eos_token_id == [2, 7]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == smol().chat_template
    assert json.loads((tmp_path / "out" / "merge.json").read_text()) == record
    assert [p["weight"] for p in record["parts"]] == [0.25, 0.75] and record["tensors"] == len(expected)
    assert record["parity"]["largest"] < 1e-5 and record["parts"][0]["sha256"] != record["parts"][1]["sha256"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "out"]


def test_where_a_model_came_from_is_no_part_of_its_shape(two, tmp_path):
    other = shutil.copytree(two[1], tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"_model_name_or_path": "a", "_name_or_path": "b"}))
    assert merge("average", [two[0], str(other)], tmp_path / "out")["parity"]["largest"] < 1e-5


@pytest.mark.parametrize(
    ("method", "options"), [("slerp", {}), ("warp", {"eta": 0.4}), ("ties", {"density": 0.3}), ("dare", {"drop": 0.5})]
)
def test_methods_with_a_base(two, tmp_path, method, options):
    base = saved(tmp_path / "base", 7)
    record = merge(method, two, tmp_path / "out", base=base, options=options)
    states = [plain(p).state_dict() for p in (*two, base)]
    expected = merge_states(method, states[:2], base=states[2], **options)
    assert all(torch.equal(v, expected[k]) for k, v in plain(tmp_path / "out").state_dict().items())
    assert record["base"]["path"] == base and record["options"] == options


def test_tied_tensors_are_merged_once_and_stay_tied(tmp_path):
    paths = [saved(tmp_path / name, seed, tied=True) for seed, name in enumerate("ab")]
    file = tmp_path / "b" / "model.safetensors"  # some savers write both names of a tied tensor
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file, metadata={"format": "pt"})
    record = merge("average", paths, tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    found = plain(tmp_path / "out")
    assert found.lm_head.weight.data_ptr() == found.model.embed_tokens.weight.data_ptr()
    mean = (plain(paths[0]).lm_head.weight + tensors["model.embed_tokens.weight"]) / 2
    torch.testing.assert_close(found.lm_head.weight, mean, atol=1e-6, rtol=0)
    assert record["tensors"] == len(tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_kept_and_one_model_is_itself(tmp_path, dtype):
    path = saved(tmp_path / "a", 0, dtype=dtype)
    merge("average", [path], tmp_path / "out")
    old, new = (load_file(tmp_path / k / "model.safetensors") for k in ("a", "out"))
    assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) and old[k].dtype == dtype for k in old)
    assert plain(tmp_path / "out").dtype == dtype


def test_shards_are_one_model(two, tmp_path):
    plain(two[1]).save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    smol().save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    merge("average", [two[0], str(tmp_path / "shards")], tmp_path / "out")
    merge("average", two, tmp_path / "whole")
    one, other = (load_file(tmp_path / k / "model.safetensors") for k in ("out", "whole"))
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_an_adapter_is_added_to_its_base_in_full_precision(tmp_path):
    base = saved(tmp_path / "base", 0, dtype=torch.bfloat16)
    model = load_policy(base, dtype=torch.float32, lora=Lora(rank=4, alpha=8), train=True)
    stir(model.net, "policy")
    for parameter in model.parameters().values():
        parameter.data *= 0.05  # a delta that bf16 would round away
    save_adapter(model.net, "policy", tmp_path / "adapter", base, Lora(rank=4, alpha=8))
    save_merged(model, base, tmp_path / "expected", smol())
    record = merge("average", [str(tmp_path / "adapter")], tmp_path / "out")
    found, expected = (load_file(tmp_path / k / "model.safetensors") for k in ("out", "expected"))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-7, rtol=1e-6)
    assert {t.dtype for t in found.values()} == {torch.float32} and plain(tmp_path / "out").dtype == torch.float32
    assert record["parts"][0]["adapter_on"] == base
    twice = merge("average", [str(tmp_path / "adapter"), base], tmp_path / "half")
    assert twice["dtypes"] == ["float32"]


def test_reward_models(two, tmp_path):
    """WARM: weights of reward models from one start are averaged, heads too."""
    for seed, name in enumerate("rs"):
        reward = trained(new_reward(two[0], dtype=torch.float32, seed=0), seed)
        save_merged(reward, two[0], tmp_path / name, smol(unk_token="<|endoftext|>"))
    paths = [str(tmp_path / name) for name in "rs"]
    merge("average", paths, tmp_path / "out")
    nets = [plain(p, AutoModelForSequenceClassification) for p in (*paths, tmp_path / "out")]
    heads = [net.score.weight for net in nets]
    torch.testing.assert_close(heads[2], (heads[0] + heads[1]) / 2, atol=1e-7, rtol=0)
    scores = [outputs(net, PROMPTS[0]) for net in nets]
    assert scores[2].shape == (1,) and scores[0] != scores[1]


def test_no_more_than_a_tensor_of_each_is_held(two, tmp_path, monkeypatch):
    alive, most = set(), [0]

    def counted(read, self, name):
        import weakref

        tensor = read(self, name).clone()
        alive.add(key := id(tensor))
        weakref.finalize(tensor, alive.discard, key)
        most[0] = max(most[0], len(alive))
        return tensor

    read = merge_files.Stored.__getitem__
    monkeypatch.setattr(merge_files.Stored, "__getitem__", lambda self, name: counted(read, self, name))
    merge("average", two, tmp_path / "out")
    assert most[0] <= 4  # two being merged, two that the loop still names


class TestNothingIsWritten:
    def fails(self, tmp_path, message, *args, **given):
        before = sorted(p.name for p in tmp_path.iterdir())
        with pytest.raises((ModelError, ConfigError), match=message):
            merge(*args, **given)
        assert sorted(p.name for p in tmp_path.iterdir()) == before

    def test_shapes(self, two, tmp_path):
        other = saved(tmp_path / "c", 0, intermediate_size=64)
        message = (
            r"config.json, field 'intermediate_size': 48 in '.*a', 64 in '.*c'; only models of one shape can be merged"
        )
        self.fails(tmp_path, message, "average", [two[0], other], tmp_path / "out")

    def test_tokenizers(self, two, tmp_path):
        tokenizer = smol()
        tokenizer.add_tokens(["<|new|>"])
        other = saved(tmp_path / "c", 0, tokenizer=tokenizer)
        message = r"the tokenizers of '.*a' and '.*c' differ: equal ids are other tokens"
        self.fails(tmp_path, message, "average", [two[0], other], tmp_path / "out")
        (tmp_path / "c" / "tokenizer.json").unlink()
        (tmp_path / "c" / "tokenizer_config.json").unlink()
        self.fails(tmp_path, "'.*c' has no tokenizer", "average", [two[0], other], tmp_path / "out")

    def test_a_tensor_that_is_missing_or_not_finite(self, two, tmp_path):
        file = tmp_path / "b" / "model.safetensors"
        tensors = load_file(file)
        short = {k: v for k, v in tensors.items() if k != "model.norm.weight"}
        save_file(short, file, metadata={"format": "pt"})
        self.fails(tmp_path, r"no file has 'model.norm.weight'", "average", two, tmp_path / "out")
        tensors["model.norm.weight"][3] = float("nan")
        save_file(tensors, file, metadata={"format": "pt"})
        self.fails(
            tmp_path,
            r"'.*b' as it was read is not what it should compute: a difference of nan",
            "average",
            two,
            tmp_path / "out",
        )

    def test_what_is_read_back_otherwise(self, two, tmp_path, monkeypatch):
        write = merge_files._write

        def spoiled(path, *rest):
            write(path, *rest)
            data = bytearray(path.read_bytes())
            data[-1] ^= 0x01  # of the last tensor's last number, the exponent
            path.write_bytes(data)

        monkeypatch.setattr(merge_files, "_write", spoiled)
        self.fails(tmp_path, r"the merge in '.*out' is not what it should compute", "average", two, tmp_path / "out")

    def test_what_does_not_load(self, two, tmp_path, monkeypatch):
        write = merge_files._write

        def cut(path, *rest):
            write(path, *rest)
            path.write_bytes(path.read_bytes()[:-9])

        monkeypatch.setattr(merge_files, "_write", cut)
        self.fails(tmp_path, r"transformers can't load .*; nothing was written", "average", two, tmp_path / "out")

    def test_a_directory_that_holds_a_model(self, two, tmp_path):
        self.fails(tmp_path, "holds a model; choose another directory", "average", two, tmp_path / "b")

    def test_no_adapter_of_another_kind(self, two, tmp_path):
        shutil.copytree(two[0], tmp_path / "adapter")
        (tmp_path / "adapter" / "config.json").unlink()
        config = {"peft_type": "LORA", "base_model_name_or_path": two[0], "r": 4, "lora_alpha": 8, "use_dora": True}
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
        message = r"adapter '.*adapter' is no plain LoRA \(use_dora=True\); merge it with peft"
        self.fails(tmp_path, message, "average", [str(tmp_path / "adapter")], tmp_path / "out")


def test_padding_is_no_part_of_a_tokenizers_hash(tmp_path):
    one = saved(tmp_path / "a", 0)
    file = tmp_path / "a" / "tokenizer.json"
    before = tokenizer_hash(open_model(one))
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"truncation": {"max_length": 3}}))
    assert tokenizer_hash(open_model(one)) == before
    content["model"]["vocab"][next(iter(content["model"]["vocab"]))] = 300
    file.write_text(json.dumps(content))
    assert tokenizer_hash(open_model(one)) != before
