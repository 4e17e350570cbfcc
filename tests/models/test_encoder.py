"""An encoder as a reward model: trained whole, and scored by plain transformers as by us."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel

from caches import own_cache
from data.conftest import byte_level
from posttrain.cli import main
from posttrain.data.load import read
from posttrain.rewards.trained import load_reward

WORDS = ["tree", "stone", "river", "cloud"]
ROWS = [{"prompt": f"repeat {w}", "chosen": f"{w}.", "rejected": f"the word is {w}."} for w in WORDS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory with data and a small random encoder whose tokenizer has no chat template."""
    folder = tmp_path_factory.mktemp("encoder")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    tokenizer = byte_level(["[PAD]", "[CLS]", "[SEP]"], None, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = BertModel(
            BertConfig(
                vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                pad_token_id=0, initializer_range=0.2,
            )
        )  # fmt: skip
    net.save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        own_cache(patch, folder / "cache")
        yield folder


@pytest.mark.parametrize(("kind", "labels"), [("bradley_terry", 1), ("plackett_luce", 1)])
def test_an_encoder_learns_and_opens_in_plain_transformers(folder, kind, labels):
    options = "--data pairs.jsonl --model bert --lora-rank 0 --prompts-per-step 4 --epochs 30 --dtype float32 --lr 3e-3"
    assert main(["train", "reward", "--kind", kind, *options.split(), "--name", kind]) == 0
    place = Path("runs") / kind / "reward"
    scorer, examples = load_reward(place), read("pairs.jsonl")
    values = scorer.values(examples)
    assert all(good > bad for good, bad in values)
    assert replace(scorer, max_tokens=20).values(examples)[0] == pytest.approx(values[0], abs=1e-5)
    net = AutoModelForSequenceClassification.from_pretrained(place).eval()
    assert net.config.num_labels == labels
    talks = [
        [{"role": "user", "content": e.prompt[0].content}, {"role": "assistant", "content": r.text}]
        for e in examples
        for r in e.responses
    ]
    tokenizer = AutoTokenizer.from_pretrained(place, padding_side="right")
    batch = tokenizer.apply_chat_template(talks, padding=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        theirs = net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    mean = scorer.record.get("mean", 0.0)
    assert (theirs - mean).tolist() == pytest.approx([v for row in values for v in row], abs=1e-5)


def test_adapters_of_an_encoder_are_refused(folder, capsys):
    options = ["--data", "pairs.jsonl", "--model", "bert", "--lora-rank", "4", "--name", "adapters"]
    assert main(["train", "reward", *options]) == 2
    assert "is an encoder, which is trained whole; set lora_rank to 0" in capsys.readouterr().err
