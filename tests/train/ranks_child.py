"""Pairs of processes that train together, forked from one that has imported the libraries.

``python -m train.ranks_child DIR MODE ...`` in ``tests``:

Each mode writes ``DIR/MODE-RANK.json`` (how the rank ended) and, where there is something to compare, tensors.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from posttrain.forest import take
from posttrain.train import distributed
from posttrain.train.loop import fit
from posttrain.train.objectives import PolicyGradient, Supervised
from posttrain.train.optim import Optim
from posttrain.train.signals import Terminated, sigterm_interrupts
from posttrain.train.sources import demonstration_source

from .cases import gradients, make, names, taken
from .tiny import metrics, random_rows, role, rollouts, run_in, score, weights

OPTIM = Optim(lr=0.01, role_lr={"value": 0.02}, warmup_steps=2, weight_decay=0.1)


def all_gradients(directory: Path, rank: int):
    """Gradients of every case, and of one whose only prompt leaves a rank without a tree."""
    out, numbers = {}, {}
    for name in names():
        models, objective, batch = make(name)
        for label, step in ((name, batch), (f"{name}, one prompt", take(batch, [(3, range(4))]))):
            share = distributed.world().share(step)
            found, _, parts = gradients_kept(models, objective, step, share)
            distributed.world().sum_gradients(models, label)
            pooled = distributed.world().gather(found, label)
            numbers[label] = [pooled, parts]
            out |= {f"{label}/{key}": grad for key, grad in taken(models).items()}
    save_file(out, directory / f"gradients-{rank}.safetensors")
    (directory / f"numbers-{rank}.json").write_text(json.dumps(numbers))


def gradients_kept(models, objective, batch, share):
    """As `cases.gradients`, leaving the gradients on the parameters."""
    found, grads, parts = gradients(models, objective, batch, 30, share)
    for name, model in models.items():
        for key, parameter in model.parameters().items():
            parameter.grad = grads.get(f"{name}/{key}")
    return found, grads, parts


def supervised(directory: Path, rank: int, dtype=torch.float64):
    """Seven steps of which the last of an epoch has one row only."""
    models = {"policy": role(0, dtype=dtype)}
    source = demonstration_source(
        random_rows(1, [(3, [4]), (2, [6]), (5, [3]), (4, [2, 3]), (2, [2])]), per_step=2, seed=7
    )
    fit(models, Supervised(), source, optim=OPTIM, run=run_in(directory / f"supervised-{rank}", steps=7))
    return models


def narrow(directory: Path, rank: int, max_tokens: int = 8):
    """Forty steps in fp32, each of two trees that are no micro-batch together."""
    models = {"policy": role(0, dtype=torch.float32)}
    rows = random_rows(1, [(3, [4]), (2, [6]), (5, [3]), (4, [2]), (2, [2]), (1, [6])])
    source = demonstration_source(rows, per_step=2, seed=7)
    run = run_in(directory / f"narrow-{rank}", steps=40, max_tokens=max_tokens)
    fit(models, Supervised(), source, optim=OPTIM, run=run)
    return models


def reinforce(directory: Path, rank: int):
    """Two rollouts of two updates."""
    models = {"policy": role(0), "value": role(1, scalar=True)}
    source = rollouts(models["policy"], role(0, trained=False), models["value"])
    fit(models, PolicyGradient(), source, optim=OPTIM, run=run_in(directory / f"reinforce-{rank}", steps=4))
    return models


def apart(directory: Path, rank: int):
    """Rank 1's reward is another one, so that ranks would train on different batches."""
    models = {"policy": role(0), "value": role(1, scalar=True)}
    reward = score if rank == 0 else lambda completions: score(completions)[::-1]
    source = rollouts(models["policy"], role(0, trained=False), models["value"], reward=reward)
    fit(models, PolicyGradient(), source, optim=OPTIM, run=run_in(directory / f"apart-{rank}", steps=4))


