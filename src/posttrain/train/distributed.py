"""Data parallel: every rank makes the step's whole batch and takes its own trees of it; sums are pooled, rank 0 writes.

Batches follow from keyed draws, so that all ranks hold the same one (which is checked) and know the step's counts before
any forward. What is summed over ranks was divided by those counts already, so that the number of ranks can't change a
gradient. A wait has a deadline, and says which rank waited where, and where the others were.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from posttrain.errors import CheckError
from posttrain.forest import Batch, take
from posttrain.models.policy import Model

DEADLINE = 1800.0  # seconds; a rank may make a rollout's rewards while others wait for it
BUCKET = 2**23  # gradient entries summed in one call
PER_BRANCH = frozenset({"score"})  # statistics of a response; all others are of a token


class RankError(CheckError):
    """Another rank failed, or did not come; the message says which rank waited, for what, and where the others were."""


@dataclass(frozen=True)
class Share:
    """A rank's part of a step: ``batch`` (None without trees), and where its targets ``[m]`` and branches ``[b]`` stand in the whole."""

    batch: Batch | None
    targets: Tensor
    branches: Tensor


@dataclass(frozen=True)
class World:
    """The processes that train together: this one's ``rank`` of ``size``; ``deadline`` of every wait in seconds.

    ``store`` tells ranks where the others are; None = this process is alone, and every method returns at once.
    """

    rank: int = 0
    size: int = 1
    deadline: float = DEADLINE
    store: Any = None

    @property
    def writes(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    def own(self, directory: Path) -> Path:
        """The directory if this rank writes, else one beside it that stays empty."""
        return directory if self.writes else directory.with_name(f".rank-{self.rank}")

    def share(self, batch: Batch) -> Share:
        """This rank's trees of a step, whole, so that ranks carry about the same number of tokens."""
        forest = batch.forest
        everything = Share(batch, torch.arange(len(forest.target)), torch.arange(len(forest.end)))
        if self.size == 1:
            return everything
        trees = assign([t.branches[-1][1] - t.prompt[0] for t in forest.trees], self.size)[self.rank]
        branches = torch.isin(forest.group, torch.tensor(trees, dtype=torch.long)).nonzero()[:, 0]
        targets = torch.isin(forest.branch, branches).nonzero()[:, 0]
        mine = take(batch, [(t, range(len(forest.trees[t].branches))) for t in trees]) if trees else None
        return Share(mine, targets, branches)

    def gather(self, value: Any, phase: str) -> list[Any]:
        """Every rank's JSON value, in rank order."""
        if self.size == 1:
            return [value]
        text = torch.tensor(list(json.dumps([phase, value]).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.long) for _ in range(self.size)]
        with self.waiting(phase):
            dist.all_gather(sizes, torch.tensor([len(text)]))
            longest = int(torch.stack(sizes).max())
            texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(texts, nn.functional.pad(text, (0, longest - len(text))))
        said = [json.loads(bytes(t[: int(n)].tolist())) for t, n in zip(texts, sizes, strict=True)]
        if any(place != phase for place, _ in said):
            where = ", ".join(f"rank {r} in '{place}'" for r, (place, _) in enumerate(said))
            raise RankError(f"ranks went different ways: {where}; expected all in one place")
        return [found for _, found in said]

    def agree(self, value: Any, phase: str) -> None:
        """Raise unless every rank has the same JSON value.

        Raises:
            RankError: a rank has another one, so that what they train would not be one model.
        """
        found = self.gather(value, phase)
        if any(other != found[0] for other in found):
            listed = ", ".join(f"rank {r}: {v}" for r, v in enumerate(found))
            raise RankError(
                f"{phase}: ranks differ ({listed}); expected the same on all: same machine type, threads, library versions and files"
            )

    def sum_gradients(self, models: Mapping[str, Model], phase: str) -> None:
        """Replace each gradient by its sum over ranks, in at least fp32; one that no rank has stays absent."""
        if self.size == 1:
            return
        parameters = [p for model in models.values() for p in model.parameters().values()]
        present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
        with self.waiting(phase):
            dist.all_reduce(present, op=dist.ReduceOp.MAX)
            for bucket in _buckets([p for p, on in zip(parameters, present.tolist(), strict=True) if on]):
                wide = torch.promote_types(bucket[0].dtype, torch.float32)
                flat = torch.cat(
                    [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in bucket]
                )
                flat = flat.to(wide)
                dist.all_reduce(flat)
                for p, grad in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                    p.grad = grad.view_as(p).to(p.dtype)

    def whole(self, name: str, mine: Tensor | None, share: Share, size: int, phase: str) -> Tensor:
        """A statistic of the whole step ``[size]`` from this rank's part (None without trees), in float64 where ranks are several."""
        if self.size == 1 and mine is not None:
            return mine
        full = torch.zeros(size, dtype=torch.float64)
        if mine is not None:
            full[share.branches if name in PER_BRANCH else share.targets] = mine.detach().double().cpu()
        with self.waiting(phase):
            dist.all_reduce(full)
        return full

    @contextmanager
    def waiting(self, phase: str) -> Iterator[None]:
        """Say where this rank waits; a wait that fails says so, and where the others are.

        Raises:
            RankError: the deadline passed, or another rank is gone.
        """
        if self.store is not None:
            self.store.set(f"phase/{self.rank}", phase)
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, CheckError):
                raise
            others = "; ".join(f"rank {r} {self._whereabouts(r)}" for r in range(self.size) if r != self.rank)
            raise RankError(
                f"rank {self.rank} of {self.size} waited in '{phase}' (deadline {self.deadline:g} s) and another rank did not "
                f"come: {others}"
            ) from error

    def fail(self, error: BaseException) -> None:
        """Leave the reason for the other ranks before this one goes."""
        if self.store is not None and not isinstance(error, RankError):
            self.store.set(f"error/{self.rank}", " ".join(f"{type(error).__name__}: {error}".split())[:400])

    def _whereabouts(self, rank: int) -> str:
        """What is known of another rank."""
        try:
            if self.store.check([f"error/{rank}"]):
                return f"failed with {self.store.get(f'error/{rank}').decode()}"
            if self.store.check([f"phase/{rank}"]):
                return f"was last in '{self.store.get(f'phase/{rank}').decode()}'"
        except RuntimeError:
            return "is unknown: the store is gone too"
        return "never came to a first wait"


