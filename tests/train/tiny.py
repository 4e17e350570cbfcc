"""Networks of two layers and what the tests of training do with them."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import torch
from rich.console import Console
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from posttrain.forest import Branch, Row
from posttrain.models.attention import NAME
from posttrain.models.policy import Model
from posttrain.models.scores import Gate
from posttrain.rewards.base import Score
from posttrain.rollout.engine import Sampling
from posttrain.rollout.local import LocalEngine
from posttrain.train.journal import Journal
from posttrain.train.log import METRICS
from posttrain.train.loop import Run
from posttrain.train.rollouts import Plan, RolloutSource
from posttrain.types import Example, Message

VOCABULARY = 97
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "pad_token_id": 0,
}
PROMPTS = [[5, 9, 11], [7], [8, 30, 31, 6, 12], [13, 13], [21, 4, 9, 10], [3, 38]]
STOPS = frozenset(range(77, 97))


def network(seed: int, *, scalar: bool = False, dtype: torch.dtype = torch.float64, outputs: int = 1):
    """A random network."""
    kind = LlamaForSequenceClassification if scalar else LlamaForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = kind(LlamaConfig(**SHAPE, num_labels=outputs, tie_word_embeddings=True, attn_implementation="sdpa"))
    return exact(net, dtype)


def exact(net, dtype: torch.dtype = torch.float64):
    """The network in one dtype throughout: transformers' norm computes in fp32 whatever it is given."""
    for parent in list(net.modules()):
        for name, child in parent.named_children():
            if type(child).__name__ == "LlamaRMSNorm":
                setattr(parent, name, nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon))
    return net.to(dtype).eval()


def role(
    seed: int,
    *,
    scalar: bool = False,
    trained: bool = True,
    dtype: torch.dtype = torch.float64,
    outputs: int = 1,
    gated: bool = False,
) -> Model:
    """The same network as a role of the library."""
    net = network(seed, scalar=scalar, dtype=dtype, outputs=outputs)
    net.requires_grad_(trained)
    net.set_attn_implementation(NAME)
    gate = Gate(SHAPE["hidden_size"], outputs, hidden=8, temperature=0.1, seed=seed).to(dtype) if gated else None
    return Model(net, scalar=net.score if scalar else None, trained=trained, gate=gate)


def random_rows(seed: int, shape: list[tuple[int, list[int]]], mask: str | None = "loss") -> list[Row]:
    """Rows of ``(prompt length, branch lengths)``; some tokens are outside the mask, the last never."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(1, VOCABULARY, (n,), generator=g).tolist()  # noqa: E731
    rows = []
    for prompt, lengths in shape:
        marks = [[*(torch.rand(n - 1, generator=g) < 0.7).tolist(), True] for n in lengths]
        branches = [
            Branch(draw(n), {mask: m} if mask else {}, k == 2)
            for k, (n, m) in enumerate(zip(lengths, marks, strict=True))
        ]
        rows.append(Row(draw(prompt), branches))
    return rows


def score(completions) -> list[Score]:
    """Distinct scores of either sign, exact in binary."""
    return [Score(len(c.ids) / 4 - (sum(c.ids) % 16) / 8) for c in completions]


def rollouts(policy: Model, reference: Model, value: Model | None, *, reward=score, **changes) -> RolloutSource:
    """A source over the six prompts; ``changes`` are fields of its plan."""
    on_samples = changes.pop("on_samples", lambda step, samples: None)
    journal = changes.pop("journal", None) or Journal()
    numbers = {"prompts": 4, "samples": 2, "updates": 2, "kl": 0.1, "seed": 3, "max_tokens": 60} | changes
    return RolloutSource(
        plan=Plan(sampling=Sampling(max_new_tokens=6), **numbers),
        examples=[Example(prompt=(Message(role="user", content=str(p)),)) for p in PROMPTS],
        prompt_ids=PROMPTS,
        engine=LocalEngine(policy, STOPS, slots=5),
        reward=reward,
        reference=reference,
        value=value,
        decode=str,
        on_samples=on_samples,
        journal=journal,
    )


def run_in(directory: Path, **changes) -> Run:
    """A run that prints nowhere."""
    given = {"steps": 6, "max_tokens": 60, "save_every": 2, "console": Console(file=StringIO(), width=200)} | changes
    return Run(directory=directory, **given)


def metrics(directory: Path) -> list[dict]:
    """The lines of ``metrics.jsonl`` without what measures time or memory."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k == "step" or not METRICS[k].wall_clock} for line in lines]


def weights(models: dict[str, Model]) -> dict[str, torch.Tensor]:
    """Every trained tensor."""
    return {f"{r}/{k}": p.detach().clone() for r, m in models.items() for k, p in m.parameters().items()}


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
