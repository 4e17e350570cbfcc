"""DPO by hand: torch and transformers only, to be read from top to bottom.

1. Data: prompts, each with a response that was preferred ("chosen") and one that was not ("rejected").
2. Reference: a frozen copy of the start. Its log-probabilities never change, so they are computed once.
3. log pi(response | prompt): the sum of log-probabilities of the response's tokens, the stop token included and
   the prompt left out; not divided by length.
4. Margin: how much more than the reference the policy prefers the chosen response,
   (log pi - log ref)(chosen) - (log pi - log ref)(rejected).
5. Loss: -log sigmoid(beta margin), the mean over pairs. At the start the policy is the reference, all margins
   are 0 and the loss is log 2 = 0.693.
6. Update: the gradient clipped to norm 1, AdamW with a linear warm-up (the paper has RMSprop).

beta (log pi - log ref) is called the implicit reward of a response: the policy is the one that would be optimal
under that reward with a KL penalty of weight beta to the reference.

Rafailov et al. 2023, "Direct preference optimization: your language model is secretly a reward model", eq. 7.
tests/test_dpo_by_hand.py holds the library to these functions, step by step. Run: python examples/dpo_by_hand.py
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

WEIGHTS = Path(__file__).parents[1] / "src" / "posttrain" / "models" / "weights" / "small-instruct"
Pair = tuple[list[int], list[int], list[int]]  # ids of prompt, chosen and rejected response


@dataclass
class Rows:
    """Prompts with a response each, side by side and padded on the right."""

    ids: Tensor  # [B, T]
    real: Tensor  # [B, T] bool, false on padding
    response: Tensor  # [B, T] bool, true on the response's tokens


def make_rows(prompts: list[list[int]], responses: list[list[int]]) -> Rows:
    """Rows as wide as the longest; padding is id 0, which no real token reads."""
    width = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    real, response = ids.bool(), ids.bool()
    for i, (p, r) in enumerate(zip(prompts, responses, strict=True)):
        end = len(p) + len(r)
        ids[i, :end] = torch.tensor([*p, *r])
        real[i, :end], response[i, len(p) : end] = True, True
    return Rows(ids, real, response)


def sequence_logp(net: nn.Module, rows: Rows) -> Tensor:
    """log pi(response | prompt) in nats, [B]: the logits of a position predict the token after it."""
    logits = net(input_ids=rows.ids, attention_mask=rows.real.long()).logits[:, :-1]
    logp = logits.log_softmax(-1).gather(2, rows.ids[:, 1:, None])[..., 0]
    return (logp * rows.response[:, 1:]).sum(1)


def both_logps(net: nn.Module, pairs: list[Pair]) -> tuple[Tensor, Tensor]:
    """The same of chosen and of rejected responses, each [B]."""
    prompts, chosen, rejected = (list(x) for x in zip(*pairs, strict=True))
    return sequence_logp(net, make_rows(prompts, chosen)), sequence_logp(net, make_rows(prompts, rejected))


def dpo_loss(policy: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor], beta: float) -> tuple[Tensor, Tensor]:
    """Loss and margin of each pair, [B]."""
    margin = (policy[0] - reference[0]) - (policy[1] - reference[1])
    return -logsigmoid(beta * margin), margin


def make_optimizer(policy: nn.Module, *, lr: float, warmup: int):
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / warmup))


def update(policy, optimizer, schedule, pairs: list[Pair], reference: tuple[Tensor, Tensor], beta: float) -> dict:
    """One step on a batch of pairs."""
    losses, margin = dpo_loss(both_logps(policy, pairs), reference, beta)
    losses.mean().backward()
    norm = nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    right = (margin > 0).double() + 0.5 * (margin == 0)
    reward = (beta * margin).mean()
    return {"loss": losses.mean().item(), "pairs": right.mean().item(), "margin": reward.item(), "norm": norm.item()}


def load(path: Path):
    """The shipped small model; without it a random one, whose ids are ASCII, 0 being padding and stop."""
    if (path / "config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(path)
        prompt = lambda text: tokenizer.apply_chat_template(  # noqa: E731
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        answer = lambda text: [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]  # noqa: E731
        return AutoModelForCausalLM.from_pretrained(path), prompt, answer
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    policy = LlamaForCausalLM(LlamaConfig(vocab_size=128, tie_word_embeddings=True, pad_token_id=0, **shape))
    return policy, lambda text: list(text.encode()), lambda text: [*text.encode(), 0]


def main(steps: int = 20, beta: float = 0.1, lr: float = 1e-4, path: Path = WEIGHTS) -> list[dict]:
    """Teach the model to answer in one word rather than in a sentence; print a line a step."""
    torch.manual_seed(0)
    policy, prompt, answer = load(path)
    policy.eval()  # no dropout: the policy starts as the reference
    reference = copy.deepcopy(policy).requires_grad_(False)
    words = ("tree", "apple", "sun", "green", "river", "blue", "house", "seven")
    pairs = [(prompt(f"Repeat the word {w}."), answer(f"{w}."), answer(f"the word is {w}.")) for w in words]
    with torch.no_grad():
        before = both_logps(reference, pairs)
    training = policy, *make_optimizer(policy, lr=lr, warmup=4)
    table: list[dict] = []
    print(*(f"{name:>8}" for name in ("loss", "pairs", "margin", "norm")))
    for _ in range(steps):
        table.append(update(*training, pairs, before, beta))
        print(*(f"{x:8.3f}" for x in table[-1].values()))
    return table


if __name__ == "__main__":
    main()
