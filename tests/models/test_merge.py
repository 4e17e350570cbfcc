"""Merging: numbers worked out by hand from the papers, and identities."""

from __future__ import annotations

import pytest
import torch

from posttrain.errors import ConfigError, ModelError
from posttrain.models.merge import kth_largest, merge_states, merges

ROOT_HALF = 0.5**0.5


def states(*rows, name="w"):
    return [{name: torch.tensor(row, dtype=torch.float32)} for row in rows]


def near(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype), atol=1e-6, rtol=0)


def random_states(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = {"a": (7, 5), "b": (11,), "c": (3, 4)}
    return [{k: torch.randn(s, generator=g) for k, s in shapes.items()} for _ in range(count)]


def same(one, two, **tolerance):
    assert list(one) == list(two)
    for name in one:
        if tolerance:
            torch.testing.assert_close(one[name], two[name], **tolerance)
        else:
            assert torch.equal(one[name], two[name]), name


def test_average():
    near(merge_states("average", states([1.0, 2.0], [3.0, -2.0]), weights=(0.25, 0.75))["w"], [2.5, -1.0])


def test_moving_average():
    """With d the decay, m <- d m + (1 - d) x: 0.99 * 1 + 0.01 * 2; then with 1/2: 0, 1, 2.5."""
    near(merge_states("ema", states([1.0], [2.0]))["w"], [1.01])
    near(merge_states("ema", states([0.0], [2.0], [4.0]), rate=0.5)["w"], [2.5])


@pytest.mark.parametrize(
    ("one", "two", "share", "expected"),
    [
        ([1.0, 0.0], [0.0, 1.0], 0.5, [ROOT_HALF, ROOT_HALF]),
        ([2.0, 0.0], [0.0, 1.0], 0.25, [1.8477591, 0.3826834]),  # 2 sin 67.5°, sin 22.5°; lengths are not made equal
        ([1.0, 0.0], [0.5, 0.8660254], 0.5, [0.8660254, 0.5]),  # 60° apart: both times sin 30° / sin 60°
        ([1.0, 0.0], [3.0, 0.0], 0.5, [2.0, 0.0]),  # no angle: a straight line
        ([1.0, 0.0], [-1.0, 0.0], 0.25, [0.5, 0.0]),
        ([0.0, 0.0], [3.0, 0.0], 0.5, [1.5, 0.0]),
    ],
)
def test_spherical_interpolation_of_task_vectors(one, two, share, expected):
    base = {"w": torch.tensor([10.0, -20.0])}
    parts = [{"w": base["w"] + torch.tensor(x)} for x in (one, two)]
    found = merge_states("slerp", parts, base=base, weights=(1 - share, share))["w"]
    torch.testing.assert_close(found - base["w"], torch.tensor(expected), atol=3e-6, rtol=0)


def test_three_models_are_taken_in_one_after_the_other():
    """Orthogonal unit vectors: half way between two, then a third of the way to the third, at 90°: cos 30°, sin 30°."""
    base = {"w": torch.zeros(3)}
    parts = states([1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0])
    near(merge_states("slerp", parts, base=base)["w"], [0.8660254 * ROOT_HALF, 0.8660254 * ROOT_HALF, 0.5])


def test_warp_goes_part_of_the_way_from_the_start():
    base = {"w": torch.ones(2)}
    near(merge_states("warp", states([2.0, 1.0], [1.0, 2.0]), base=base)["w"], [1 + 0.3 * ROOT_HALF] * 2)
    near(merge_states("warp", states([2.0, 1.0], [1.0, 2.0]), base=base, eta=1.0)["w"], [1 + ROOT_HALF] * 2)


def test_ties():
    """Half of 4 entries stay: (4, -3), (-2, 3), (-3, -2.5); signs +, -, -, +; means of those that agree 4, -2.5, -2.5, 3."""
    deltas = [[4, -3, 0.2, 0.5], [-1, -2, 0.3, 3], [-3, 0.1, -2.5, 0.4]]
    base = {"a": torch.ones(2), "b": torch.ones(2)}
    parts = [
        {"a": 1 + torch.tensor(d[:2], dtype=torch.float32), "b": 1 + torch.tensor(d[2:], dtype=torch.float32)}
        for d in deltas
    ]
    found = merge_states("ties", parts, base=base, density=0.5)
    near(found["a"], [5.0, -1.5])
    near(found["b"], [-1.5, 4.0])  # of the first model nothing stays here: the trim is over the whole model
    found = merge_states("ties", parts, base=base, density=0.5, scale=0.5)
    near(torch.cat([found["a"], found["b"]]), [3.0, -0.25, -0.25, 2.5])
    weighted = merge_states("ties", parts, base=base, density=0.5, weights=(0.2, 0.2, 0.6))
    near(torch.cat([weighted["a"], weighted["b"]]), [-2.0, -1.5, -1.5, 4.0])  # 0.8 against 1.8: the sign turns


def test_ties_where_signs_cancel_nothing_moves():
    base = {"w": torch.zeros(2)}
    near(merge_states("ties", states([1.0, 2.0], [-1.0, 4.0]), base=base, density=1.0)["w"], [0.0, 3.0])


def test_dare():
    """What stays is divided by the share that stays; in the mean nothing is lost; each model and tensor has its own draws."""
    base = {"w": torch.zeros(40_000), "v": torch.zeros(40_000)}
    parts = [{k: torch.ones(40_000) for k in base} for _ in range(2)]
    found = merge_states("dare", parts[:1], base=base, drop=0.75)
    assert set(found["w"].tolist()) == {0.0, 4.0}
    assert float(found["w"].mean()) == pytest.approx(1.0, abs=0.04)  # 4 standard errors
    assert not torch.equal(found["w"], found["v"])
    two = merge_states("dare", parts, base=base, drop=0.75)
    assert set(two["w"].tolist()) == {0.0, 2.0, 4.0}
    same(found, merge_states("dare", parts[:1], base=base, drop=0.75))
    assert not torch.equal(found["w"], merge_states("dare", parts[:1], base=base, drop=0.75, seed=1)["w"])
    alone = merge_states("dare", [{"w": parts[0]["w"]}], base={"w": base["w"]}, drop=0.75)
    assert torch.equal(alone["w"], found["w"])  # whatever else there is


NEUTRAL = {"average": {}, "ema": {}, "slerp": {}, "warp": {"eta": 1.0}, "ties": {"density": 1.0}, "dare": {"drop": 0.0}}


def test_every_method_has_its_neutral_options():
    assert set(NEUTRAL) == set(merges)


@pytest.mark.parametrize("method", NEUTRAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_model_is_itself(method, dtype):
    part, base = ({k: v.to(dtype) for k, v in state.items()} for state in random_states(2))
    found = merge_states(method, [part], base=base if "base" in needs(method) else None, **NEUTRAL[method])
    same(found, part)
    assert all(v.dtype == dtype for v in found.values())


@pytest.mark.parametrize("method", NEUTRAL)
@pytest.mark.parametrize("count", [2, 3])
def test_equal_models_are_them(method, count):
    part, base = random_states(2)
    found = merge_states(method, [part] * count, base=base if "base" in needs(method) else None, **NEUTRAL[method])
    same(found, part)


@pytest.mark.parametrize("method", ["average", "slerp", "warp", "ties", "dare"])
def test_two_models_in_either_order(method):
    one, two, base = random_states(3)
    given = {"base": base if "base" in needs(method) else None, **NEUTRAL[method]}
    ahead = merge_states(method, [one, two], weights=(0.3, 0.7), **given)
    same(ahead, merge_states(method, [two, one], weights=(0.7, 0.3), **given), atol=1e-7, rtol=1e-7)


def test_order_of_three():
    a, b, c, base = random_states(4)
    same(merge_states("average", [a, b, c]), merge_states("average", [c, a, b]), atol=1e-7, rtol=1e-7)
    same(merge_states("ties", [a, b, c], base=base), merge_states("ties", [c, a, b], base=base), atol=1e-7, rtol=1e-7)
    ahead, back = merge_states("slerp", [a, b, c], base=base), merge_states("slerp", [c, b, a], base=base)
    assert (ahead["a"] - back["a"]).abs().max() > 1e-3  # as documented: spheres don't commute


def test_ends_of_the_arc():
    one, two, base = random_states(3)
    same(merge_states("slerp", [one, two], base=base, weights=(1.0, 0.0)), one)
    same(merge_states("slerp", [one, two], base=base, weights=(0.0, 1.0)), two)
    same(merge_states("warp", [one, two], base=base, eta=0.0), base)


def test_ties_of_one_is_trimmed():
    part, base = random_states(2)
    found = merge_states("ties", [part], base=base, density=0.25)
    deltas = torch.cat([(part[k].double() - base[k].double()).flatten() for k in part])
    moved = torch.cat([(found[k].double() - base[k].double()).flatten() for k in part])
    keep = deltas.abs() >= deltas.abs().sort(descending=True).values[round(0.25 * len(deltas)) - 1]
    assert int(keep.sum()) == 14  # a quarter of 58
    torch.testing.assert_close(moved, deltas * keep, atol=1e-6, rtol=0)


def test_dare_that_drops_nothing_averages_the_deltas():
    one, two, base = random_states(3)
    found = merge_states("dare", [one, two], base=base, drop=0.0, weights=(0.25, 0.75))
    same(found, merge_states("average", [one, two], weights=(0.25, 0.75)), atol=1e-6, rtol=0)


def test_the_smallest_that_stays_is_exact_over_blocks():
    g = torch.Generator().manual_seed(3)
    blocks = [torch.rand(n, generator=g) ** 9 for n in (1000, 1, 500)] + [torch.zeros(40)]
    order = torch.cat(blocks).sort(descending=True).values
    for k in (1, 2, 17, 700, 1501, 1541):
        assert kth_largest(lambda: blocks, k) == float(order[k - 1])


def test_counters_are_kept_and_must_agree():
    parts = [{"w": torch.ones(2), "steps": torch.tensor([3])} for _ in range(2)]
    assert merge_states("average", parts)["steps"].tolist() == [3]
    parts[1]["steps"] = torch.tensor([4])
    with pytest.raises(
        ModelError, match=r"'steps': of int64, which is not averaged, and differs between models 1 and 2"
    ):
        merge_states("average", parts)


def test_the_wider_dtype_is_kept():
    parts = [{"w": torch.ones(2, dtype=d)} for d in (torch.bfloat16, torch.float32)]
    assert merge_states("average", parts)["w"].dtype == torch.float32


@pytest.mark.parametrize(
    ("method", "parts", "given", "message"),
    [
        ("mean", [[1.0]], {}, r"unknown merge method 'mean'; "),
        ("average", [], {}, r"nothing to merge; give at least one model"),
        ("average", [[1.0], [2.0]], {"weights": (1.0,)}, r"got 1 weight for 2 models; give one a model"),
        ("average", [[1.0], [2.0]], {"weights": (1.0, 3.0)}, r"weights add to 4; expected 1, such as 0.25,0.75"),
        (
            "average",
            [[1.0], [2.0]],
            {"weights": (1.5, -0.5)},
            r"got the weights 1.5,-0.5; expected numbers of at least 0",
        ),
        ("ema", [[1.0], [2.0]], {"weights": (0.5, 0.5)}, r"'ema' takes no weights: what counts is the order and rate"),
        ("ema", [[1.0], [2.0]], {"rate": 1.5}, r"got rate=1.5; expected 0 to 1"),
        ("slerp", [[1.0], [2.0]], {}, r"'slerp' merges what models learnt since a base; name it \(--base MODEL\)"),
        ("ties", [[1.0]], {"density": 0.0}, r"got density=0; expected more than 0, at most 1"),
        ("dare", [[1.0]], {"drop": 1.0, "base": [0.0]}, r"got drop=1; expected 0 or more, less than 1"),
        ("average", [[1.0]], {"speed": 1.0}, r"merge method 'average' has no option 'speed'"),
        ("average", [[1.0], [1.0, 2.0]], {}, r"'w': shapes \(1,\) and \(2,\) \(models 1 and 2\) differ"),
        ("ties", [[1.0, 2.0]], {"base": [1.0]}, r"'w': shapes \(2,\) and \(1,\) \(model 1 and the base\) differ"),
        ("average", [[1.0], [float("nan")]], {}, r"'w' of model 2 holds numbers that are not finite"),
    ],
)
def test_errors(method, parts, given, message):
    if "base" in given or method == "ties":
        given = given | {"base": {"w": torch.tensor(given.get("base", [0.0]))}}
    with pytest.raises((ConfigError, ModelError), match=message):
        merge_states(method, states(*parts), **given)


def test_tensors_that_only_one_has():
    parts = [{"w": torch.ones(1)}, {"w": torch.ones(1), "bias": torch.ones(1)}]
    with pytest.raises(ModelError, match="'bias' is in model 2 and not in model 1"):
        merge_states("average", parts)
    with pytest.raises(ModelError, match="'bias' is in model 1 and not in the base"):
        merge_states("slerp", parts[1:], base=parts[0])


def needs(method):
    return merges.facts(method).get("needs", ())
