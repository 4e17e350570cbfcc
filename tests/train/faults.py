"""Every fault that a run is checked for, injected into a real run of the small model: what it says, and what it then does.

``python docs/faults.py`` writes the table; the test compares each message with the golden one below.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from posttrain.errors import PosttrainError
from posttrain.forest import Batch, Branch, Row, build_forest
from posttrain.models.load import load_policy, load_tokenizer
from posttrain.models.policy import Model
from posttrain.models.small import END, small_path
from posttrain.rewards.base import Score
from posttrain.rollout.engine import Rollout, Sampling
from posttrain.rollout.local import LocalEngine
from posttrain.train import diagnose, distributed
from posttrain.train.diagnose import Watch, evidence_of
from posttrain.train.distributed import RankError
from posttrain.train.loop import Run, fit
from posttrain.train.objectives import PolicyGradient, Supervised
from posttrain.train.optim import Optim
from posttrain.train.rollouts import Plan, RolloutSource
from posttrain.train.sources import DataSource
from posttrain.types import Example, Message

PROMPTS = ("Count from 3 to 6.", "Sort these words: pear fig apple.", "Add 4 and 5.", "Copy: the red cup.")


@cache
def tokenizer() -> Any:
    return load_tokenizer(str(small_path("instruct")))


@cache
def loaded() -> Model:
    return load_policy(str(small_path("instruct")), dtype=torch.float32, train=True)


def fresh(trained: bool = True) -> Model:
    """The small model, a copy of its own."""
    net = copy.deepcopy(loaded().net)
    return Model(net.requires_grad_(trained), trained=trained)


def stop() -> int:
    return tokenizer().convert_tokens_to_ids(END)


def encoded(prompt: str) -> tuple[int, ...]:
    text = tokenizer().apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    return tuple(tokenizer()(text, add_special_tokens=False).input_ids)


def by_length(completions: Any) -> list[Score]:
    return [Score(float(len(c.ids) % 5) + sum(c.ids) % 7) for c in completions]


@dataclass
class Wrapped:
    """An engine whose rollouts of later steps than ``after`` are changed."""

    engine: LocalEngine
    change: Callable[[Rollout], Rollout]
    after: int = -1

    @property
    def stop_ids(self) -> frozenset[int]:
        return self.engine.stop_ids

    def generate(self, requests: Any, sampling: Any, on_done: Any = None) -> list[Rollout]:
        found = self.engine.generate(requests, sampling)
        return [self.change(r) for r in found] if int(requests[0].key[1]) > self.after else found


def reinforce(
    directory: Path,
    *,
    policy: Model | None = None,
    reference: Model | None = None,
    reward: Any = by_length,
    engine: Callable[[LocalEngine], Any] = lambda engine: engine,
    batches: Callable[[int, Batch], Batch] | None = None,
    hooks: tuple[Any, ...] = (),
    max_kl: float | None = None,
    lr: float = 1e-5,
    steps: int = 2,
    tokens: int = 10,
    **more: Any,
) -> list[str]:
    """A run of two prompts and two responses a step; returns the lines it printed and, last, what it ended with."""
    policy, reference = policy or fresh(), reference or fresh(trained=False)
    examples = [Example(prompt=(Message(role="user", content=p),)) for p in PROMPTS]
    numbers = {"prompts": 2, "samples": 2, "updates": 1, "kl": 0.05} | more
    source: Any = RolloutSource(
        plan=Plan(sampling=Sampling(max_new_tokens=tokens), **numbers),
        examples=examples,
        prompt_ids=[encoded(p) for p in PROMPTS],
        engine=engine(LocalEngine(policy, frozenset({stop()}), slots=4)),
        reward=reward,
        reference=reference,
        value=None,
        decode=lambda ids: tokenizer().decode(ids, skip_special_tokens=True).strip(),
    )
    if batches is not None:
        source = _Changed(source, batches)
    with (watch := _watch(directory, max_kl, evidence_of(policy, reference, encoded(PROMPTS[0])))):
        return _lines(
            watch.console,
            directory,
            {"policy": policy},
            PolicyGradient(critic=False),
            source,
            lr,
            steps,
            (*hooks, watch),
        )


@dataclass
class _Changed:
    source: Any
    change: Callable[[int, Batch], Batch]

    def __call__(self, step: int) -> Batch:
        return self.change(step, self.source(step))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)


def _watch(directory: Path, max_kl: float | None, evidence: Any) -> Watch:
    return Watch(directory, Console(file=StringIO(), width=1000), max_kl, evidence)


def _lines(
    console: Any, directory: Path, models: Any, objective: Any, source: Any, lr: float, steps: int, hooks: Any
) -> list[str]:
    run = Run(directory=directory, steps=steps, max_tokens=256, save_every=1, console=console)
    said = ""
    try:
        fit(models, objective, source, optim=Optim(lr=lr), run=run, hooks=hooks)
    except PosttrainError as error:
        said = str(error)
    return [*console.file.getvalue().splitlines(), said]


def supervised(
    directory: Path, mask: Callable[[list[int]], list[bool]], *, objective: Any = None, model: Model | None = None
) -> list[str]:
    """A step on two demonstrations whose trained tokens are those of ``mask``."""
    answers = [tokenizer()(a, add_special_tokens=False).input_ids for a in ("3 4 5 6", "apple fig pear")]
    answers = [[*ids, stop()] for ids in answers]
    rows = [Row(encoded(p), [Branch(a, {"loss": mask(a)})]) for p, a in zip(PROMPTS, answers, strict=False)]
    forest = build_forest(rows)
    counts = {"tokens": max(1.0, float(forest.masks["loss"].sum())), "branches": 2.0, "prompts": 2.0}
    source = DataSource(2, 2, 0, lambda indices: Batch(forest, {}, {}, counts))
    watch = _watch(directory, None, dict)
    return _lines(
        watch.console, directory, {"policy": model or fresh()}, objective or Supervised(), source, 1e-4, 1, ()
    )


def every(ids: list[int]) -> list[bool]:
    return [True] * len(ids)


def dropout(model: Model) -> Model:
    """The same network with a tenth of its last states dropped."""
    model.net.base_model.norm = nn.Sequential(model.net.base_model.norm, nn.Dropout(0.1))
    return model


def noisy(model: Model, amount: float = 0.3) -> Model:
    """The same network with noise on its output layer."""
    g = torch.Generator().manual_seed(0)
    weight = model.net.get_output_embeddings().weight
    weight.data += amount * weight.data.std() * torch.randn(weight.shape, generator=g)
    return model


def setting(name: str, value: float) -> Callable[[int, Batch], Batch]:
    """Put a value into the first entry of a column at step 1."""

    def change(step: int, batch: Batch) -> Batch:
        if step != 1:
            return batch
        x = batch.tokens[name].clone()
        x[0] = value
        return replace(batch, tokens=batch.tokens | {name: x})

    return change


@dataclass
class Switched:
    """Another engine in the place of the first, after some step."""

    first: LocalEngine
    second: LocalEngine
    after: int = -1

    @property
    def stop_ids(self) -> frozenset[int]:
        return self.first.stop_ids

    def generate(self, requests: Any, sampling: Any, on_done: Any = None) -> list[Rollout]:
        engine = self.second if int(requests[0].key[1]) > self.after else self.first
        return engine.generate(requests, sampling)


def other_sampler(after: int) -> Callable[[LocalEngine], Any]:
    """Sample from other weights than those that are trained."""
    return lambda engine: Switched(engine, replace(engine, model=noisy(fresh(trained=False), 1.0)), after)


def changed(change: Callable[[Rollout], Rollout], after: int = -1) -> Callable[[LocalEngine], Any]:
    """Change every rollout after some step."""
    return lambda engine: Wrapped(engine, change, after)


def positive(rollout: Rollout) -> Rollout:
    return replace(rollout, logp=tuple(x + 9.0 for x in rollout.logp))


def padded(rollout: Rollout) -> Rollout:
    """Tokens after the stop token, as an engine that pads gives them."""
    ids = (*rollout.ids, stop(), 3, 3, 3, 3)
    return replace(rollout, ids=ids, logp=(*rollout.logp, -0.01, *[-0.01] * 4), stopped=True)


def ending(length: int) -> Callable[[Rollout], Rollout]:
    """Responses cut down to some tokens and a stop token."""
    return lambda r: replace(r, ids=(*r.ids[:length], stop()), logp=(*r.logp[:length], -0.01), stopped=True)


def never_stops(model: Model) -> Model:
    """A reference that gives the stop token no chance."""
    head = model.net.get_output_embeddings()
    bias = torch.zeros(head.weight.shape[0])
    bias[stop()] = -30.0
    head.bias = nn.Parameter(bias, requires_grad=False)
    return model


def at(step: int, act: Callable[[], Any]) -> tuple[Any, ...]:
    """Hooks that do something after a step."""
    return (lambda done, _: act() if done == step else None,)


def _nan_weight(directory: Path) -> list[str]:
    policy = fresh()
    weight = policy.net.base_model.layers[0].mlp.up_proj.weight
    return reinforce(directory, policy=policy, hooks=at(0, lambda: weight.data.view(-1)[:1].fill_(math.nan)))


def _nan_start(directory: Path) -> list[str]:
    model = fresh()
    model.net.base_model.layers[0].mlp.up_proj.weight.data.view(-1)[:1].fill_(math.nan)
    return supervised(directory, every, model=model)


def _dropout_later(directory: Path) -> list[str]:
    torch.manual_seed(0)  # of what is dropped; how much that moves the KL is chance
    policy = fresh()
    return reinforce(directory, policy=policy, hooks=at(0, lambda: dropout(policy)), max_kl=0.05, steps=3)


def _moved_reference(directory: Path) -> list[str]:
    reference = fresh(trained=False)
    return reinforce(directory, reference=reference, hooks=at(0, lambda: noisy(reference, 1.0)), max_kl=0.5, steps=3)


def _memory(directory: Path) -> list[str]:
    known = diagnose.free_memory
    diagnose.free_memory = lambda: 2.0**20
    try:
        return supervised(directory, every)
    finally:
        diagnose.free_memory = known


def _in_a_row(directory: Path) -> list[str]:
    return reinforce(directory, reward=lambda cs: [Score(math.nan)] * len(cs), steps=5)


def _other_batch(directory: Path) -> list[str]:
    """What two ranks would gather, without a second process."""
    world = distributed.World(0, 2)
    object.__setattr__(world, "gather", lambda value, phase: ["aaaa", "bbbb"])
    try:
        world.agree("aaaa", "batch of step 3")
    except RankError as error:
        return [str(error)]
    return []


def _one_nan(completions: Any) -> list[Score]:
    return [Score(math.nan), *by_length(completions)[1:]]


def _silent(completions: Any) -> list[Score]:
    return [Score(None)] * len(completions)


def _other_reference(step: int, batch: Batch) -> Batch:
    """Log-probabilities of a reference with the start's weights that are not the start's."""
    return replace(batch, tokens=batch.tokens | {"ref_logp": batch.tokens["ref_logp"] - 0.5})


def _constant(directory: Path) -> list[str]:
    return reinforce(directory, reward=lambda cs: [Score(1.0)] * len(cs))


def _identical(directory: Path) -> list[str]:
    first: dict[int, Rollout] = {}

    def same(r: Rollout) -> Rollout:
        seen = first.setdefault(hash((r.request.ids, r.request.key[1])), r)
        return replace(seen, request=r.request)

    return reinforce(directory, engine=lambda e: Wrapped(e, same))


def _certain(rollout: Rollout) -> Rollout:
    return replace(rollout, logp=tuple(x / 50 for x in rollout.logp))


@dataclass(frozen=True)
class Fault:
    """``inject`` makes it happen and returns what was said; ``line`` finds the message in it, ``does`` is what the run then does."""

    name: str
    does: str
    line: str
    inject: Callable[[Path], list[str]]

    def message(self, directory: Path) -> str:
        """The message, with every number as ``#``."""
        found = [text for text in self.inject(directory) if re.search(self.line, text)]
        assert found, f"{self.name}: nothing was said"
        return plain(found[-1], directory)


