"""GRPO by hand: torch and transformers only, to be read from top to bottom.

1. Sample: the policy answers each prompt G times at temperature 1; the answers to one prompt are a group.
2. Score: one number a response. In DeepSeekMath a reward model gives it; here it is a function of the text.
3. Compare within the group, which takes the place of a critic: A = (score - mean of the group) / its standard
   deviation (that of a sample, divided by G - 1), the same at every token of the response. Where all scores of a
   group are equal there is nothing to learn and A is 0.
4. Log-probabilities of the sampled tokens under the policy that sampled ("old") and under the reference, a frozen
   copy of the start.
5. Loss of a token: PPO's clipped surrogate, plus kl (exp(-d) - 1 + d) with d = log pi - log pi_ref. Unlike in
   PPO the penalty is no part of the reward. Its value estimates KL(pi || pi_ref); on samples of pi its gradient
   is that of KL(pi_ref || pi).
6. Loss of a step: the mean over responses of each one's mean over its tokens, so that tokens of long responses
   weigh less. The gradient is clipped to norm 1; AdamW with a linear warm-up.

Shao et al. 2024, "DeepSeekMath: pushing the limits of mathematical reasoning in open language models", eq. 3 and 4
and section 4.1.2 (outcome supervision). "Iterative" GRPO also makes the reference the policy of now from time to
time and trains the reward model on.

tests/test_grpo_by_hand.py holds the library to these functions, step by step. Run: python examples/grpo_by_hand.py
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

WEIGHTS = Path(__file__).parents[1] / "src" / "posttrain" / "models" / "weights" / "small-instruct"


@dataclass
class Rows:
    """B responses of up to T tokens to prompts of up to P, those to one prompt together; masks are true on real tokens."""

    prompt: Tensor  # [B, P] ids, padded on the left
    prompt_mask: Tensor  # [B, P]
    response: Tensor  # [B, T] ids, padded on the right
    mask: Tensor  # [B, T], the stop token included
    score: Tensor  # [B]
    old_logp: Tensor | None = None  # [B, T] nats
    ref_logp: Tensor | None = None  # [B, T] nats

    def inputs(self) -> dict[str, Tensor]:
        """Prompt and response side by side, [B, P + T]; positions count real tokens only."""
        real = torch.cat([self.prompt_mask, self.mask], 1).long()
        ids = torch.cat([self.prompt, self.response], 1)
        return {"input_ids": ids, "attention_mask": real, "position_ids": (real.cumsum(1) - 1).clamp(min=0)}

    def shares(self, count: int, *more: Tensor):
        """Cut the rows, and other tensors of B rows, into equal runs."""
        for index in torch.arange(len(self.response)).chunk(count):
            yield Rows(*(x[index] for x in vars(self).values())), *(x[index] for x in more)


def logps(policy: nn.Module, rows: Rows) -> Tensor:
    """log pi(token | all before it) [B, T]: the logits of a position predict the token after it."""
    logits = policy(**rows.inputs()).logits[:, rows.prompt.shape[1] - 1 : -1]
    return logits.log_softmax(-1).gather(2, rows.response[..., None])[..., 0]


def advantages(score: Tensor, group_size: int) -> Tensor:
    """Scores [B] standardised in groups of neighbours; exactly 0 where a group has one score."""
    groups = score.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    flat = groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)
    return torch.where(flat, 0.0, centred / (groups.std(1, keepdim=True) + 1e-6)).view(-1)


def mean_of_means(x: Tensor, mask: Tensor) -> Tensor:
    """The mean over responses of each one's mean over its tokens."""
    return ((x * mask).sum(1) / mask.sum(1)).mean()


def losses(logp: Tensor, rows: Rows, advantage: Tensor, clip: float = 0.2) -> tuple[Tensor, Tensor]:
    """The surrogate's loss, and the KL penalty before its weight."""
    ratio, wide = (logp - rows.old_logp).exp(), advantage[:, None]
    surrogate = torch.minimum(ratio * wide, ratio.clamp(1 - clip, 1 + clip) * wide)
    d = logp - rows.ref_logp
    return mean_of_means(-surrogate, rows.mask), mean_of_means((-d).exp() - 1 + d, rows.mask)


