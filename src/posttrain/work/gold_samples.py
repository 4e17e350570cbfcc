"""Samples of the small base model with their gold scores: what best of n is measured on where gold is known."""

from __future__ import annotations

from dataclasses import replace

import torch

from posttrain.data import smallworld
from posttrain.data.collate import prompt_ids
from posttrain.data.write import write_jsonl
from posttrain.models.load import find_model, load_policy, load_tokenizer
from posttrain.rollout.engine import Request, Sampling
from posttrain.rollout.local import LocalEngine
from posttrain.types import Example, Message, Response

__all__ = ["sampled", "write_jsonl"]


def sampled(prompts: int, samples: int, *, seed: int, temperature: float = 1.3) -> list[Example]:
    """Held-out prompts of the small world with samples of its base model, each one's gold total as its score.

    An empty sample reads as a full stop, for an answer has to say something; gold gives it 0.
    """
    found = find_model("small-base")
    tokenizer = load_tokenizer(found.path)
    rows = smallworld.task_prompts(prompts, seed=seed, split="heldout")
    examples = [Example(prompt=(Message(role="user", content=r["prompt"]),), kind=r["kind"]) for r in rows]
    ids, _ = prompt_ids(tokenizer, examples, max_length=256)
    engine = LocalEngine(load_policy(found.path, dtype=torch.float32), frozenset({tokenizer.eos_token_id}), slots=64)
    requests = [Request(tuple(p), (seed, i, k)) for i, p in enumerate(ids) for k in range(samples)]
    rollouts = engine.generate(requests, Sampling(max_new_tokens=28, temperature=temperature))
    texts = [tokenizer.decode(r.ids, skip_special_tokens=True).strip() or "." for r in rollouts]
    said = [texts[i * samples : (i + 1) * samples] for i in range(len(examples))]
    return [
        replace(e, responses=tuple(_scored(e.prompt[0].content, t) for t in some))
        for e, some in zip(examples, said, strict=True)
    ]


def _scored(prompt: str, text: str) -> Response:
    gold = smallworld.gold(prompt, text).total
    return Response(messages=(Message(role="assistant", content=text),), score=gold)
