"""The layout of a forest by hand, and that micro-batches partition a step."""

from __future__ import annotations

import random

import pytest
import torch

from posttrain.errors import DataError
from posttrain.forest import Batch, Branch, Row, Tree, build_forest, split, take


def branch(*ids, truncated=False, loss=None):
    return Branch(ids, {"loss": [True] * len(ids) if loss is None else loss}, truncated)


ROWS = [
    Row([1, 2, 3], [branch(4, 5, loss=[False, True]), branch(6, truncated=True)]),
    Row([7], [branch(8, 9)]),
]


def test_layout_by_hand():
    f = build_forest(ROWS)
    assert f.ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert f.positions.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 2]
    assert f.trees == (Tree((0, 3), ((3, 5), (5, 6))), Tree((6, 7), ((7, 9),)))
    assert f.source.tolist() == [2, 3, 2, 6, 7]
    assert f.target.tolist() == [4, 5, 6, 8, 9]
    assert f.branch.tolist() == [0, 0, 1, 2, 2] and f.lengths.tolist() == [2, 1, 2]
    assert f.masks["loss"].tolist() == [False, True, True, True, True]
    assert f.end.tolist() == [4, 5, 8] and f.group.tolist() == [0, 0, 1]
    assert f.truncated.tolist() == [False, True, False]
    moved = f.to("cpu")
    assert moved.trees == f.trees and all(torch.equal(moved.masks[k], f.masks[k]) for k in f.masks)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Row([], [branch(1)]), "batch row 1: the prompt has no tokens"),
        (Row([1], []), "batch row 1: no responses; every tree needs at least one branch"),
        (Row([1], [branch(2), branch()]), "batch row 1, response 1: no tokens"),
        (Row([1], [branch(2, 3, loss=[True])]), "batch row 1, response 0: mask 'loss' has 1 entries, expected 2"),
        (Row([1], [Branch([2], {})]), "batch row 1, response 0: mask 'loss' has no entries, expected 1"),
    ],
)
def test_rows_that_cannot_be_packed_are_named(row, message):
    with pytest.raises(DataError) as caught:
        build_forest([ROWS[0], row])
    assert message in str(caught.value)


def tagged(rows):
    """A batch whose token and branch tensors number targets and branches."""
    forest = build_forest(rows)
    return Batch(
        forest,
        {"tag": torch.arange(len(forest.target))},
        {"tag": torch.arange(len(forest.end))},
        {"tokens": 17.0, "prompts": 3.0},
    )


def test_take_by_hand():
    part = take(tagged(ROWS), [(1, [0]), (0, [1])])
    assert part.forest.ids.tolist() == [7, 8, 9, 1, 2, 3, 6]
    assert part.tokens["tag"].tolist() == [3, 4, 2] and part.branches["tag"].tolist() == [2, 1]
    assert part.forest.truncated.tolist() == [False, True] and part.forest.group.tolist() == [0, 1]
    assert part.counts == {"tokens": 17.0, "prompts": 3.0}


def test_split_by_hand():
    sizes = lambda limit, whole: [p.forest.ids.tolist() for p in split(tagged(ROWS), limit, whole)]  # noqa: E731
    assert sizes(9, False) == [[1, 2, 3, 4, 5, 6, 7, 8, 9]]
    assert sizes(8, False) == [[1, 2, 3, 4, 5, 6], [7, 8, 9]]
    assert sizes(5, False) == [[1, 2, 3, 4, 5], [1, 2, 3, 6], [7, 8, 9]]  # the prompt is computed twice
    assert sizes(5, True) == [[1, 2, 3, 4, 5, 6], [7, 8, 9]]  # a whole group over the limit stands alone
    assert sizes(1, False) == [[1, 2, 3, 4, 5], [1, 2, 3, 6], [7, 8, 9]]
    wide = tagged([Row([1, 2], [branch(3), branch(4), branch(5)]), Row([6], [branch(7)])])
    assert [p.forest.ids.tolist() for p in split(wide, 4, False)] == [[1, 2, 3, 4], [1, 2, 5], [6, 7]]
    assert [p.forest.ids.tolist() for p in split(wide, 5, False)] == [[1, 2, 3, 4, 5], [6, 7]]


@pytest.mark.parametrize("whole", [False, True])
def test_micro_batches_partition_a_step(whole):
    rng = random.Random(4)
    for _ in range(40):
        rows = [
            Row(
                [rng.randrange(90) for _ in range(rng.randint(1, 6))],
                [
                    branch(*(rng.randrange(90) for _ in range(rng.randint(1, 7))), truncated=rng.random() < 0.5)
                    for _ in range(rng.randint(1, 4))
                ],
            )
            for _ in range(rng.randint(1, 6))
        ]
        batch, limit = tagged(rows), rng.randint(1, 40)
        parts = split(batch, limit, whole)
        # every branch and every target once, in order, with all that belongs to it
        assert torch.cat([p.branches["tag"] for p in parts]).tolist() == list(range(len(batch.forest.end)))
        assert torch.cat([p.tokens["tag"] for p in parts]).tolist() == list(range(len(batch.forest.target)))
        for name in ("target", "truncated"):
            joined = torch.cat([getattr(p.forest, name) for p in parts])
            assert torch.equal(joined, getattr(batch.forest, name))
        assert all(p.counts == batch.counts for p in parts)
        homes: dict[int, list[int]] = {}
        for index, part in enumerate(parts):
            group = batch.forest.group[part.branches["tag"]].tolist()
            for tree in dict.fromkeys(group):
                homes.setdefault(tree, []).append(index)
            assert len(part.forest.trees) == len(set(group))
            alone = len(set(group)) == 1 if whole else len(group) == 1
            assert len(part.forest.ids) <= limit or alone
        for tree, where in homes.items():
            size = len(rows[tree].prompt) + sum(len(b.ids) for b in rows[tree].branches)
            assert len(where) == 1 or (not whole and size > limit)
