from __future__ import annotations

import json
import random
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.mixing import (
    MixReport,
    Part,
    Shuffle,
    SplitReport,
    keyed,
    mix,
    normal_opening,
    normal_prompt,
    normal_text,
    sides,
    size_weights,
    split,
)
from posttrain.errors import ConfigError, DataError
from posttrain.types import Example, Message, Response


def example(text: str, answer: str = "", *before: str, row: int = 0) -> Example:
    roles = ("user", "assistant")
    prompt = tuple(Message(role=roles[i % 2], content=c) for i, c in enumerate([*before, text]))
    responses = (Response(messages=(Message(role="assistant", content=answer),)),) if answer else ()
    return Example(prompt=prompt, responses=responses, file="a.jsonl", row=row)


def part(name: str, size: int, weight: float = 1.0) -> Part:
    return Part(name=name, open=lambda: (example(f"{name}{i}", row=i + 1) for i in range(size)), weight=weight)


def names(examples: list[Example]) -> list[str]:
    return [e.meta["origin"]["part"] for e in examples]


# ---------------------------------------------------------------------------- the same prompt


@pytest.mark.parametrize(
    "one, other",
    [
        ("What is  it?\n", "what IS it?"),
        ("caf\u00e9", "CAFE\u0301"),  # composed and decomposed
        ("\ufb01ne", "FINE"),  # a ligature
        ("Stra\u00dfe", "STRASSE"),
        ("\uff21\uff22", "ab"),  # full width
        ("a\u00a0b", "a b"),
        ("\u0130zmir", "I\u0307zmir"),
    ],
)
def test_case_white_space_and_unicode_form_do_not_tell_prompts_apart(one: str, other: str):
    assert normal_text(one) == normal_text(other)
    assert normal_prompt(example(one)) == normal_prompt(example(other))


def test_other_words_roles_and_turns_do_tell_prompts_apart():
    texts = [example("a b"), example("ab"), example("c", "", "a", "b"), example("c", "", "a b", ""), example("c")]
    texts.append(Example(prompt=(Message(role="system", content="a b"),)))
    assert len({normal_prompt(e) for e in texts}) == len(texts)
    assert {normal_opening(e) for e in texts} == {"a b", "ab", "a", "c"}


@given(st.text(max_size=30))
def test_normalising_twice_changes_nothing(text: str):
    assert normal_text(normal_text(text)) == normal_text(text)


# ---------------------------------------------------------------------------- splits


def test_a_split_in_numbers():
    rows = [example(f"prompt {i}", row=i) for i in range(10_000)]
    report = SplitReport()
    parts = split(rows, {"train": 0.9, "test": 0.1}, seed=0, report=report)
    assert report.rows == {"train": 9008, "test": 992}
    assert (len(parts["train"]), len(parts["test"])) == (9008, 992)
    assert [e.row for e in parts["test"]][:3] == [22, 40, 49]
    assert report.shares == {"train": 0.9, "test": 0.1}


def test_duplicates_stay_on_one_side_in_any_order_and_company():
    rows = [example(f"Prompt {i}") for i in range(500)]
    twins = [example(f"  pROMPT\t{i} ", "other answer") for i in range(500)]
    shares = {"a": 0.5, "b": 0.3, "c": 0.2}
    side = {normal_prompt(e): name for name, e in sides(rows, shares, seed=3)}
    mixed = [*twins, *rows]
    random.Random(0).shuffle(mixed)
    assert all(side[normal_prompt(e)] == name for name, e in sides(mixed, shares, seed=3))
    assert Counter(side.values()).keys() == shares.keys()
    other = {normal_prompt(e): name for name, e in sides(rows, shares, seed=4)}
    assert other != side


def test_a_larger_first_share_only_moves_examples_to_it():
    rows = [example(f"prompt {i}") for i in range(300)]
    small, large = ({normal_prompt(e) for e in split(rows, {"train": p, "test": 1 - p})["train"]} for p in (0.6, 0.8))
    assert small < large


def test_conversations_that_open_alike_can_be_kept_together():
    family = [example("first"), example("then?", "", "First", "an answer"), example("and?", "", "FIRST", "another one")]
    for seed in range(20):
        parts = split(family, {"a": 0.5, "b": 0.5}, seed=seed, key=normal_opening)
        assert sorted(map(len, parts.values())) == [0, 3]
    assert any(len(split(family, {"a": 0.5, "b": 0.5}, seed=seed)["a"]) in (1, 2) for seed in range(20))


def test_an_empty_side_is_reported_as_0():
    report = SplitReport()
    assert split([example("x")], {"a": 0.5, "b": 0.5}, report=report) is not None
    assert sorted(report.rows.values()) == [0, 1]


