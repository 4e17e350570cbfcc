"""The first losses of SFT, a reward model, DPO and PPO on the small model, and what they were computed with.

``python -m train.golden golden/losses.json`` in ``tests`` records them anew.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from posttrain.forest import Branch, Row
from posttrain.machine import deterministic_kernels
from posttrain.models.load import load_policy, new_reward
from posttrain.models.small import small_path
from posttrain.rewards.base import Score
from posttrain.train.loop import fit
from posttrain.train.objectives import PolicyGradient, Preference, RewardModel, Supervised
from posttrain.train.optim import Optim
from posttrain.train.reference import row_logp
from posttrain.train.sources import demonstration_source, ranking_source

from .tiny import metrics, rollouts, run_in, weights

START = str(small_path("instruct"))
STEPS = {"supervised": 100, "reward_model": 100, "preference": 100, "policy_gradient": 100}
VOCABULARY = 1000


def rows(responses: int) -> list[Row]:
    """Sixteen prompts of random tokens."""
    g = torch.Generator().manual_seed(responses)

    def draw(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=g))
        return torch.randint(6, VOCABULARY, (length,), generator=g).tolist()

    return [
        Row(draw(4, 12), [Branch(ids, {"loss": [True] * len(ids)}) for ids in (draw(3, 9) for _ in range(responses))])
        for _ in range(16)
    ]


def supervised() -> tuple[Any, Any, Any]:
    model = load_policy(START, dtype=torch.float32, train=True)
    return {"policy": model}, Supervised(), demonstration_source(rows(1), per_step=2, seed=1)


def reward_model() -> tuple[Any, Any, Any]:
    model = new_reward(START, dtype=torch.float32, seed=2)
    return {"reward": model}, RewardModel(), ranking_source(rows(2), [[1, 0]] * 16, per_step=2, seed=2)


def preference() -> tuple[Any, Any, Any]:
    model, data = load_policy(START, dtype=torch.float32, train=True), rows(2)
    ref = row_logp(model, data, max_tokens=512)
    return {"policy": model}, Preference(), ranking_source(data, [[0, 1]] * 16, per_step=2, seed=3, ref_logp=ref)


def policy_gradient() -> tuple[Any, Any, Any]:
    model, value = load_policy(START, dtype=torch.float32, train=True), new_reward(START, dtype=torch.float32, seed=4)
    reward = lambda completions: [Score((sum(c.ids) % 16) / 8 - len(c.ids) / 4) for c in completions]  # noqa: E731
    source = rollouts(model, load_policy(START, dtype=torch.float32), value, reward=reward)
    return {"policy": model, "value": value}, PolicyGradient(ratio_tolerance=1e-3), source


METHODS = {f.__name__: f for f in (supervised, reward_model, preference, policy_gradient)}


def losses(method: str, directory: Path) -> tuple[list[float], str]:
    """``loss/total`` of every step, and a hash of the weights after the last."""
    models, objective, source = METHODS[method]()
    run = run_in(directory, steps=STEPS[method], max_tokens=512, save_every=1000)
    fit(models, objective, source, optim=Optim(lr=1e-4, warmup_steps=4), run=run)
    digest = hashlib.sha256()
    for name, weight in sorted(weights(models).items()):
        digest.update(name.encode() + weight.numpy().tobytes())
    return [line["loss/total"] for line in metrics(directory)], digest.hexdigest()


def made_with() -> dict[str, Any]:
    """What decides the last bits."""
    from importlib.metadata import version

    return {
        "versions": {package: version(package) for package in ("torch", "transformers", "numpy")},
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def main(target: Path) -> None:
    """Compute everything and write it."""
    torch.set_num_threads(1)
    deterministic_kernels()
    found: dict[str, Any] = {"made_with": made_with(), "losses": {}, "weights": {}}
    with tempfile.TemporaryDirectory() as directory:
        for method in METHODS:
            found["losses"][method], found["weights"][method] = losses(method, Path(directory) / method)
    target.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
