"""Reward models that share one trunk: an adapter and a head each, trained one by one, kept as small directories."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from posttrain.errors import ConfigError, ModelError
from posttrain.models import lora as adapters
from posttrain.models.load import new_reward, role
from posttrain.models.policy import Model

MEMBER = "member.json"
"""The file that makes a directory a member: the base model's path, and its adapter's shape in ``adapter_config.json``."""


def new_members(path: str, *, dtype: torch.dtype, lora: adapters.Lora, seeds: Sequence[int]) -> list[Model]:
    """Start reward models on one network in memory, each with its own adapter and head by seed.

    Train them one after the other: of the parameters, a member's own are its adapter's and its head's.

    Raises:
        ConfigError: no seeds, or one twice: members of one seed are one member.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"got seeds {list(seeds)}; expected at least one, all different")
    first = new_reward(path, dtype=dtype, seed=seeds[0], lora=None)
    assert first.scalar is not None
    width = first.scalar.in_features
    first.net.requires_grad_(False)
    members: list[Model] = []
    for k, seed in enumerate(seeds):
        head = nn.Linear(width, 1, bias=False, dtype=first.scalar.weight.dtype)
        noise = torch.randn(1, width, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            head.weight.copy_(noise / (width + 1) ** 0.5)
        with _several_adapters():
            members.append(role(replace(first, scalar=head, trained=False), f"member{k}", lora=lora, seed=seed))
    return members


def save_member(model: Model, base: str, directory: Path, lora: adapters.Lora, *, mean: float = 0.0) -> None:
    """Write a member: its adapter in peft's format, its head, where its base is, and the mean to subtract (``reward.json``).

    Raises:
        ModelError: a role without an adapter or head; a whole model is saved by `posttrain.models.load.save_merged`.
    """
    if model.adapter is None or model.scalar is None:
        raise ModelError("only a role with an adapter and a scalar head is a member of a shared trunk")
    adapters.save_adapter(model.net, model.adapter, directory, base, lora)
    save_file({"score.weight": model.scalar.weight.detach().contiguous().cpu()}, directory / "head.safetensors")
    (directory / MEMBER).write_text(json.dumps({"base": base}, indent=2) + "\n")
    (directory / "reward.json").write_text(json.dumps({"mean": mean}, indent=2) + "\n")


def load_members(paths: Sequence[str], *, dtype: torch.dtype) -> list[Model]:
    """Load what `save_member` wrote; members on one base share its network in memory.

    Raises:
        ConfigError: a directory that is no member.
    """
    trunks: dict[str, Model] = {}
    found: list[Model] = []
    for k, path in enumerate(paths):
        directory = Path(path)
        if not is_member(path):
            raise ConfigError(f"no member in '{path}' (no {MEMBER}); expected a directory that save_member wrote")
        base = member_base(path)
        if base not in trunks:
            trunks[base] = replace(new_reward(base, dtype=dtype), trained=False)
            trunks[base].net.requires_grad_(False)
        shared = trunks[base]
        assert shared.scalar is not None
        with _several_adapters():
            adapters.load_adapter(shared.net, shared.trunk, f"member{k}", directory)
        head = nn.Linear(shared.scalar.in_features, 1, bias=False, dtype=shared.scalar.weight.dtype)
        with torch.no_grad():
            head.weight.copy_(load_file(directory / "head.safetensors")["score.weight"])
        found.append(replace(shared, adapter=f"member{k}", scalar=head.requires_grad_(False)))
    return found


@contextmanager
def _several_adapters() -> Iterator[None]:
    """Within, peft says nothing of a second adapter on one network: it is meant to be there."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        yield


def is_member(path: str) -> bool:
    """Whether `save_member` wrote a directory."""
    return (Path(path) / MEMBER).exists()


def member_base(path: str) -> str:
    """Where a directory's tokenizer and chat template are: its base's, or its own if it is a whole model."""
    file = Path(path) / MEMBER
    return json.loads(file.read_text())["base"] if file.exists() else path
