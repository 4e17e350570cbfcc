"""PPO as InstructGPT does it, by hand: torch and transformers only, to be read from top to bottom.

1. Sample: the policy answers prompts at temperature 1.
2. Score: one number a response. In InstructGPT a reward model gives it; here it is a function of the text.
3. Compare: log-probabilities of the sampled tokens under the policy that sampled ("old") and under the
   reference, a frozen copy of the start; and the critic's values, which predict the reward still to come.
4. Reward a token: -kl (log pi_old - log pi_ref), and at the last token the score besides.
5. Estimate advantages: GAE without discount; returns = advantages + values; then the advantages are whitened
   (mean 0, variance 1) over all sampled tokens of the rollout.
6. Update, on equal shares of the rollout: clipped policy loss plus clipped value loss, both means over the
   share's sampled tokens; each network's gradient is clipped to norm 1; AdamW with a linear warm-up.

Ouyang et al. 2022, "Training language models to follow instructions with human feedback", eq. 2 and app. C.4;
left out are its pretraining mix (this is "PPO", not "PPO-ptx") and the moving average of weights.
Schulman et al. 2017, "Proximal policy optimization algorithms", eq. 7. GAE: Schulman et al. 2016, eq. 16.
Clipped value loss and whitening: the code of Ziegler et al. 2019, "Fine-tuning language models from human
preferences".

tests/test_by_hand.py holds the library to these functions, loss by loss. Run: python examples/ppo_by_hand.py
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
    """B responses of up to T tokens to prompts of up to P; masks are true on real tokens."""

    prompt: Tensor  # [B, P] ids, padded on the left
    prompt_mask: Tensor  # [B, P]
    response: Tensor  # [B, T] ids, padded on the right
    mask: Tensor  # [B, T], the stop token included
    score: Tensor  # [B]
    old_logp: Tensor | None = None  # [B, T] nats
    ref_logp: Tensor | None = None  # [B, T] nats
    value: Tensor | None = None  # [B, T], before any update

    def inputs(self) -> dict[str, Tensor]:
        """Prompt and response side by side, [B, P + T]; positions count real tokens only."""
        real = torch.cat([self.prompt_mask, self.mask], 1).long()
        ids = torch.cat([self.prompt, self.response], 1)
        return {"input_ids": ids, "attention_mask": real, "position_ids": (real.cumsum(1) - 1).clamp(min=0)}

    def shares(self, count: int, *more: Tensor):
        """Cut the rows, and other tensors of B rows, into equal runs."""
        for index in torch.arange(len(self.response)).chunk(count):
            yield Rows(*(x[index] for x in vars(self).values())), *(x[index] for x in more)


class Critic(nn.Module):
    """A trunk and a scalar head. InstructGPT's starts as the reward model; here the head starts at 0."""

    def __init__(self, trunk: nn.Module, width: int) -> None:
        super().__init__()
        self.trunk, self.head = trunk, nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.head(self.trunk(**inputs).last_hidden_state)[..., 0]


def logps(policy: nn.Module, rows: Rows) -> Tensor:
    """log pi(token | all before it) [B, T]: the logits of a position predict the token after it."""
    logits = policy(**rows.inputs()).logits[:, rows.prompt.shape[1] - 1 : -1]
    return logits.log_softmax(-1).gather(2, rows.response[..., None])[..., 0]


def values(critic: Critic, rows: Rows) -> Tensor:
    """V(all before the token) [B, T]."""
    return critic(**rows.inputs())[:, rows.prompt.shape[1] - 1 : -1]


def mean(x: Tensor, mask: Tensor) -> Tensor:
    return x[mask].sum() / mask.sum()


