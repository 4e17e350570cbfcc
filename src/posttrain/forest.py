"""A batch is a forest: each prompt once, then its responses as branches, packed without padding.

Shapes: N packed tokens, B branches (responses), M targets (tokens of branches, all of which a loss may read).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from posttrain.errors import DataError


class Branch(NamedTuple):
    """One response as ids, before packing: ``masks[name][i]`` says whether token i counts under that mask."""

    ids: Sequence[int]
    masks: Mapping[str, Sequence[bool]]
    truncated: bool = False


class Row(NamedTuple):
    """One prompt (at least one token) and its branches, before packing."""

    prompt: Sequence[int]
    branches: Sequence[Branch]


class Tree(NamedTuple):
    """Spans ``(start, end)`` in the packed stream: the prompt's, then one for each branch."""

    prompt: tuple[int, int]
    branches: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Forest:
    """Packed trees. Every token of a branch is a target, in branch order, so M = total branch length.

    Attributes:
        ids, positions: ``[N]``; each branch's positions restart at its prompt's length.
        trees: spans of prompt and branches.
        source: ``[M]`` index in N of the state that predicts target m (the prompt's last state serves every branch).
        target: ``[M]`` the predicted token.
        branch: ``[M]`` which of the B branches.
        masks: name to ``[M]`` bool; a loss names the mask it reads.
        end: ``[B]`` index in N of the branch's last token (reward models score there).
        group: ``[B]`` index of the tree.
        truncated: ``[B]`` bool, ended by length and not by a stop token.
    """

    ids: Tensor
    positions: Tensor
    trees: tuple[Tree, ...]
    source: Tensor
    target: Tensor
    branch: Tensor
    masks: dict[str, Tensor]
    end: Tensor
    group: Tensor
    truncated: Tensor

    @property
    def lengths(self) -> Tensor:
        """``[B]`` tokens in each branch."""
        return torch.bincount(self.branch, minlength=len(self.end))

    def to(self, device: torch.device | str) -> Forest:
        """Return the same forest on another device."""
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved, masks={k: v.to(device) for k, v in self.masks.items()})


def build_forest(rows: Sequence[Row]) -> Forest:
    """Pack rows into a forest.

    Raises:
        DataError: a row with an empty prompt, no branch, an empty branch, or a mask of another length.
    """
    ids: list[int] = []
    positions: list[int] = []
    trees: list[Tree] = []
    source: list[int] = []
    target: list[int] = []
    branch_of: list[int] = []
    end: list[int] = []
    group: list[int] = []
    truncated: list[bool] = []
    names = sorted({name for row in rows for b in row.branches for name in b.masks})
    masks: dict[str, list[bool]] = {name: [] for name in names}
    for index, row in enumerate(rows):
        _check_row(index, row, names)
        start, prompt_end = len(ids), len(ids) + len(row.prompt)
        ids.extend(row.prompt)
        positions.extend(range(len(row.prompt)))
        spans: list[tuple[int, int]] = []
        for branch in row.branches:
            begin, length = len(ids), len(branch.ids)
            spans.append((begin, begin + length))
            ids.extend(branch.ids)
            positions.extend(range(len(row.prompt), len(row.prompt) + length))
            source.extend([prompt_end - 1, *range(begin, begin + length - 1)])
            target.extend(branch.ids)
            branch_of.extend([len(end)] * length)
            for name in names:
                masks[name].extend(branch.masks[name])
            end.append(begin + length - 1)
            group.append(index)
            truncated.append(branch.truncated)
        trees.append(Tree((start, prompt_end), tuple(spans)))
    return Forest(
        ids=_long(ids),
        positions=_long(positions),
        trees=tuple(trees),
        source=_long(source),
        target=_long(target),
        branch=_long(branch_of),
        masks={name: torch.tensor(values, dtype=torch.bool) for name, values in masks.items()},
        end=_long(end),
        group=_long(group),
        truncated=torch.tensor(truncated, dtype=torch.bool),
    )


def _long(values: Sequence[int]) -> Tensor:
    """Integers as an int64 tensor."""
    return torch.tensor(values, dtype=torch.long)


def _ids(tensor: Tensor) -> list[Any]:
    """A 1-d tensor as a list."""
    return cast("list[Any]", tensor.tolist())  # pyright: ignore[reportUnknownMemberType]


def _check_row(index: int, row: Row, names: Sequence[str]) -> None:
    """Refuse rows that can't be packed; the message counts rows from 0 as the caller's list does."""
    if not row.prompt:
        raise DataError(
            f"batch row {index}: the prompt has no tokens; a first response token needs one to be predicted from"
        )
    if not row.branches:
        raise DataError(f"batch row {index}: no responses; every tree needs at least one branch")
    for k, branch in enumerate(row.branches):
        if not branch.ids:
            raise DataError(f"batch row {index}, response {k}: no tokens; drop it or give it at least a stop token")
        for name in names:
            if name not in branch.masks or len(branch.masks[name]) != len(branch.ids):
                got = len(branch.masks[name]) if name in branch.masks else "no"
                raise DataError(
                    f"batch row {index}, response {k}: mask '{name}' has {got} entries, expected {len(branch.ids)} (one a token)"
                )