def make_optimizer(policy: nn.Module, *, lr: float, warmup: int):
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / warmup))


def update(policy, optimizer, schedule, rows: Rows, advantage: Tensor, kl: float) -> dict[str, float]:
    """One step on a share of a rollout."""
    surrogate, penalty = losses(logps(policy, rows), rows, advantage)
    (surrogate + kl * penalty).backward()
    norm = nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    return {"loss/policy": surrogate.item(), "loss/kl": penalty.item(), "norm": norm.item()}


@torch.no_grad()
def sample(policy, prompts: list[list[int]], group_size: int, score, stop: int, longest: int) -> Rows:
    """Answer each prompt G times; ``score`` takes the ids before the stop token, what follows it is padding."""
    prompts = [p for p in prompts for _ in range(group_size)]
    width = max(map(len, prompts))
    prompt = torch.tensor([[stop] * (width - len(p)) + p for p in prompts])
    real = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts])
    drawing = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": longest}
    out = policy.generate(prompt, attention_mask=real.long(), **drawing, eos_token_id=stop, pad_token_id=stop)
    response = out[:, width:]
    stops = response == stop
    mask = stops.cumsum(1) - stops.long() == 0  # up to the first stop token
    scores = [score(r[m].tolist()) for r, m in zip(response, mask & ~stops, strict=True)]
    return Rows(prompt, real, response, mask, torch.tensor(scores))


def vowels(text: str) -> float:
    """A reward anyone can check: how many tenths of the text are vowels."""
    return 10 * sum(letter in "aeiou" for letter in text) / max(1, len(text))


def load(path: Path):
    """The shipped small model; without it a random one, whose ids are ASCII, 0 being padding and stop."""
    if (path / "config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(path)
        encode = lambda text: tokenizer.apply_chat_template(  # noqa: E731
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        return AutoModelForCausalLM.from_pretrained(path), encode, tokenizer.decode, tokenizer.eos_token_id
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    policy = LlamaForCausalLM(LlamaConfig(vocab_size=128, tie_word_embeddings=True, pad_token_id=0, **shape))
    return policy, lambda text: list(text.encode()), lambda ids: bytes(ids).decode(), 0


def main(steps: int = 10, group_size: int = 8, updates: int = 2, longest: int = 24, path: Path = WEIGHTS) -> list[dict]:
    """Make ``steps`` rollouts of a group for each of eight prompts and ``updates`` updates; print a line for each."""
    torch.manual_seed(0)
    policy, encode, decode, stop = load(path)
    policy.eval()  # no dropout: the policy that is trained is the one that samples
    reference = copy.deepcopy(policy).requires_grad_(False)
    training = policy, *make_optimizer(policy, lr=1e-3, warmup=4)
    words = ("tree", "apple", "sun", "green", "river", "blue", "house", "seven")
    ids = [encode(f"Repeat the word {word}.") for word in words]
    table: list[dict] = []
    for _ in range(steps):
        rows = sample(policy, ids, group_size, lambda answer: vowels(decode(answer)), stop, longest)
        with torch.no_grad():
            old, ref = logps(policy, rows), logps(reference, rows)
        rows = replace(rows, old_logp=old, ref_logp=ref)
        done = [
            update(*training, *share, kl=0.04) for share in rows.shares(updates, advantages(rows.score, group_size))
        ]
        kl, length = ((old - ref) * rows.mask).sum(1).mean().item(), rows.mask.sum(1).float().mean().item()
        line = {"reward": rows.score.mean().item(), "kl/response": kl, "length": length}
        table.append(line | {key: sum(d[key] for d in done) / updates for key in done[0]})
        if len(table) == 1:
            print(*(f"{name:>11}" for name in table[0]))
        print(*(f"{x:11.3f}" for x in table[-1].values()))
    return table


if __name__ == "__main__":
    main()