def advantages(rows: Rows, *, kl: float = 0.02, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Whitened advantages and returns [B, T] of a whole rollout."""
    reward = -kl * (rows.old_logp - rows.ref_logp) * rows.mask
    reward[torch.arange(len(reward)), rows.mask.sum(1) - 1] += rows.score
    value, advantage = rows.value * rows.mask, torch.zeros_like(reward)
    next_value = next_advantage = torch.zeros_like(rows.score)
    for t in reversed(range(reward.shape[1])):  # padding has reward 0 and value 0, hence advantage 0
        delta = reward[:, t] + next_value - value[:, t]
        advantage[:, t] = next_advantage = delta + lam * next_advantage
        next_value = value[:, t]
    returns = advantage + value
    centred = advantage - mean(advantage, rows.mask)
    return centred / (mean(centred**2, rows.mask) + 1e-8).sqrt() * rows.mask, returns


def policy_loss(logp: Tensor, rows: Rows, advantage: Tensor, clip: float = 0.2) -> Tensor:
    """Nothing is gained by moving a token's probability further than a factor 1 +- clip."""
    ratio = (logp - rows.old_logp).exp()
    return mean(-torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage), rows.mask)


def value_loss(value: Tensor, rows: Rows, returns: Tensor, clip: float = 0.2) -> Tensor:
    """Half the squared error, of the value or of the value kept within clip of the old one: the larger."""
    near = rows.value + (value - rows.value).clamp(-clip, clip)
    return mean(0.5 * torch.maximum((value - returns) ** 2, (near - returns) ** 2), rows.mask)


def make_optimizer(policy: nn.Module, critic: Critic, *, lr: float, value_lr: float, warmup: int):
    groups = [{"params": policy.parameters(), "lr": lr}, {"params": critic.parameters(), "lr": value_lr}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / warmup))


def update(policy, critic, optimizer, schedule, rows: Rows, advantage: Tensor, returns: Tensor) -> dict[str, float]:
    """One step of both networks on a share of a rollout."""
    losses = (
        policy_loss(logps(policy, rows), rows, advantage),
        value_loss(values(critic, rows), rows, returns),
    )
    sum(losses).backward()
    norms = [nn.utils.clip_grad_norm_(net.parameters(), 1.0) for net in (policy, critic)]
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    names = ("loss/policy", "loss/value", "norm/policy", "norm/value")
    return {name: x.item() for name, x in zip(names, (*losses, *norms), strict=True)}


@torch.no_grad()
def sample(policy, prompts: list[list[int]], score, stop: int, longest: int) -> Rows:
    """Answer each prompt once; ``score`` takes the ids before the stop token, what follows it is padding."""
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


def main(steps: int = 10, prompts: int = 32, updates: int = 2, longest: int = 24, path: Path = WEIGHTS) -> list[dict]:
    """Make ``steps`` rollouts of ``prompts`` responses and ``updates`` updates; print a line for each."""
    torch.manual_seed(0)
    policy, encode, decode, stop = load(path)
    policy.eval()  # no dropout: the policy that is trained is the one that samples
    reference = copy.deepcopy(policy).requires_grad_(False)
    critic = Critic(copy.deepcopy(policy.base_model), policy.config.hidden_size)
    training = policy, critic, *make_optimizer(policy, critic, lr=1e-3, value_lr=1e-3, warmup=4)
    words = ("tree", "apple", "sun", "green", "river", "blue", "house", "seven")
    ids = [encode(f"Repeat the word {words[i % len(words)]}.") for i in range(prompts)]
    table: list[dict] = []
    for _ in range(steps):
        rows = sample(policy, ids, lambda answer: vowels(decode(answer)), stop, longest)
        with torch.no_grad():
            old, ref = logps(policy, rows), logps(reference, rows)
            rows = replace(rows, old_logp=old, ref_logp=ref, value=values(critic, rows))
        done = [update(*training, *share) for share in rows.shares(updates, *advantages(rows))]
        kl, length = ((old - ref) * rows.mask).sum(1).mean().item(), rows.mask.sum(1).float().mean().item()
        line = {"reward": rows.score.mean().item(), "kl/response": kl, "length": length}
        table.append(line | {key: sum(d[key] for d in done) / updates for key in done[0]})
        if len(table) == 1:
            print(*(f"{name:>11}" for name in table[0]))
        print(*(f"{x:11.3f}" for x in table[-1].values()))
    return table


if __name__ == "__main__":
    main()