def plain(text: str, directory: Path) -> str:
    """The text with numbers as ``#`` and the run's directory as ``RUN``."""
    text = re.sub(r" for (['\"]).*?\1;", " for '...';", text.replace(str(directory), "RUN"))
    return re.sub(r"(?<![\w/])[+-]?(\d+\.?\d*(e[+-]?\d+)?|nan|inf)%?(?![\w/])", "#", text)


SKIP, REFUSE, STOP, SAY = "skips the step", "refuses to start", "stops", "says so once"
FIRST, CAUSE = "a check of the first step failed", "KL to the reference is"

FAULTS = [
    Fault("a weight is NaN", SKIP, "is skipped", _nan_weight),
    Fault("an advantage is NaN", SKIP, "is skipped", lambda d: reinforce(d, batches=setting("advantage", math.nan))),
    Fault(
        "a log-probability is infinite",
        SKIP,
        "is skipped",
        lambda d: reinforce(d, batches=setting("old_logp", -math.inf)),
    ),
    Fault("the gradient overflows", SKIP, "is skipped", lambda d: reinforce(d, batches=setting("advantage", 3e38))),
    Fault("the reward gives NaN", SKIP, "is skipped", lambda d: reinforce(d, reward=_one_nan, steps=1)),
    Fault("three steps in a row are skipped", STOP, "in a row", _in_a_row),
    Fault(
        "the reward gives too few scores",
        STOP,
        "scores for",
        lambda d: reinforce(d, reward=lambda cs: by_length(cs)[:-1]),
    ),
    Fault("the reward abstains on everything", STOP, "abstained", lambda d: reinforce(d, reward=_silent)),
    Fault(
        "the sampler gives positive log-probabilities",
        STOP,
        "at most 0",
        lambda d: reinforce(d, engine=changed(positive)),
    ),
    Fault("sampler and trainer differ at the start", REFUSE, FIRST, lambda d: reinforce(d, engine=other_sampler(-1))),
    Fault("a weight is NaN at the start", REFUSE, FIRST, _nan_start),
    Fault("dropout is on at the start", REFUSE, FIRST, lambda d: supervised(d, every, model=dropout(fresh()))),
    Fault("the reference is not what its weights say", REFUSE, FIRST, lambda d: reinforce(d, batches=_other_reference)),
    Fault("no token is trained", REFUSE, FIRST, lambda d: supervised(d, lambda ids: [False] * len(ids))),
    Fault(
        "the stop token is not trained", REFUSE, FIRST, lambda d: supervised(d, lambda ids: [*every(ids[1:]), False])
    ),
    Fault("memory will not suffice", REFUSE, FIRST, _memory),
    Fault("KL: dropout is on", STOP, CAUSE, _dropout_later),
    Fault(
        "KL: padding is counted", STOP, CAUSE, lambda d: reinforce(d, engine=changed(padded, 0), max_kl=0.5, steps=3)
    ),
    Fault(
        "KL: sampler and trainer differ",
        STOP,
        CAUSE,
        lambda d: reinforce(d, engine=other_sampler(0), max_kl=0.5, steps=3),
    ),
    Fault("KL: the reference moved", STOP, CAUSE, _moved_reference),
    Fault(
        "KL: the reference is stale",
        STOP,
        CAUSE,
        lambda d: reinforce(d, reference=noisy(fresh(False), 2.0), max_kl=0.5),
    ),
    Fault(
        "KL: the reference never stops",
        STOP,
        CAUSE,
        lambda d: reinforce(d, reference=never_stops(fresh(False)), max_kl=3.0),
    ),
    Fault(
        "KL: the learning rate is too high",
        STOP,
        CAUSE,
        lambda d: reinforce(d, lr=3e-2, max_kl=0.5, steps=4, updates=2),
    ),
    Fault("all responses to a prompt get one reward", SAY, "teaches nothing", _constant),
    Fault("all responses to a prompt are the same", SAY, "teaches nothing", _identical),
    Fault("most responses are cut", SAY, "were cut", lambda d: reinforce(d, tokens=2)),
    Fault(
        "responses become short", SAY, "responses fell", lambda d: reinforce(d, engine=changed(ending(0), 1), steps=3)
    ),
    Fault("entropy collapses", SAY, "entropy fell", lambda d: reinforce(d, engine=changed(_certain, 1), steps=3)),
    Fault("ranks have different batches", STOP, "ranks differ", _other_batch),
]


def table(messages: dict[str, str]) -> str:
    """The page ``docs/faults.md``."""
    rows = [f"| {f.name} | {f.does} | {messages[f.name].replace('|', chr(92) + '|')} |" for f in FAULTS]
    return "\n".join([HEAD, "| fault | the run | message |", "|---|---|---|", *rows, ""])


HEAD = """# Faults that a run is checked for

Each was put into a real run of the small model; the message is what the run said, with numbers as `#` and the run's
directory as `RUN`. A skipped step leaves weights, masters and moments as they were and counts in the metric
`step/skipped`; the learning-rate schedule, the data and the draws go by the step's number all the same.
`posttrain replay RUN/STAGE/faults/step-N` computes a skipped step again and names the first thing that is not finite.

This page is made by `python docs/faults.py`.
"""