@dataclass(frozen=True)
class Batch:
    """One optimiser step, all its micro-batches.

    Attributes:
        forest: the tokens.
        tokens: name to ``[M]`` (old_logp, ref_logp, advantage, return ...).
        branches: name to ``[B]`` (reward, rank ...).
        counts: unit to how many of it the whole step holds (tokens, branches, pairs, prompts ...), known before any
            forward; the loss of a term is its sum over the step divided by its count, and nobody else divides.
    """

    forest: Forest
    tokens: dict[str, Tensor]
    branches: dict[str, Tensor]
    counts: dict[str, float]


def take(batch: Batch, groups: Sequence[tuple[int, Sequence[int]]]) -> Batch:
    """Return the micro-batch of the given ``(tree, branches of that tree)``; counts stay those of the whole step."""
    old = batch.forest
    target_index: list[Tensor] = []
    branch_index: list[int] = []
    rows: list[Row] = []
    first = torch.zeros(len(old.trees) + 1, dtype=torch.long)
    first[1:] = torch.tensor([len(t.branches) for t in old.trees]).cumsum(0)
    offset = torch.zeros(len(old.end) + 1, dtype=torch.long)
    offset[1:] = old.lengths.cumsum(0)
    for tree, members in groups:
        (start, stop) = old.trees[tree].prompt
        branches: list[Branch] = []
        for member in members:
            b = int(first[tree]) + member
            span = slice(int(offset[b]), int(offset[b + 1]))
            target_index.append(torch.arange(span.start, span.stop))
            branch_index.append(b)
            masks = {name: _ids(mask[span]) for name, mask in old.masks.items()}
            branches.append(Branch(_ids(old.target[span]), masks, bool(old.truncated[b])))
        rows.append(Row(_ids(old.ids[start:stop]), branches))
    m, b = torch.cat(target_index), torch.tensor(branch_index)
    return replace(
        batch,
        forest=build_forest(rows),
        tokens={k: v[m] for k, v in batch.tokens.items()},
        branches={k: v[b] for k, v in batch.branches.items()},
    )


def split(batch: Batch, max_tokens: int, whole_groups: bool) -> list[Batch]:
    """Cut a step into micro-batches of at most ``max_tokens`` packed tokens each, in row order.

    A tree larger than that is split by branch and its prompt recomputed, unless ``whole_groups`` (a loss that compares
    the responses of one prompt); a single branch or whole group over the limit stands alone.
    """
    parts: list[list[tuple[int, list[int]]]] = []
    size = 0
    for tree, spans in enumerate(batch.forest.trees):
        prompt = spans.prompt[1] - spans.prompt[0]
        lengths = [e - s for s, e in spans.branches]
        atoms = [list(range(len(lengths)))]
        if not whole_groups and prompt + sum(lengths) > max_tokens:
            atoms = [[k] for k in range(len(lengths))]
        for members in atoms:
            cost = sum(lengths[k] for k in members)
            joins = bool(parts) and parts[-1][-1][0] == tree and size + cost <= max_tokens
            if joins:
                parts[-1][-1][1].extend(members)
                size += cost
            elif parts and size + prompt + cost <= max_tokens and parts[-1][-1][0] != tree:
                parts[-1].append((tree, members))
                size += prompt + cost
            else:
                parts.append([(tree, members)])
                size = prompt + cost
    return [take(batch, part) for part in parts]


def join(one: Batch, two: Batch) -> Batch:
    """Both in one step, the trees of ``one`` first; where one has no such mask or column, it is false or 0.

    Raises:
        DataError: both count one unit, so that neither's losses could be divided by it.
    """
    if shared := sorted(one.counts.keys() & two.counts.keys()):
        raise DataError(f"two batches both count {', '.join(shared)}; give the second's terms units of their own")
    a, b = one.forest, two.forest
    n, m = len(a.ids), len(a.end)
    moved = [
        Tree((t.prompt[0] + n, t.prompt[1] + n), tuple((start + n, end + n) for start, end in t.branches))
        for t in b.trees
    ]
    forest = Forest(
        ids=torch.cat([a.ids, b.ids]),
        positions=torch.cat([a.positions, b.positions]),
        trees=(*a.trees, *moved),
        source=torch.cat([a.source, b.source + n]),
        target=torch.cat([a.target, b.target]),
        branch=torch.cat([a.branch, b.branch + m]),
        masks=_columns(a.masks, b.masks, len(a.target), len(b.target)),
        end=torch.cat([a.end, b.end + n]),
        group=torch.cat([a.group, b.group + len(a.trees)]),
        truncated=torch.cat([a.truncated, b.truncated]),
    )
    tokens = _columns(one.tokens, two.tokens, len(a.target), len(b.target))
    return Batch(forest, tokens, _columns(one.branches, two.branches, m, len(b.end)), one.counts | two.counts)


def _columns(one: Mapping[str, Tensor], two: Mapping[str, Tensor], first: int, second: int) -> dict[str, Tensor]:
    """Columns of both, of ``first`` and ``second`` entries, one after the other; 0 where one has none."""
    out: dict[str, Tensor] = {}
    for name in [*one, *(k for k in two if k not in one)]:
        like = one[name] if name in one else two[name]
        parts = [x[name] if name in x else like.new_zeros(k, *like.shape[1:]) for x, k in ((one, first), (two, second))]
        out[name] = torch.cat(parts)
    return out
