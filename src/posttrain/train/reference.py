"""What a frozen reference says of the data: computed once, kept on disk, and looked at again on every use."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import posttrain
from posttrain.forest import Batch, Forest, Row, build_forest, split
from posttrain.models.lora import layers
from posttrain.models.policy import Model, forward_stats
from posttrain.train.sources import shuffled
from posttrain.types import stable_hash

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Nats a token, on average over a row, by which rounding alone may move log-probabilities between two packings."""

SHARE = 0.01
"""Of the rows, computed again whenever a kept file is used (at least one row)."""

Say = Callable[[str], None]


def row_logp(
    model: Model,
    rows: Sequence[Row],
    *,
    max_tokens: int,
    mask: str = "loss",
    stat: str = "logp",
    on_done: Callable[[int], None] | None = None,
) -> list[Tensor]:
    """``log p(y_t)`` in nats of every response token of every row, without gradient; one ``[tokens of the row]`` a row.

    Or another statistic of tokens (`posttrain.ops.token_stats`). Tokens outside ``mask`` are 0. ``on_done`` hears how many
    responses are finished.
    """
    parts = split(Batch(build_forest(rows), {}, {}, {}), max_tokens, whole_groups=False)
    found: list[Tensor] = []
    done = 0
    with torch.no_grad():
        for part in parts:
            forest = part.forest
            found.append(forward_stats(model, forest, frozenset({stat}), mask=forest.masks[mask])[stat].cpu())
            done += len(forest.end)
            if on_done is not None:
                on_done(done)
    return _by_row(torch.cat(found), rows)


def reference_logp(
    model: Model,
    rows: Sequence[Row],
    *,
    max_tokens: int,
    cache: Path,
    say: Say = print,
    mask: str = "loss",
    seed: int = 0,
    on_done: Callable[[int], None] | None = None,
) -> list[Tensor]:
    """`row_logp` of a frozen model, kept under ``cache`` by `reference_key` and what decides the last bits.

    When a file is there, `SHARE` of its rows, picked by ``seed``, are computed again; where they differ by more than
    `TOLERANCE` on average, or the file can't be read, that is said and everything is computed anew.
    """
    bits = [max_tokens, torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()]
    file = cache / f"{stable_hash([reference_key(model, build_forest(rows), mask), *bits])}.safetensors"
    if file.exists():
        problem, kept = _kept(file, model, rows, max_tokens, mask, seed)
        if kept is not None:
            return kept
        say(f"{file}: {problem}; computing the reference's log-probabilities again")
    found = row_logp(model, rows, max_tokens=max_tokens, mask=mask, on_done=on_done)
    cache.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    save_file({"logp": torch.cat(found)}, partial)
    os.replace(partial, file)
    return found


def reference_key(model: Model, forest: Forest, mask: str) -> str:
    """A hash of all that decides the log-probabilities.

    That is the weights with the role's adapter, the network's configuration, tokens with positions, mask, dtype, and the
    versions of the libraries that compute them.
    """
    digest = hashlib.sha256()
    config = {k: v for k, v in model.net.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    versions = [torch.__version__, transformers.__version__, posttrain.__version__]
    head = [type(model.net).__name__, config, str(model.net.dtype), model.plain, versions]
    digest.update(json.dumps(head, sort_keys=True, default=str).encode())
    for name, tensor in _weights(model):
        _feed(digest, name, tensor)
    for name in ("ids", "positions", "source", "target", "branch"):
        _feed(digest, name, getattr(forest, name))
    _feed(digest, "mask", forest.masks[mask])
    return digest.hexdigest()[:32]


def _weights(model: Model) -> list[tuple[str, Tensor]]:
    """Parameters by the names they have without adapters, and those of the role's adapter with its scale."""
    name, found = model.adapter, dict[str, Tensor]()
    for path, parameter in model.net.named_parameters():
        if ".lora_" not in path:
            found[path.replace(".base_layer.", ".")] = parameter
        elif name is not None and f".{name}." in path:
            found[path.replace(f".{name}.", ".")] = parameter
    for path, layer in layers(model.net).items():
        if name in layer.scaling:
            found[f"{path}.scale"] = torch.tensor(layer.scaling[name])
    return sorted(found.items())


def _feed(digest: Any, name: str, tensor: Tensor) -> None:
    """Hash a tensor's name, shape, dtype and bytes."""
    digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
    data: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    digest.update(memoryview(data))


def _kept(
    file: Path, model: Model, rows: Sequence[Row], max_tokens: int, mask: str, seed: int
) -> tuple[str, list[Tensor] | None]:
    """Read a kept file and look at some of its rows again; ``(what is wrong, None)`` if it can't be used."""
    try:
        values = load_file(file)["logp"]
    except (OSError, KeyError, SafetensorError) as error:
        return f"can't be read ({error})", None
    if len(values) != sum(len(b.ids) for row in rows for b in row.branches):
        return f"holds {len(values)} tokens, of another data set", None
    kept = _by_row(values, rows)
    picked = shuffled(len(rows), seed, 0)[: math.ceil(SHARE * len(rows))]
    again = row_logp(model, [rows[i] for i in picked], max_tokens=max_tokens, mask=mask)
    worst = float(torch.stack([(kept[i] - x).abs().mean() for i, x in zip(picked, again, strict=True)]).max())
    limit = TOLERANCE[model.net.dtype]
    if not worst <= limit:  # NaN is no agreement
        return f"{len(picked)} rows computed again differ by {worst:.1e} nats a token, more than {limit:g}", None
    return "", kept


def _by_row(values: Tensor, rows: Sequence[Row]) -> list[Tensor]:
    """Cut ``[M]`` by row."""
    return list(values.split([sum(len(b.ids) for b in row.branches) for row in rows]))