@pytest.mark.parametrize(
    "shares, message",
    [
        ({"train": 0.9}, "the shares train=0.9 add up to 0.9; expected 1, such as train=0.9, test=0.1"),
        ({"train": 1.5, "test": -0.5}, "the share of 'test' is -0.5; expected a number above 0"),
        ({"train": float("nan")}, "the share of 'train' is nan; expected a number above 0"),
        ({}, "the shares none add up to 0; expected 1, such as train=0.9, test=0.1"),
    ],
)
def test_shares_have_to_add_up(shares: dict[str, float], message: str):
    with pytest.raises(ConfigError) as caught:
        split([example("x")], shares)
    assert str(caught.value) == message


# ---------------------------------------------------------------------------- mixtures


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=7), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_every_block_has_the_exact_share_of_each_part(weights: list[float], seed: int):
    parts = [part(str(i), 10_000, weight) for i, weight in enumerate(weights)]
    drawn = names(list(islice(mix(parts, seed=seed), 640)))
    for n in range(64, 641, 64):
        counts = Counter(drawn[:n])
        assert all(abs(counts[str(i)] - n * w / sum(weights)) < 1 + 1e-6 for i, w in enumerate(weights))


def test_a_mixture_in_numbers_and_where_its_examples_come_from():
    parts = [part("a", 1000, 2), part("b", 1000, 1)]
    report = MixReport()
    rows = list(mix(parts, seed=0, total=192, report=report))
    assert report.rows == {"a": 128, "b": 64} and report.passes == {"a": 0, "b": 0}
    assert report.rates == {"a": 2 / 3, "b": 1 / 3} and report.ended_by == "192 examples were asked for"
    assert "".join(names(rows)[:24]) == "".join(names(list(islice(mix(parts, seed=0), 24))))
    assert names(rows) != names(list(islice(mix(parts, seed=1), 192)))
    assert [e.prompt[0].content for e in rows if e.meta["origin"]["part"] == "b"] == [f"b{i}" for i in range(64)]
    assert rows[0].meta["origin"] == {"part": names(rows)[0], "file": "a.jsonl", "row": 1}


def test_an_origin_that_is_there_already_is_kept():
    inner = Part(name="inner", open=lambda: mix([part("a", 3)]))
    assert next(iter(mix([inner]))).meta["origin"] == {
        "part": "inner",
        "file": "a.jsonl",
        "row": 1,
        "before": {"part": "a", "file": "a.jsonl", "row": 1},
    }


def test_stop_ends_with_the_first_part_that_runs_out():
    report = MixReport()
    rows = list(mix([part("long", 1000), part("short", 10)], report=report))
    assert report.rows["short"] == 10 and report.ended_by == "'short' ran out"
    assert len(rows) == report.rows.total() and report.rows["long"] <= 32  # within the first block of 64


def test_repeat_goes_through_every_part_and_counts_passes():
    report = MixReport()
    rows = list(mix([part("long", 320), part("short", 100)], when_out="repeat", report=report))
    assert report.passes == {"long": 1, "short": 3} and report.ended_by == "'long' ran out"
    texts = Counter(e.prompt[0].content for e in rows)
    assert all(texts[f"long{i}"] == 1 for i in range(320))
    assert {texts[f"short{i}"] for i in range(100)} == {3, 4}
    assert len(rows) == report.rows.total() and report.rows["long"] == 320


def test_repeat_with_a_total_goes_on_to_it():
    report = MixReport()
    assert len(list(mix([part("a", 3), part("b", 5)], when_out="repeat", total=128, report=report))) == 128
    assert report.rows == {"a": 64, "b": 64} and report.passes == {"a": 21, "b": 12}


def test_only_one_example_of_each_part_is_read_ahead():
    read = Counter()

    def source(name: str):
        for i in range(10**9):
            read[name] += 1
            yield example(f"{i}")

    parts = [Part(name=n, open=lambda n=n: source(n)) for n in "abc"]
    drawn = Counter(names(list(islice(mix(parts), 1000))))
    assert read == drawn


def test_weights_from_sizes_and_temperature():
    sizes = {"a": 8000, "b": 1000, "c": 1000}
    assert size_weights(sizes) == pytest.approx({"a": 0.8, "b": 0.1, "c": 0.1})
    # 8^(1/3) = 2: parts of 2, 1 and 1
    assert size_weights(sizes, 3) == pytest.approx({"a": 0.5, "b": 0.25, "c": 0.25})
    assert size_weights(sizes, float("inf")) == pytest.approx({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3})
    assert size_weights({"a": 10**9, "b": 1}, 0.01) == {"a": 1.0, "b": 0.0}


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: list(mix([])), "a mixture of nothing; expected at least one part"),
        (lambda: list(mix([part("a", 1), part("a", 2)])), "two parts are named 'a'; give each its own name"),
        (lambda: list(mix([part("a", 1, 0)])), "the weight of 'a' is 0; expected a number above 0"),
        (lambda: list(mix([part("a", 1)], when_out="repaet")), "unknown when_out 'repaet'; did you mean 'repeat'?"),
        (lambda: list(mix([part("a", 1)], total=0)), "total is 0; expected at least 1, or leave it out"),
        (lambda: size_weights({"a": 1}, 0), "the temperature is 0; expected a number above 0 (1 = by size)"),
        (lambda: size_weights({"a": 0}), "the source 'a' has 0 rows, so it has no part; leave it out"),
        (lambda: Shuffle(list, buffer=0, seed=0), "a shuffle buffer of 0; expected at least 1 (1 keeps the order)"),
    ],
)
def test_what_cannot_be_mixed(call, message: str):
    with pytest.raises(ConfigError) as caught:
        call()
    assert str(caught.value) == message