ALONE = World()
_CURRENT = [ALONE]


def world() -> World:
    """The processes that train together; this one alone unless `start` found others."""
    return _CURRENT[0]


def start(deadline: float = DEADLINE) -> World:
    """Join the other processes that ``torchrun`` started (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT); alone without them.

    Raises:
        RankError: they did not all come in time.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if size == 1 or world().size > 1:
        return world()
    limit = timedelta(seconds=deadline)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    owned = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    stores: Any = dist
    try:
        store: Any = stores.TCPStore(host, port, None, is_master=owned, timeout=limit)
        dist.init_process_group(
            "gloo", store=stores.PrefixStore("gloo", store), rank=rank, world_size=size, timeout=limit
        )
    except RuntimeError as error:
        raise RankError(f"rank {rank} of {size} waited in 'start' for {deadline:g} s: {error}") from error
    _CURRENT[0] = World(rank, size, deadline, stores.PrefixStore("posttrain", store))
    return world()


def leave() -> None:
    """End what `start` began."""
    if world().size > 1:
        _CURRENT[0] = ALONE
        dist.destroy_process_group()


def assign(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Spread items over ranks, the dearest first, each to the rank that has least; rank 0 has one if any does."""
    loads, out = [0] * ranks, [list[int]() for _ in range(ranks)]
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min(range(ranks), key=lambda r: (loads[r], r))
        loads[rank] += costs[item]
        out[rank].append(item)
    return [sorted(items) for items in out]


def fingerprint(batch: Batch) -> str:
    """A hash of a step's ids and numbers, equal where two ranks would train on the same."""
    digest = hashlib.sha256(batch.forest.ids.numpy().tobytes())
    for columns in (batch.forest.masks, batch.tokens, batch.branches):
        for name in sorted(columns):
            digest.update(columns[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Runs of parameters of one dtype, of about `BUCKET` entries."""
    held: list[nn.Parameter] = []
    for p in parameters:
        if held and (held[0].dtype != p.dtype or sum(x.numel() for x in held) + p.numel() > BUCKET):
            yield held
            held = []
        held.append(p)
    if held:
        yield held