class Interrupted:
    """A source that does something at step 2 on rank 1."""

    def __init__(self, source, rank, act):
        self.source, self.rank, self.act = source, rank, act

    def __call__(self, step):
        if step == 2 and self.rank == 1:
            self.act()
        return self.source(step)

    def __getattr__(self, name):
        return getattr(self.source, name)


def raises():
    raise ValueError("no disk under the data")


def interrupted(directory: Path, rank: int, name: str, act):
    source = Interrupted(demonstration_source(random_rows(1, [(3, [4]), (2, [6])]), per_step=2, seed=7), rank, act)
    run = run_in(directory / f"{name}-{rank}", steps=4)
    fit({"policy": role(0)}, Supervised(), source, optim=OPTIM, run=run)


def poisoned(directory: Path, rank: int):
    """A number that is not finite, in rank 1's share alone."""
    models = {"policy": role(0)}
    source = demonstration_source(random_rows(1, [(9, [9]), (2, [6])]), per_step=2, seed=7)

    def batch(step):
        found = source(step)
        if step == 1:
            tree = distributed.assign([t.branches[-1][1] - t.prompt[0] for t in found.forest.trees], 2)[1][0]
            weight = torch.ones(2, dtype=torch.float64)
            weight[tree] = float("nan")
            found.branches["weight"] = weight
        return found

    wrapped = Interrupted(source, 0, None)
    wrapped.source = type(
        "Poisoned", (), {"__call__": lambda self, step: batch(step), "__getattr__": lambda self, n: getattr(source, n)}
    )()
    fit(models, Supervised(), wrapped, optim=OPTIM, run=run_in(directory / f"poisoned-{rank}", steps=3))
    return models


def stopped(directory: Path, rank: int):
    """Rank 1 alone is asked to stop, at step 1."""

    def hook(step, _):
        if step == 1 and rank == 1:
            signal.raise_signal(signal.SIGTERM)

    source = demonstration_source(random_rows(1, [(3, [4]), (2, [6])]), per_step=2, seed=7)
    run = run_in(directory / f"stopped-{rank}", steps=4)
    try:
        with sigterm_interrupts():
            fit({"policy": role(0)}, Supervised(), source, optim=OPTIM, run=run, hooks=[hook])
    except Terminated as error:
        raise RuntimeError("terminated") from error


MODES = {
    "stopped": (stopped, 20.0),
    "gradients": (all_gradients, 60.0),
    "supervised": (supervised, 60.0),
    "narrow": (narrow, 60.0),
    "reinforce": (reinforce, 60.0),
    "poisoned": (poisoned, 60.0),
    "apart": (apart, 20.0),
    "raises": (lambda d, r: interrupted(d, r, "raises", raises), 20.0),
    "hangs": (lambda d, r: interrupted(d, r, "hangs", lambda: time.sleep(8)), 2.0),
    "absent": (lambda d, r: None, 2.0),
}


def main(directory: Path, mode: str, rank: int) -> None:
    """One rank of one mode."""
    work, deadline = MODES[mode]
    began, said = time.monotonic(), "done"
    try:
        if mode == "absent" and rank == 1:
            return
        world = distributed.start(deadline)
        began = time.monotonic()
        try:
            models = work(directory, rank)
        except Exception as error:
            world.fail(error)
            raise
        if models:
            save_file({k: v.contiguous() for k, v in weights(models).items()}, directory / f"{mode}-{rank}.safetensors")
            (directory / f"{mode}-{rank}-metrics.json").write_text(json.dumps(metrics(directory / f"{mode}-{rank}")))
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    (directory / f"{mode}-{rank}.json").write_text(json.dumps({"said": said, "seconds": time.monotonic() - began}))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for mode in sys.argv[2:]:
        port, children = free_port(), []
        for rank in range(2):
            child = os.fork()
            if child == 0:
                os.environ |= {
                    "RANK": str(rank),
                    "WORLD_SIZE": "2",
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
                try:
                    main(Path(sys.argv[1]), mode, rank)
                finally:
                    os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