@pytest.mark.parametrize("when_out", ["stop", "repeat"])
def test_an_empty_part_is_an_error(when_out):
    with pytest.raises(DataError, match="the source 'b' has no examples"):
        list(mix([part("a", 5), part("b", 0)], when_out=when_out))


def test_a_part_that_cannot_be_read_twice_is_an_error():
    once = iter([example("x")])
    with pytest.raises(DataError, match="the source 'a' can't be read twice"):
        list(mix([Part(name="a", open=lambda: once)], when_out="repeat", total=9))


# ---------------------------------------------------------------------------- shuffle


def test_a_shuffle_gives_every_item_once_and_differs_by_epoch_and_seed():
    orders = {
        (seed, epoch): list(Shuffle(lambda: range(500), buffer=50, seed=seed, epoch=epoch))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert all(sorted(order) == list(range(500)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 4
    assert orders[0, 0] == list(Shuffle(lambda: range(500), buffer=50, seed=0, epoch=0))
    assert all(item - step < 50 for order in orders.values() for step, item in enumerate(order))


def test_a_shuffle_does_not_touch_or_read_the_global_generator():
    random.seed(1)
    before = random.getstate()
    first = list(Shuffle(lambda: range(99), buffer=9, seed=5))
    assert random.getstate() == before
    random.seed(2)
    assert list(Shuffle(lambda: range(99), buffer=9, seed=5)) == first


def test_a_whole_buffer_makes_every_order_about_as_likely():
    counts = Counter(tuple(Shuffle(lambda: range(3), buffer=3, seed=0, epoch=e)) for e in range(1200))
    assert len(counts) == 6 and all(160 < n < 240 for n in counts.values())  # 200 each, deviation 13


@given(
    size=st.integers(0, 60),
    buffer=st.integers(1, 70),
    stop=st.integers(0, 70),
    seed=st.integers(),
    epoch=st.integers(0),
)
@settings(max_examples=150, deadline=None)
def test_resumed_anywhere_it_equals_the_uninterrupted_one(size: int, buffer: int, stop: int, seed: int, epoch: int):
    whole = list(Shuffle(lambda: range(size), buffer=buffer, seed=seed, epoch=epoch))
    shuffle = Shuffle(lambda: range(size), buffer=buffer, seed=seed, epoch=epoch)
    head = list(islice(shuffle, stop))
    state = json.loads(json.dumps(shuffle.state()))
    resumed = Shuffle.resume(lambda: range(size), state)
    assert resumed.state() == state
    assert head + list(resumed) == whole


def test_resumed_after_every_step():
    rows = [example(f"{i}", row=i) for i in range(40)]
    shuffle, out = Shuffle(lambda: rows, buffer=7, seed=1), []
    whole = list(Shuffle(lambda: rows, buffer=7, seed=1))
    for _ in rows:
        shuffle = Shuffle.resume(lambda: rows, json.loads(json.dumps(shuffle.state())))
        out.append(next(shuffle))
    assert out == whole


def test_a_shuffle_holds_no_more_than_its_buffer():
    read = 0

    def source():
        nonlocal read
        for i in range(10**9):
            read += 1
            yield i

    taken = list(islice(Shuffle(source, buffer=20, seed=0), 100))
    assert len(set(taken)) == 100 and read == 119
    assert len(Shuffle(source, buffer=20, seed=0).state()["waiting"]) == 0


def test_a_state_that_does_not_fit():
    shuffle = Shuffle(lambda: range(10), buffer=4, seed=0)
    next(shuffle)
    with pytest.raises(DataError, match="the source ends after 2 items, 4 were read from it before"):
        Shuffle.resume(lambda: range(2), shuffle.state())
    with pytest.raises(ConfigError, match="not the state of a shuffle; expected an object with buffer, epoch"):
        Shuffle.resume(lambda: range(10), {"seed": 0})


def test_keys_are_the_same_on_every_machine():
    assert keyed("split", 0, "x") == 3961653778797158778
    assert keyed("\udc80") != keyed("\udc81")
